// Who runs next, and what time it is: a discrete-event scheduler over fibres, stores under way, and faults.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "host/futex.hpp"
#include "tests/simulator/dice.hpp"
#include "tests/simulator/fibre.hpp"

namespace fa2a::sim {

constexpr i64 kNever = 1ll << 62;
constexpr i64 kUs = 1000, kMs = 1000000;

// One fibre of one life, and when it goes on.
struct Strand {
  std::unique_ptr<Fibre> fibre;
  i32 life = 0;
  bool is_pulse = false;
  i64 ready_at = 0;
  const u32* words[kMaxFutexPairs] = {};  // it sleeps on these as well
  i32 num_words = 0;
  i64 budget = 0;  // accesses until another strand may go on
  i64 num_spent = 0;
};

// What of a life stands still, and how its clock and speed differ from the others'. A life is one process.
struct Machine {
  bool dead = false;
  i64 stopped_until = 0, kernel_paused_until = 0, pulse_paused_until = 0;
  i64 clock_offset_ns = 0, clock_drift_ppm = 0;
  i64 access_ns = 20;
  i64 countdown = 0;  // accesses of its kernel until `struck` is called; 0: none
};

struct Pace {
  i64 most_accesses = 64;  // between two looks at who goes on
  i64 most_hiccup_ns = 0;  // a strand stands still for so long now and then
};

class Scheduler {
 public:
  Scheduler(u64 seed, i32 num_lives, const Pace& pace)
      : machines(static_cast<size_t>(num_lives)), dice(seed), pace_(pace) {}

  Strand& spawn(Fibre::Body body, void* argument, i32 life, bool is_pulse);
  // What else happens in time: when it next does, and its doing so.
  std::function<i64()> next_other;
  std::function<void()> do_other;
  std::function<void(i32 life)> struck;
  // Runs the next thing. False: nothing will ever happen again.
  bool step();

  // From inside a strand.
  void touch();  // an access of shared memory
  void sleep_until(i64 at, const u32* const* words, i32 num_words);
  i64 local_ns() const;
  i64 to_global(i64 duration_ns) const;

  void wake(const u32* word);
  Strand* running() const { return running_; }
  i32 running_life() const { return running_ != nullptr ? running_->life : life_in_construction; }
  Strand& strand(u64 id) { return *strands_[id]; }
  u64 num_strands() const { return strands_.size(); }
  i64 now() const { return now_; }
  // Everything ends: nobody stands still any more, sleeps are short, and no store is held back.
  bool over = false;
  std::vector<Machine> machines;
  Dice dice;
  u64 num_steps = 0;
  i32 life_in_construction = 0;  // whose doing is what happens outside of all strands

 private:
  i64 due(const Strand& strand) const;
  void give_way();

  Pace pace_;
  std::vector<std::unique_ptr<Strand>> strands_;
  Strand* running_ = nullptr;
  i64 now_ = 1000 * kMs;
};

// The one in charge; the simulated host has no other way to it.
extern Scheduler* scheduler;

}  // namespace fa2a::sim
