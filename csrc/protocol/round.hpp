// The steps of a round that are decisions: the gate, its promise, and what may be open at once. No loops, no clocks.
#pragma once

#include "protocol/rank_state.hpp"

namespace fa2a {

// Local loads only. Hold on suspicion: a rank that suspects an active peer starts no further round until a view is
// installed, so that ranks are never more than two rounds apart and few choices are lost.
FA2A_HD bool gate_is_open(const RankState& state, u64 round) {
  if (round >= load_acquire(&state.round_limit) && guarded(guard_promise)) return false;
  if (!guarded(guard_hold)) return true;
  const RankSet& active = newest_view(state.ring).active;
  for (i32 i = 0; i < RankSet::kNumWords; ++i)
    if ((load_acquire(&state.suspects.words[i]) & active.words[i]) != 0) return false;
  return true;
}

// Kernel's half of the promise: publish started, fence, read the limit. Returns false when a promise came in between;
// the round then waits at the gate and will run under the old view, because `started` already counts it.
FA2A_HD bool start_round(RankState& state, u64 round) {
  store_release(&state.started, round + 1);
  if (guarded(guard_promise_fence)) full_fence();
  return round < load_acquire(&state.round_limit) || !guarded(guard_promise);
}

// Host's half: store the limit, fence, read started. Both fences are needed: without either, host and kernel can each
// miss the other's store, and one round runs in two views.
FA2A_HD Promise give_promise(RankState& state, u64 epoch, u64 first_round) {
  Promise promise;
  const u64 started = load_acquire(&state.started);
  promise.epoch_plus_one = epoch + 1;
  promise.limit = started > first_round ? started : first_round;
  store_release(&state.round_limit, promise.limit);
  if (guarded(guard_promise_fence)) full_fence();
  promise.started = load_acquire(&state.started);
  return promise;
}

// The first round that a member's promise leaves free for the next view.
FA2A_HD constexpr u64 promised_round(const Promise& promise) {
  return promise.limit > promise.started ? promise.limit : promise.started;
}

// Is the rank that shows this past the step start at which `round` and `collective` come next? In a collective its
// number stands where the round would.
FA2A_HD constexpr bool has_passed(u64 progress, u64 round, u64 collective) {
  const auto phase = static_cast<Phase>(progress_field::Phase::unpack(progress));
  return rounds_ahead(progress, phase == Phase::collective ? collective : round) >= 0;
}

// Host: publish the view, then lift the limit; a gate that opened first could start a new round under the old view.
// `gone` are ranks proven dead meanwhile, whom this view still keeps: lifting their suspicion would open the gate to a
// round that waits for them.
FA2A_HD void install_view(RankState& state, const View& view, const RankSet& gone) {
  const u64 index = state.ring.newest + 1;
  // Rounds that are open, or still to be run, under the view before must not wait for a rank that was left out: it may
  // well live and beat, and will never signal again.
  const RankSet evicted = newest_view(state.ring).active.without(view.active);
  if (guarded(guard_evicted_is_suspect))
    for (i32 i = 0; i < RankSet::kNumWords; ++i) fetch_or(&state.suspects.words[i], evicted.words[i]);
  state.ring.views[index % kNumViews] = view;
  store_release(&state.ring.newest, index);
  for (i32 i = 0; i < RankSet::kNumWords; ++i) {
    // A new view lifts the suspicion of those it keeps. It never restores consent.
    const u64 suspects = load_acquire(&state.suspects.words[i]);
    fetch_and(&state.suspects.words[i], ~(suspects & view.active.words[i] & ~gone.words[i]));
  }
  store_release(&state.round_limit, kNoLimit);
}

}  // namespace fa2a
