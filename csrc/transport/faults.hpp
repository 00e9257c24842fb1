// The faulty transport of the test build: everything a bad peer or a bad network does, as options of one struct with a
// seed.
#pragma once

#include <atomic>

#include "protocol/layout.hpp"
#include "protocol/phases.hpp"
#include "protocol/rank_set.hpp"
#include "transport/fabric.hpp"

namespace fa2a {

enum class Action : u32 { none, kill, stop, sleep, crash };

// Thrown by Action::crash: a virtual rank has no process to kill, so its call ends here and its pulse with it.
struct Crashed {};

// Happens once, when this rank reaches the point in the round.
struct Armed {
  Point point = Point::count;
  u64 round = 0;
  Action action = Action::none;
  i64 value = 0;  // sleep: microseconds
  i32 skip = 0;   // how often the point is passed first; a stream comes to it once a chunk
};

// What a lying peer writes wrong. One bit each; chosen at random among the set ones, by seed.
enum Lie : u32 {
  lie_count = 1,           // a row count beyond the slots
  lie_expert = 2,          // an expert index out of range
  lie_choice = 4,          // a choice index out of range
  lie_num_choices = 8,     // more choices than a row can hold
  lie_twice = 16,          // the same expert twice in a row
  lie_combine_count = 32,  // one row fewer comes back than was sent
  lie_old_round = 64,      // a signal of two rounds ago
  lie_old_epoch = 128,     // a signal of the epoch before
  lie_future = 256,        // a signal far ahead
  lie_claims = 512         // other numbers of rows than will come
};

struct Faults {
  u64 seed = 1;
  RankSet cut;             // loses everything between this rank and those
  RankSet unheard;         // takes these for silent, although they beat: this rank's watcher is sick
  RankSet drop_signals;    // loses data signals only; beats pass
  RankSet drop_taken;      // loses the words that give chunks back
  i64 slow_row_ns = 0;     // sleeps up to this long before each row, at random
  i64 late_signal_ns = 0;  // and before each signal
  bool ignore_consent = false;
  u32 lies = 0;
  u64 lies_from_round = 0;
  std::atomic<i64> pulse_pause_ns{0};  // this rank's native thread sleeps so long, once
  static constexpr i32 kNumArmed = 8;
  Armed armed[kNumArmed];
  std::atomic<u64> num_faults{0};

  // True: the row is lost, or was stored here in its own slow way.
  bool put_row(i32 dst, u8* to, const u8* from, u64 num_bytes);
  // False: lost on the way.
  bool put_signal(i32 dst, u64* word, u64 value, bool combine);
  void lie_about(RowHeader* stored);
  void lie_about_claims(i32* claims, i32 num_experts);
  // lie_combine_count: the first row of each answer never arrives.
  bool loses_answer(i32 dst);
  void at(Point point, u64 round, Fabric& fabric);
  i32 rank = -1;  // whose faults these are

 private:
  u64 next_random();
  RankSet lost_one_;  // owners whose answer is already one row short
  bool lying(u32 kind) const { return (lies & kind) != 0; }
};

}  // namespace fa2a
