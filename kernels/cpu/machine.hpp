// How a CPU rank rests inside the one wait: spin briefly, then sleep on the doorbell; tick; judge a stall by its own
// clock.
#pragma once

#include <optional>

#include "host/clock.hpp"
#include "host/doorbell.hpp"
#include "kernels/cpu/context.hpp"
#include "protocol/wait.hpp"

namespace fa2a {

class CpuMachine {
 public:
  CpuMachine(Context& context, u64 round) : c_(context), round_(round) {}

  // Shows peers where this rank is. Stored at phase changes and, as the tick, while it waits.
  void enter(Phase phase);
  // Time counts against a peer from here on, until its word is there.
  void expect(i32 peer) { store_relaxed(&c_.state->waiting_since_ns[peer], static_cast<u64>(now_ns())); }
  void expect_nobody();

  // What wait_for asks of a machine.
  void begin(i32 peer);
  void end(i32 peer);
  void rest(i32 peer);

 private:
  static constexpr i32 kNumSpins =
      64;  // about a microsecond; longer spins starve the peer that we wait for on a busy host

  void show(bool to_peers);
  void judge_stall(i32 peer, i64 now);

  Context& c_;
  u64 round_;
  Phase phase_ = Phase::idle;
  i32 num_spins_ = 0;
  std::optional<DoorbellWaiter> waiter_;
  u32 heard_ = 0;
  i64 last_rest_ns_ = 0;
  i64 last_tick_ns_ = 0;
  i64 stall_since_ns_ = 0;
  u64 seen_progress_ = 0;
};

}  // namespace fa2a
