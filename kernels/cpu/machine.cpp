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

void CpuMachine::enter(Phase phase) {
  phase_ = phase;
  show();
}

void CpuMachine::advance() {
  ++c_.progress_tick;
  show();
}

void CpuMachine::expect(i32 peer) {
  if (!kWatched) return;
  const i64 now = now_ns();
  store_relaxed(&waiting_.since_ns[peer], static_cast<u64>(now));
  StallWatch& watch = c_.stalls[static_cast<size_t>(peer)];
  count_anew(watch, watch.progress, now);
}

void CpuMachine::expect_no_more(i32 peer) {
  const u64 since = load_relaxed(&waiting_.since_ns[peer]);
  if (since == 0) return;
  store_relaxed(&waiting_.since_ns[peer], 0);
  SourceStats& stats = c_.sources[static_cast<size_t>(peer)];
  const u64 late_ns = static_cast<u64>(now_ns()) - since;
  add_to(stats.late_ns, late_ns);
  if (late_ns > load_relaxed(&stats.max_late_ns)) store_relaxed(&stats.max_late_ns, late_ns);
}

void CpuMachine::expect_nobody() {
  for (i32 peer = 0; peer < c_.shape.num_ranks; ++peer) expect_no_more(peer);
}

void CpuMachine::show() {
  if (!kWatched) return;
  const u64 value = pack_progress(round_, phase_, c_.progress_tick);
  store_release(&c_.fabric->page(c_.rank).progress, value);
  const RankSet& active = newest_view(c_.state->ring).active;
  for (i32 peer = 0; peer < c_.shape.num_ranks; ++peer)
    if (active.has(peer)) c_.wire->put_progress(peer, Context::word(c_.fabric->outbound(peer), c_.at.progress), value);
}

void CpuMachine::begin(i32 peer) {
  num_spins_ = 0;
  if (peer == kNobody || !kWatched) return;
  if (load_relaxed(&waiting_.since_ns[peer]) == 0) expect(peer);
  begun_ns_ = now_ns();
  store_relaxed(&waiting_.peer, static_cast<u64>(peer) + 1);
}

void CpuMachine::end(i32 peer) {
  waiter_.reset();
  if (peer == kNobody || !kWatched) return;
  store_relaxed(&waiting_.peer, 0);
  expect_no_more(peer);
  add_to(c_.sources[static_cast<size_t>(peer)].wait_ns, static_cast<u64>(now_ns() - begun_ns_));
}

void CpuMachine::rest(i32 peer) {
  if (num_spins_ < kNumSpins) {
    ++num_spins_;
    relax();
    return;
  }
  if (kWatched) watch(peer);
  if (!waiter_) {
    // Listen first, look at the word again, then sleep: in the other order a ring between look and sleep is lost.
    waiter_.emplace(c_.fabric->page(c_.rank));
  } else {
    waiter_->sleep(heard_, c_.tick_ns);
  }
  heard_ = waiter_->listen();
}

void CpuMachine::watch(i32 peer) {
  const i64 now = now_ns();
  if (last_rest_ns_ == 0) last_tick_ns_ = last_rest_ns_ = now;
  if (peer != kNobody) judge_stalls(now);
  last_rest_ns_ = now;
  if (now - last_tick_ns_ >= c_.tick_ns && guarded(guard_tick)) {
    last_tick_ns_ = now;
    advance();
  }
}

// A tick says "I am late because I wait for somebody else". It is no excuse before the one that is waited for: two
// ranks that call in different orders, one in dispatch r + 1 before combine r and one the other way round, would tick
// at each other for ever. What I owe: the answer of a round that is open here, or a dispatch or collective that I have
// not begun.
u64 CpuMachine::excusable(u64 progress) const {
  const auto phase = static_cast<Phase>(progress_field::Phase::unpack(progress));
  const u64 round = progress_field::Round::unpack(progress);
  const auto is_round = [&](u64 mine) { return (mine & progress_field::Round::max) == round; };
  bool owed = phase == Phase::dispatch_wait && is_round(c_.rounds_begun());
  owed |= phase == Phase::collective && is_round(c_.next_collective) && phase_ != Phase::collective;
  for (const OpenRound& open : c_.rounds) {
    // What is known here of a GPU's rounds is old. The kernel of the one that waits for me judges my GPU, which owes
    // it.
    const bool unanswered = !c_.rounds_on_gpu && (open.stage == Stage::sent || open.stage == Stage::received);
    owed |= phase == Phase::combine_wait && unanswered && is_round(open.round);
  }
  return owed && guarded(guard_mutual_wait) ? progress & ~progress_field::Tick::pack(~0ull) : progress;
}

// Peers push their progress into my window, so this reads local memory only, as a GPU kernel would. The kernels of a
// GPU push it into windows there; where this host looks, only the peer's own page moves while one of its rounds is
// open.
u64 CpuMachine::progress_of(i32 peer) const {
  if (c_.rounds_on_gpu) return load_acquire(&c_.fabric->page(peer).progress);
  u8* inbound = c_.fabric->inbound(partitions_[static_cast<size_t>(peer)]);
  return load_acquire(Context::word(inbound, c_.at.progress));
}

// Of all who are waited for, not only of the one whose word is looked at: several hung peers are then found together.
void CpuMachine::judge_stalls(i64 now) {
  for (i32 peer = 0; peer < c_.shape.num_ranks; ++peer) {
    if (load_relaxed(&waiting_.since_ns[peer]) == 0) continue;
    StallWatch& watch = c_.stalls[static_cast<size_t>(peer)];
    const u64 progress = excusable(progress_of(peer));
    const i64 timeout_ns = static_cast<i64>(load_relaxed(&c_.state->stall_ns[peer]));
    if (has_stalled(watch, progress, now, last_rest_ns_, timeout_ns, c_.state->ring)) suspect(*c_.state, peer);
  }
}

}  // namespace fa2a
