// Everything that a schedule is: the group, its work, its pace, and what goes wrong. A seed makes one; shrinking makes
// it smaller and keeps the chance that is left in it.
#pragma once

#include <string>
#include <vector>

#include "tests/simulator/memory.hpp"

namespace fa2a::sim {

enum class FaultKind {
  crash,    // gone; the operating system says so a little later
  vanish,   // gone, and nobody says so
  leave,    // closes its buffer between two rounds
  stop,     // both its threads stand still, and are woken
  hang,     // its kernel stands still, its native thread goes on
  sleep,    // its native thread stands still, its kernel goes on
  part,     // every link between its host and the others is cut
  cut,      // nothing passes between two ranks any more, in either way
  lose,     // stores of one rank into another's window are lost from now on; pages can still be read
  accuse,   // its watcher accuses everybody, for ever
  lie,      // it sends wrong counts, indices, epochs
  foreign,  // one owner's partition for it belongs to another life of it, which still stores
  join,     // a new process begins a life of this rank: takes the place of one that is out, or was never in
  rejoin,   // once it is out, it comes back as a new life
  retire    // asks to be left out at a step start
};
const char* name_of(FaultKind kind);

// What brings a fault about that comes after no other one.
enum class Moment {
  access,             // by round and access
  newcomer_promised,  // once a member has promised for this rank's newcomer
  own_promise         // once this rank has promised anything
};

struct Fault {
  FaultKind kind = FaultKind::crash;
  i32 rank = 0;
  i32 other = 0;     // the other end of a link
  i32 after = -1;    // index of another fault: it happens `delay_ns` after that one; -1: by round and access
  i32 round = 0;     // once the rank has come to this round
  i64 accesses = 0;  // and its kernel has made so many accesses of shared memory in it
  i64 delay_ns = 0;
  i64 duration_ns = 0;
  u32 lies = 0;
  Moment moment = Moment::access;

  // Lives begin beside the ranks that run: no access of one of them brings that about, unless it comes after a fault.
  bool is_of_world() const { return kind == FaultKind::join || kind == FaultKind::rejoin; }
};

struct Schedule {
  std::string mix;
  u64 seed = 0;
  i32 num_ranks = 4;     // that there is room for
  i32 num_founders = 4;  // the lowest, which are in the first view
  i32 num_rounds = 6;
  i32 num_tokens = 3;        // most of a rank and round
  i32 num_chunk_tokens = 3;  // fewer than num_tokens: streams
  bool two_open = false;
  i32 rounds_per_step = 0;  // 0: no rank marks step starts
  i32 num_spare_partitions = 1;
  i32 ranks_per_host = 0;  // of two hosts; 0: all are on one
  Pace pace;
  Delays delays;
  i64 most_compute_ns = 0;  // of the experts, and between rounds
  i64 most_late_ns = 0;     // stores of a dead rank that land after its death
  i64 exit_seen_ns = 0;     // until the operating system marks a death, at most
  i64 clock_skew_ns = 0;
  std::vector<Fault> faults;

  bool must_finish = true;     // whoever is not at fault gets through all its rounds
  bool all_come_in = false;    // nothing keeps a life that begins from becoming a member
  bool long_stops_go = false;  // those who are well decide alone, and nobody of them sleeps
  bool short_sleeps = false;   // none is long enough for anybody else to be late by it
  i32 num_lives() const;
};

const std::vector<std::string>& mix_names();
Schedule make_schedule(const std::string& mix, u64 seed);
std::string describe(const Schedule& schedule);

// Timeouts of every simulated group, ms. What is shorter than a quarter of them is nobody's fault.
constexpr i64 kBeatMs = 2, kSilenceMs = 16, kStallMs = 32, kLinkMs = 24, kSettleMs = 4, kAgreementMs = 120,
              kJoinHoldMs = 8;

}  // namespace fa2a::sim
