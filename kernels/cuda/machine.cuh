// How a thread of a GPU rests inside the one wait: a pause between looks, the rank's tick, and a stall judged by its
// own clock. One thread waits for one peer; all peers are waited for at once.
#pragma once

#include "kernels/cuda/rank.cuh"
#include "protocol/round.hpp"
#include "protocol/wait.hpp"

namespace fa2a {
namespace device {

// Shows peers and the host's threads where this rank is. Every thread of the block, or one.
FA2A_DEVICE void show(DeviceRank& r, u64 round, Phase phase, i32 first_peer, i32 stride) {
  const u64 value = pack_progress(round, phase, load_relaxed(&r.progress_tick));
  if (first_peer == 0) store_release(&r.page->progress, value);
  const RankSet& active = newest_view(r.state->ring).active;
  for (i32 peer = first_peer; peer < r.shape.num_ranks; peer += stride)
    if (active.has(peer)) put_progress(r.host, peer, word_at(r.outbound[peer], r.at.progress), value);
}

FA2A_DEVICE void enter(DeviceRank& r, u64 round, Phase phase) { show(r, round, phase, thread_idx(), num_threads()); }

// The end of a half: where this rank is, shown to all, and then how far the round has come. By the block.
FA2A_DEVICE void end_half(DeviceRank& r, DeviceRound& round, Phase phase, Step step) {
  enter(r, round.round, phase);
  sync_block();
  if (thread_idx() == 0) set_step(round, step);
}

FA2A_DEVICE void close_round(DeviceRank& r, DeviceRound& round) {
  end_half(r, round, Phase::closed, Step::closed);
  if (thread_idx() == 0) point(r.host, Point::combine_closed, round.round);
}

// Tells all peers, a thread a peer, in two halves between which the test build can fail. By the block.
template <class Tell>
FA2A_DEVICE void tell_peers(DeviceRank& r, const DeviceRound& round, Point half_told, Tell tell) {
  const i32 n = r.shape.num_ranks;
  for (i32 half = 0; half < 2; ++half) {
    const i32 first = half == 0 ? 1 : n / 2 + 1, last = half == 0 ? n / 2 : n;
    if (half == 1 && thread_idx() == 0) point(r.host, half_told, round.round);
    sync_block();
    for (i32 step = first + thread_idx(); step <= last; step += num_threads()) tell((r.rank + step) % n);
    sync_block();
  }
}

class DeviceMachine {
 public:
  FA2A_DEVICE DeviceMachine(DeviceRank& r, u64 round, Phase phase, WordKind kind)
      : r_(r), round_(round), phase_(phase), kind_(kind) {}

  FA2A_DEVICE void begin(i32 peer) {
    began_ns_ = last_rest_ns_ = clock_ns();
    if (peer == kNobody) return;
    store_relaxed(&r_.state->waiting_in_round.since_ns[peer], static_cast<u64>(began_ns_));
    count_anew(watch_, progress_of(peer), began_ns_);
  }

  FA2A_DEVICE void end(i32 peer) {
    if (peer == kNobody) return;
    store_relaxed(&r_.state->waiting_in_round.since_ns[peer], 0);
    SourceStats& stats = r_.sources[peer];
    const u64 late_ns = static_cast<u64>(clock_ns() - began_ns_);
    add_to(stats.late_ns, late_ns);
    if (late_ns > load_relaxed(&stats.max_late_ns)) store_relaxed(&stats.max_late_ns, late_ns);
    if (looked_from_ns_ == 0) return;
    add_to(stats.wait_ns, static_cast<u64>(clock_ns() - looked_from_ns_));
    store_relaxed(&r_.state->waiting_in_round.peer, 0);
    store_release(&r_.looking, 0);
  }

  FA2A_DEVICE void rest(i32 peer) {
    pause();
    const i64 now = clock_ns();
    if (peer != kNobody) {
      show_word_of(peer, now);
      judge_stall(peer, now, last_rest_ns_, watch_);
    }
    last_rest_ns_ = now;
    tick(now);
  }

 protected:
  // The watcher of lost links is shown one absent word, of the lowest peer that is waited for, until that wait ends:
  // in an order that differs by chance, ranks would accuse one another by chance.
  FA2A_DEVICE void show_word_of(i32 peer, i64 now) {
    constexpr i64 kSettledNs = 1000000;  // by now every thread has begun its wait, or needs none
    if (looked_from_ns_ != 0 || now - began_ns_ < kSettledNs || load_relaxed(&r_.looking) != 0) return;
    for (i32 lower = 0; lower < peer; ++lower)
      if (load_relaxed(&r_.state->waiting_in_round.since_ns[lower]) != 0) return;
    if (compare_and_swap(&r_.looking, 0, static_cast<u64>(peer) + 1) != 0) return;
    looked_from_ns_ = now;
    store_relaxed(&r_.state->waiting_in_round.word, pack_waiting(kind_, round_, static_cast<u64>(chunk_)));
    store_release(&r_.state->waiting_in_round.peer, static_cast<u64>(peer) + 1);
  }

