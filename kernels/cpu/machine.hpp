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
  CpuMachine(Context& context, u64 round)
      : CpuMachine(context, round, context.rounds[round % kNumParities].partitions, context.state->waiting_in_round) {}
  // `partitions`: whose partition is whose, in the view that this rank waits in; outlives the machine.
  CpuMachine(Context& context, u64 round, const std::vector<u16>& partitions, Waiting& waiting)
      : c_(context), round_(round), partitions_(partitions), waiting_(waiting) {}

  // Shows peers where this rank is. Stored at phase changes and, as the tick, while it waits.
  void enter(Phase phase);
  // Shows that work goes on, inside a phase that may last: once per chunk.
  void advance();
  // Time counts against a peer from here on, until its word is there.
  void expect(i32 peer);
  void expect_if(bool awaited, i32 peer) {
    if (awaited == (load_relaxed(&waiting_.since_ns[peer]) != 0)) return;
    if (awaited)
      expect(peer);
    else
      expect_no_more(peer);
  }
  void expect_no_more(i32 peer);
  void expect_nobody();
  // Which word of the peer that is waited for is looked at; for the watcher of lost links.
  void look_for(WordKind kind, i32 chunk) {
    store_relaxed(&waiting_.word, pack_waiting(kind, round_, static_cast<u64>(chunk)));
  }

  // What wait_for asks of a machine.
  void begin(i32 peer);
  void end(i32 peer);
  void rest(i32 peer);

 private:
#if defined(FA2A_SIMULATED)
  static constexpr i32 kNumSpins = 0;  // nobody comes in between two polls there, so a spin would only cost time
#else
  static constexpr i32 kNumSpins =
      64;  // about a microsecond; longer spins starve the peer that we wait for on a busy host
#endif

  void show();
  void watch(i32 peer);
  void judge_stalls(i64 now);
  u64 progress_of(i32 peer) const;
  u64 excusable(u64 progress) const;

  Context& c_;
  u64 round_;  // or the number of a collective
  const std::vector<u16>& partitions_;
  Waiting& waiting_;  // a collective's is not that of rounds, which may run on a GPU meanwhile
  Phase phase_ = Phase::idle;
  i32 num_spins_ = 0;
  std::optional<DoorbellWaiter> waiter_;
  u32 heard_ = 0;
  i64 last_rest_ns_ = 0;
  i64 last_tick_ns_ = 0;
  i64 begun_ns_ = 0;  // the wait for one peer
};

}  // namespace fa2a
