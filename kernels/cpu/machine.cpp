// The CPU's side of the wait.
#include "kernels/cpu/machine.hpp"

namespace fa2a {

namespace {

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

Status released_status(const RankState& state) {
  const u64 why = load_acquire(&state.release);
  if ((why & release_evicted) != 0) return Status::evicted;
  if ((why & release_closing) != 0) return Status::closed;
  if ((why & release_quorum_lost) != 0) return Status::quorum_lost;
  return Status::ok;
}

void CpuMachine::enter(Phase phase) {
  phase_ = phase;
  store_relaxed(&c_.state->waiting_progress, pack_progress(round_, phase, 0));
  show(/*to_peers=*/true);
}

void CpuMachine::expect_nobody() {
  for (i32 peer = 0; peer < c_.shape.num_ranks; ++peer) store_relaxed(&c_.state->waiting_since_ns[peer], 0);
}

void CpuMachine::show(bool to_peers) {
  const u64 value = pack_progress(round_, phase_, c_.progress_tick);
  store_release(&c_.fabric->page(c_.rank).progress, value);
  if (!to_peers) return;
  const RankSet& active = newest_view(c_.state->ring).active;
  for (i32 peer = 0; peer < c_.shape.num_ranks; ++peer)
    if (active.has(peer)) c_.wire->put_progress(peer, Context::word(c_.fabric->outbound(peer), c_.at.progress), value);
}

void CpuMachine::begin(i32 peer) {
  num_spins_ = 0;
  last_rest_ns_ = 0;
  if (peer == kNobody) return;
  if (load_relaxed(&c_.state->waiting_since_ns[peer]) == 0) expect(peer);
  store_relaxed(&c_.state->waiting_peer, static_cast<u64>(peer) + 1);
}

void CpuMachine::end(i32 peer) {
  waiter_.reset();
  if (peer == kNobody) return;
  store_relaxed(&c_.state->waiting_peer, 0);
  store_relaxed(&c_.state->waiting_since_ns[peer], 0);
}

void CpuMachine::rest(i32 peer) {
  if (num_spins_ < kNumSpins) {
    ++num_spins_;
    relax();
    return;
  }
  const i64 now = now_ns();
  if (last_rest_ns_ == 0) last_tick_ns_ = stall_since_ns_ = last_rest_ns_ = now;
  if (peer != kNobody) judge_stall(peer, now);
  last_rest_ns_ = now;
  if (now - last_tick_ns_ >= c_.tick_ns && guarded(guard_tick)) {
    ++c_.progress_tick;
    last_tick_ns_ = now;
    show(/*to_peers=*/true);
  }
  if (!waiter_) {
    // Listen first, look at the word again, then sleep: in the other order a ring between look and sleep is lost.
    waiter_.emplace(c_.fabric->page(c_.rank));
  } else {
    waiter_->sleep(heard_, c_.tick_ns);
  }
  heard_ = waiter_->listen();
}

// The peer pushes its progress into my window, so this reads local memory only, as a GPU kernel would.
void CpuMachine::judge_stall(i32 peer, i64 now) {
  const OpenRound& round = c_.rounds[round_ % kNumParities];
  const u64 progress = load_acquire(Context::word(c_.inbound(round, peer), c_.at.progress));
  const i64 timeout_ns = static_cast<i64>(load_relaxed(&c_.state->stall_ns[peer]));
  const bool slept = now - last_rest_ns_ > timeout_ns / 4 && guarded(guard_gap_restart);
  if (progress != seen_progress_ || slept) {
    seen_progress_ = progress;
    stall_since_ns_ = now;
  }
  if (now - stall_since_ns_ >= timeout_ns) suspect(*c_.state, peer);
}

}  // namespace fa2a