  // A tick is no excuse before the one that is waited for: see mutual_wait in docs/protocol.md.
  FA2A_DEVICE u64 progress_of(i32 peer) const {
    const u64 progress = load_acquire(word_at(inbound(r_, r_.rounds[round_ % kNumParities], peer), r_.at.progress));
    const auto phase = static_cast<Phase>(progress_field::Phase::unpack(progress));
    bool owed = phase == Phase::dispatch_wait && rounds_ahead(progress, load_relaxed(&r_.next_round)) == 0;
    owed |= phase == Phase::collective && rounds_ahead(progress, load_relaxed(&r_.next_collective)) == 0;
    for (const DeviceRound& open : r_.rounds) {
      const auto step = static_cast<Step>(load_relaxed(&open.step));
      const bool unanswered = step != Step::closed && step < Step::answered;
      owed |= phase == Phase::combine_wait && unanswered && rounds_ahead(progress, load_relaxed(&open.round)) == 0;
    }
    return owed && guarded(guard_mutual_wait) ? progress & ~progress_field::Tick::pack(~0ull) : progress;
  }

  // Peers push their progress into my window, so this reads local memory only. The host's thread makes a suspicion of
  // what is said here, and that ends the wait.
  FA2A_DEVICE void judge_stall(i32 peer, i64 now, i64 looked_ns, StallWatch& watch) {
    const i64 timeout_ns = static_cast<i64>(load_relaxed(&r_.state->stall_ns[peer]));
    if (has_stalled(watch, progress_of(peer), now, looked_ns, timeout_ns, r_.state->ring))
      store_release(&r_.state->stalled_in[peer], watch.held_in);
  }

  // One tick a rank, by whichever waiting thread comes first.
  FA2A_DEVICE void tick(i64 now) {
    const u64 last = load_relaxed(&r_.last_tick_ns);
    if (now - static_cast<i64>(last) < r_.tick_ns || !guarded(guard_tick)) return;
    if (compare_and_swap(&r_.last_tick_ns, last, static_cast<u64>(now)) != last) return;
    add_to(r_.progress_tick, 1);
    show(r_, round_, phase_, 0, 1);
  }

  DeviceRank& r_;
  u64 round_;
  Phase phase_;
  WordKind kind_;
  i32 chunk_ = 0;
  i64 began_ns_ = 0;
  i64 last_rest_ns_ = 0;
  i64 looked_from_ns_ = 0;  // 0: the watcher is not shown my word
  StallWatch watch_{};
};

// One look of a wait is many looks at my own memory: the host's words, which wait_for reads between two calls of this,
// lie behind a bus, so they are read once in a while and not as often as the word that is waited for.
template <class Look>
FA2A_DEVICE Reading look_often(Look look) {
  constexpr i64 kLookNs = 2000;
  const i64 from_ns = clock_ns();
  Reading reading = look();
  for (i32 i = 0; i < kNumLooks; ++i) {
    if (reading != Reading::absent || clock_ns() - from_ns >= kLookNs) break;
    reading = look();
  }
  return reading;
}

// Waits for every active peer's word of this verb, a thread a peer. `heard(peer, word)` for those that are present,
// `silent(peer)` for the rest. False: the host released this rank, and what the others have said does not matter.
template <class Heard, class Silent>
FA2A_DEVICE bool wait_for_all(DeviceRank& r, DeviceRound& round, Verb verb, Phase phase, Heard heard, Silent silent) {
  bool released = false;
  for (i32 peer = thread_idx(); peer < r.shape.num_ranks && !released; peer += num_threads()) {
    if (!round.active.has(peer)) continue;
    DeviceMachine machine(r, round.round, phase, signal_kind(verb));
    const Waited waited =
        wait_for(machine, *r.state, peer, [&] { return look_often([&] { return read_word(r, round, verb, peer); }); });
    released = waited == Waited::released;
    if (waited == Waited::present)
      heard(peer, load_signal(r, round, verb, peer));
    else if (!released)
      silent(peer);
  }
  return !released;
}

}  // namespace device
}  // namespace fa2a
