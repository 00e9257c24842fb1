// The judgement of each kind of evidence.
#include "membership/detector.hpp"

#include <algorithm>

#include "protocol/guards.hpp"
#include "protocol/rank_state.hpp"

namespace fa2a {

void Detector::look(i64 now_ns) {
  const bool first = now_ns_ == 0;
  gap_ns_ = first ? 0 : now_ns - now_ns_;
  now_ns_ = now_ns;
  // Keep only gaps that no later, longer gap makes irrelevant: the list stays short and sorted by falling length.
  while (!gaps_.empty() && gaps_.back().length_ns <= gap_ns_) gaps_.pop_back();
  gaps_.push_back({gap_ns_, now_ns});
  constexpr size_t kMaxGaps = 64;
  if (gaps_.size() > kMaxGaps) gaps_.erase(gaps_.begin() + kMaxGaps / 2);
}

// The end of the last gap in this watcher's own looking that exceeded a quarter of the timeout: what happened before
// it, the watcher cannot tell from its own sleep. Gaps of 0.2 to 0.6 s were measured on a loaded two-core machine.
i64 Detector::restarted(i64 timeout_ns) const {
  if (!guarded(guard_gap_restart)) return 0;
  i64 last = 0;
  for (const Gap& gap : gaps_)
    if (gap.length_ns > timeout_ns / 4) last = std::max(last, gap.end_ns);
  return last;
}

void Detector::hear(Peer& peer, const PeerSample& sample, const Timeouts& timeouts) const {
  if (peer.beat_since_ns != 0 && (!sample.readable || sample.process_beat == peer.beat)) return;
  // What this watcher slept itself is no pause of the peer.
  const i64 last_look_ns = now_ns_ - gap_ns_;
  // Once at one place: on a host that pauses again and again a kernel that hangs would be excused for ever.
  if (peer.beat_since_ns != 0 && last_look_ns - peer.beat_since_ns > timeouts.silence_ns / 4 &&
      sample.progress != peer.woke_progress && guarded(guard_stall_awake))
    peer.woke_ns = now_ns_, peer.woke_progress = sample.progress;
  peer.beat = sample.process_beat;
  peer.beat_since_ns = now_ns_;
}

Evidence Detector::judge_silence(Peer& peer, const OwnWait& wait, const Timeouts& timeouts) const {
  if (wait.since_ns == 0 && guarded(guard_waited_only)) return Evidence::none;
  const i64 since = std::max({peer.beat_since_ns, wait.since_ns, restarted(timeouts.silence_ns)});
  return now_ns_ - since >= timeouts.silence_ns ? Evidence::silence : Evidence::none;
}

// A kernel that hangs in a wait says for ever that it looks and finds nothing. What it shows of itself stands still
// then; while it looks, it ticks four times in a link timeout. Without this a rank whose own kernel hangs blames its
// peers for what it does not read, and with one of them the higher rank goes, which may be the peer.
bool Detector::looks_no_more(const OwnWait& wait, i64 link_ns) {
  if (wait.progress != own_progress_ || own_progress_since_ns_ == 0) {
    own_progress_ = wait.progress;
    own_progress_since_ns_ = now_ns_;
  }
  return now_ns_ - own_progress_since_ns_ > link_ns / 2 && guarded(guard_own_kernel);
}

// The peer beats and says that it has signalled the very word we wait for: the path between us is lost, which its
// beats, by another path, would otherwise hide for ever.
Evidence Detector::judge_link(Peer& peer, const PeerSample& sample, const OwnWait& wait, const Timeouts& timeouts) {
  const bool looks = !looks_no_more(wait, timeouts.link_ns);
  // Only the word being looked at is known to be absent: others that a kernel will come to may have arrived.
  // And a peer that is two rounds on has closed this one, so it has said something to everybody whom it counts in.
  // (In a collective, its number stands where the round would.)
  const bool both_rounds = signal_field::Attempt::unpack(wait.word) != static_cast<u64>(WordKind::collective) &&
                           progress_field::Phase::unpack(sample.progress) != static_cast<u64>(Phase::collective);
  const bool is_long_past = both_rounds && rounds_ahead(sample.progress, signal_field::Round::unpack(wait.word)) >= 2;
  const bool past_it = looks && wait.absent && (was_sent(sample.sent, wait.word) || is_long_past);
  if (!past_it) {
    peer.link_since_ns = 0;
    return Evidence::none;
  }
  if (peer.link_since_ns == 0) peer.link_since_ns = now_ns_;
  const i64 since = std::max({peer.link_since_ns, wait.since_ns, restarted(timeouts.link_ns)});
  return now_ns_ - since >= timeouts.link_ns ? Evidence::link : Evidence::none;
}

void Detector::new_view() {
  for (Peer& peer : peers_) {
    if (peer.evidence == Evidence::link) peer.evidence = Evidence::none;
    peer.link_since_ns = 0;
  }
}

Evidence Detector::judge(i32 rank, const PeerSample& sample, const OwnWait& wait, const Timeouts& timeouts) {
  Peer& peer = peers_[static_cast<size_t>(rank)];
  if (peer.evidence == Evidence::exit || peer.evidence == Evidence::left) return peer.evidence;
  // A planned leave is published before the death word is let go, so it must be looked at first.
  if (sample.readable && sample.life == Life::left) return peer.evidence = Evidence::left;
  if (sample.owner_died || sample.has_exited) return peer.evidence = Evidence::exit;
  hear(peer, sample, timeouts);
  // A kernel counts by the peer's progress alone, and by its own clock. Time in which the peer did not beat is silence.
  const bool moves_on = peer.woke_ns != 0 && sample.progress != peer.woke_progress;
  if (moves_on || now_ns_ - peer.woke_ns >= timeouts.stall_ns) peer.woke_ns = 0;
  // What a kernel found may be as old as the last look: whoever has come on since then is not stalled any more, and
  // where it stands now it may stand for ever, with all of its rounds done.
  const bool comes_on = has_come_on(sample.progress, peer.progress);
  peer.progress = sample.progress;
  if (wait.kernel_suspects && peer.evidence == Evidence::none && peer.woke_ns == 0 && !moves_on && !comes_on) {
    peer.stall_progress = sample.progress;
    peer.evidence = Evidence::stall;
  }
  Evidence found = judge_silence(peer, wait, timeouts);
  if (found == Evidence::none && sample.readable) found = judge_link(peer, sample, wait, timeouts);
  if (found != Evidence::none) return peer.evidence = found;
  // Withdrawn as soon as what it rested on has moved; the suspicion itself stays until a view lifts it. A tick alone
  // takes no stall back: before the one who waits for it, a tick excuses nobody (`mutual_wait`), and its kernel goes on
  // holding the stall against it, view after view of the same members.
  const bool moved = peer.evidence == Evidence::stall
                         ? has_come_on(sample.progress, peer.stall_progress) || peer.woke_ns != 0
                     : peer.evidence == Evidence::silence ? now_ns_ - peer.beat_since_ns < timeouts.silence_ns
                                                          : false;
  if (moved) peer.evidence = Evidence::none;
  return peer.evidence;
}

}  // namespace fa2a
