// The detector alone, on made-up samples: what takes an accusation of a stall back, and what does not.
#include "membership/detector.hpp"

#include <cstdio>

#include "protocol/signal.hpp"

using namespace fa2a;

namespace {

constexpr i64 kMs = 1000000;
constexpr i32 kPeer = 1;
constexpr u64 kRound = 7;
constexpr u64 kTick = 40;

int failures = 0;

void expect(bool holds, const char* what) {
  std::printf("%s: %s\n", holds ? "ok" : "FAILED", what);
  failures += holds ? 0 : 1;
}

// A rank that looks at one peer every ten milliseconds, and whose kernel has suspected it for a stall.
struct Watcher {
  Detector detector{2};
  Timeouts timeouts;
  OwnWait wait;
  PeerSample sample;
  i64 now_ns = kMs;

  explicit Watcher(Phase phase = Phase::dispatch_wait, bool is_suspected = true) {
    timeouts.silence_ns = 2000 * kMs;
    timeouts.link_ns = 5000 * kMs;
    timeouts.stall_ns = 30000 * kMs;
    wait.since_ns = now_ns;
    sample.progress = pack_progress(kRound, phase, kTick);
    look();
    wait.kernel_suspects = is_suspected;
    look();
  }

  // `beats`: the peer's native thread lives, whatever its kernel does.
  Evidence look(bool beats = true) {
    now_ns += 10 * kMs;
    sample.process_beat += beats ? 1 : 0;
    detector.look(now_ns);
    return detector.judge(kPeer, sample, wait, timeouts);
  }

  Evidence look_at(u64 round, Phase phase, u64 tick) {
    sample.progress = pack_progress(round, phase, tick);
    return look();
  }
};

void a_stall_is_what_the_kernel_says() {
  Watcher watcher;
  expect(watcher.look() == Evidence::stall, "whom the kernel suspects and who beats is accused of a stall");
}

// Two ranks that wait for each other tick all the while. Were a tick enough, each would take its accusation back, the
// same members would be decided anew, their kernels would suspect each other at once, and so on until the ring of views
// is full and no call returns.
void a_tick_takes_no_stall_back() {
  Watcher watcher;
  bool held = true;
  for (u64 tick = kTick + 1; tick < kTick + 200; ++tick)
    held = held && watcher.look_at(kRound, Phase::dispatch_wait, tick) == Evidence::stall;
  expect(held, "ticks in the same round and phase take no stall back");

  Watcher wrapped;
  expect(wrapped.look_at(kRound, Phase::dispatch_wait, progress_field::Tick::max) == Evidence::stall &&
             wrapped.look_at(kRound, Phase::dispatch_wait, 0) == Evidence::stall,
         "nor does the tick that begins anew");

  Watcher without_kernel;
  without_kernel.wait.kernel_suspects = false;
  expect(without_kernel.look_at(kRound, Phase::dispatch_wait, kTick + 1) == Evidence::stall,
         "nor one after which the kernel says no more of it");
}

void moving_on_takes_it_back() {
  Watcher phase;
  phase.wait.kernel_suspects = false;
  expect(phase.look_at(kRound, Phase::caller, kTick) == Evidence::none, "another phase of the same round does");
  Watcher round;
  round.wait.kernel_suspects = false;
  expect(round.look_at(kRound + 1, Phase::dispatch_wait, kTick) == Evidence::none, "another round does");
}

void what_it_has_come_to_counts_anew() {
  Watcher watcher;
  watcher.look_at(kRound, Phase::caller, kTick);
  expect(watcher.look() == Evidence::stall, "whom the kernel still suspects where it has come to is accused again");
  expect(watcher.look_at(kRound, Phase::caller, kTick + 1) == Evidence::stall, "and a tick there changes nothing");
}

// The kernel found it where it stood before. Were it accused where it is now, with all of its rounds done, say, nothing
// would ever take that back, and the accuser, who is well, may go for it.
void whoever_came_on_meanwhile_has_not_stalled() {
  Watcher watcher(Phase::dispatch_wait, false);
  watcher.wait.kernel_suspects = true;
  expect(watcher.look_at(kRound, Phase::closed, kTick) == Evidence::none,
         "whoever has come on since the last look is not accused of a stall");
}

// It waits for a view, and no kernel waits for its answer in vain.
void a_tick_at_the_gate_takes_it_back() {
  Watcher watcher(Phase::gate);
  const bool stood = watcher.look() == Evidence::stall;
  expect(stood && watcher.look_at(kRound, Phase::gate, kTick + 1) == Evidence::none, "a tick at the gate does, too");
}

void waking_takes_it_back() {
  Watcher watcher;
  for (i64 paused_ns = 0; paused_ns <= watcher.timeouts.silence_ns / 4; paused_ns += 10 * kMs) watcher.look(false);
  expect(watcher.look() == Evidence::none, "time in which the peer did not beat is no stall");
}

}  // namespace

int main() {
  a_stall_is_what_the_kernel_says();
  a_tick_takes_no_stall_back();
  moving_on_takes_it_back();
  what_it_has_come_to_counts_anew();
  whoever_came_on_meanwhile_has_not_stalled();
  a_tick_at_the_gate_takes_it_back();
  waking_takes_it_back();
  return failures == 0 ? 0 : 1;
}
