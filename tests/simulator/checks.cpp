// P1 to P7, looked at after every step: each failure says which promise was broken, by whom and when.
#include <string.h>

#include "membership/two_copies.hpp"
#include "tests/simulator/world.hpp"

namespace fa2a::sim {
namespace {

std::string name(i32 rank) { return "rank " + std::to_string(rank); }

std::string name(u64 accusation) {
  constexpr const char* kNames[] = {"its kernel", "exit", "left", "silence", "stall", "link"};
  return kNames[accusation_field::Kind::unpack(accusation)];
}

// Long enough for everybody to fail in turn, each by silence and each view change with a rival; far less than for ever.
constexpr i64 kLongestCall = 900 * kMs;

}  // namespace

// What everybody was doing when it happened.
std::string World::describe_ranks() const {
  std::string text;
  for (i32 rank = 0; rank < schedule_.num_ranks; ++rank) {
    const Member& member = members_[static_cast<size_t>(rank)];
    const RankState& state = member.endpoint->state();
    const u64 progress = member.endpoint->fabric().page(rank).progress;
    text += "\n  rank " + std::to_string(rank) + (is_alive(rank) ? "" : " (dead)") + ": started " +
            std::to_string(state.started) + ", " + (member.call == nullptr ? "in no call" : member.call) + ", phase " +
            std::to_string(progress_field::Phase::unpack(progress)) + ", tick " +
            std::to_string(progress_field::Tick::unpack(progress)) + ", epoch " +
            std::to_string(newest_view(state.ring).epoch) + ", limit " +
            (state.round_limit == kNoLimit ? "none" : std::to_string(state.round_limit)) + ", suspects";
    for (i32 peer = 0; peer < schedule_.num_ranks; ++peer)
      if (state.suspects.has(peer))
        text += " " + std::to_string(peer) + " (" + name(member.endpoint->fabric().page(rank).accusations[peer]) + ")";
  }
  return text;
}

void World::fail(const std::string& what) {
  if (!report_.wrong.empty() || scheduler_.over) return;
  report_.wrong = what + " (at " + std::to_string((scheduler_.now() - 1000 * kMs) / kUs) + " us)";
  report_.ranks = describe_ranks();
}

// May `a` have lost sight of `b`? Also if `a` is out, and does not know yet: the others have gone on without it.
bool World::excuses(i32 a, i32 b) const {
  // Nor is one punctual who was suspended: it may not begin a round that others are in.
  return faulty_.has(b) || suspended_.has(b) || evicted_.has(a) || evicted_.has(b) ||
         bad_links_[static_cast<size_t>(a)].has(b) || members_[static_cast<size_t>(b)].end == End::left ||
         members_[static_cast<size_t>(b)].leaves;
}

void World::watch_all() {
  for (i32 rank = 0; rank < schedule_.num_ranks; ++rank)
    if (is_alive(rank)) watch(rank);
  if (links_.wrong != nullptr) fail(std::string("P7: ") + links_.wrong);
  if (scheduler_.num_steps % 256 == 0) watch_calls();
}

void World::watch(i32 rank) {
  Member& member = at(rank);
  const RankState& state = member.endpoint->state();
  // The view first: whoever it leaves out is suspected for it.
  if (state.ring.newest != member.newest || group_page(rank).decision.version != member.decision_version)
    watch_views(rank);
  if ((state.release & release_quorum_lost) != 0) suspended_.add(rank);
  if (state.suspects != member.suspects) watch_suspects(rank);
}

// P4: nobody who lives, beats and is not late is suspected, whoever else dies.
void World::watch_suspects(i32 rank) {
  Member& member = at(rank);
  const RankSet suspects = member.endpoint->state().suspects, fresh = suspects.without(member.suspects);
  member.suspects = suspects;
  for (i32 peer = 0; peer < schedule_.num_ranks; ++peer)
    if (fresh.has(peer) && !excuses(rank, peer))
      fail("P4: " + name(rank) + " suspects " + name(peer) + ", who is well, by " +
           name(group_page(rank).accusations[peer]));
}

// P6: one view an epoch, installed in order; whoever is in it has promised, and started nothing from its first round
// on.
void World::watch_views(i32 rank) {
  Member& member = at(rank);
  const TwoCopies<Decision>& published = group_page(rank).decision;
  if (published.version != member.decision_version) {
    member.decision_version = published.version;
    watch_decision(published.copies[published.version % 2].view);
  }
  const ViewRing& ring = member.endpoint->state().ring;
  if (ring.newest == member.newest) return;
  const View& before = ring.views[member.newest % kNumViews];
  const View& view = ring.views[ring.newest % kNumViews];
  if (ring.newest != member.newest + 1 || view.epoch != before.epoch + 1)
    fail("P6: " + name(rank) + " installs epoch " + std::to_string(view.epoch) + " after " +
         std::to_string(before.epoch));
  if (!view.active.has(rank)) fail("P6: " + name(rank) + " installs a view without itself");
  member.newest = ring.newest;
  const RankSet left_out = before.active.without(view.active);
  if (!left_out.without(member.endpoint->state().suspects).empty())
    fail("P1: " + name(rank) + " installs epoch " + std::to_string(view.epoch) + ", and may wait for one who is out");
  watch_decision(view);
}

// Whoever is at fault, whose link is bad, or who is at odds with one at fault that is kept: accusations cannot tell
// which of two is to blame, only that one must go.
bool World::may_go(i32 rank, const View& next) const {
  const Member& member = members_[static_cast<size_t>(rank)];
  if (faulty_.has(rank) || suspended_.has(rank) || !bad_links_[static_cast<size_t>(rank)].empty() || member.leaves)
    return true;
  for (i32 other = 0; other < schedule_.num_ranks; ++other) {
    if (!next.active.has(other) || !faulty_.has(other)) continue;
    if (member.suspects.has(other) || members_[static_cast<size_t>(other)].suspects.has(rank)) return true;
  }
  return false;
}

void World::watch_decision(const View& view) {
  const auto [found, is_new] = views_.emplace(view.epoch, view);
  if (memcmp(&found->second, &view, sizeof view) != 0)
    return fail("P6: two views of epoch " + std::to_string(view.epoch));
  if (!is_new) return;
  const View& before = views_[view.epoch - 1];
  for (i32 rank = 0; rank < schedule_.num_ranks; ++rank) {
    if (before.active.has(rank) && !view.active.has(rank)) {
      evicted_.add(rank);
      if (!may_go(rank, view))
        fail("P4: " + name(rank) + ", who is well, is out of epoch " + std::to_string(view.epoch));
    }
    if (!view.active.has(rank)) continue;
    const TwoCopies<Promise>& given = group_page(rank).promise;
    const Promise& promise = given.copies[given.version % 2];
    if (given.version == 0 || promise.epoch_plus_one < view.epoch)
      fail("P6: epoch " + std::to_string(view.epoch) + " keeps " + name(rank) + ", who never promised");
    else if (promise.epoch_plus_one == view.epoch && promised_round(promise) > view.first_round)
      fail("P6: epoch " + std::to_string(view.epoch) + " begins with a round that " + name(rank) + " has started");
  }
}

// P1: a call returns in bounded time, whatever others do. What a rank stood still itself does not count.
void World::watch_calls() {
  for (i32 rank = 0; rank < schedule_.num_ranks; ++rank) {
    const Member& member = at(rank);
    if (!is_alive(rank) || member.call == nullptr) continue;
    const i64 lasts = scheduler_.now() - member.call_began - member.stood_still_ns;
    if (lasts > kLongestCall)
      fail("P1: " + std::string(member.call) + " of " + name(rank) + " in round " + std::to_string(member.round) +
           " does not return");
  }
}

bool World::lies(i32 rank) const {
  for (const Fault& fault : schedule_.faults)
    if (fault.kind == FaultKind::lie && fault.rank == rank) return true;
  return false;
}

// Does `rank` find words of `peer` in its window that mean anything? From a liar, or one whose partition is another's,
// not.
bool World::misleads(i32 rank, i32 peer) const {
  if (lies(peer)) return true;
  for (const Fault& fault : schedule_.faults) {
    if (fault.kind == FaultKind::foreign && fault.rank == peer && fault.other == rank) return true;
  }
  return false;
}

// Nobody starts a round while it suspects a member: by the end of the call it must have got another view. An install
// publishes the view first and lifts the suspicion after, so a call may begin in between: then it is lifted by now.
void World::check_hold(i32 rank, const RankSet& suspects_before, u64 newest_before) {
  const RankState& state = at(rank).endpoint->state();
  const RankSet stands = suspects_before & suspects_of(state) & newest_view(state.ring).active;
  if (state.ring.newest == newest_before && !stands.empty())
    fail("P2: " + name(rank) + " starts a round of a view in which it suspects a member");
}

// Ranks are never more than two rounds apart, and two more for each view that took one back who had been given up:
// words of rounds far apart could not be told apart.
void World::check_distance(i32 rank) {
  const RankState& state = at(rank).endpoint->state();
  const RankSet& active = newest_view(state.ring).active;
  for (i32 peer = 0; peer < schedule_.num_ranks; ++peer) {
    if (peer == rank || !active.has(peer) || !is_alive(peer) || evicted_.has(peer) || at(peer).end != End::running)
      continue;
    if (misleads(rank, peer)) continue;
    const u64 mine = state.started, its = at(peer).endpoint->state().started;
    if (mine > its + 2 * (1 + newest_view(state.ring).epoch))
      fail("P2: " + name(rank) + " begins round " + std::to_string(mine - 1) + " while " + name(peer) +
           " is in round " + std::to_string(its));
  }
}

// Whoever took this rank's rows before its call came back took them in the epoch that they were sent in.
void World::check_taken_early(i32 rank, u64 round) {
  for (i32 dst = 0; dst < schedule_.num_ranks; ++dst) {
    const Entry& its = at(dst).history[round];
    if (its.received && its.taken.has(rank) && its.epoch != at(rank).history[round].epoch)
      fail("P2: " + name(dst) + " took from " + name(rank) + " in round " + std::to_string(round) +
           " rows of another epoch");
  }
}

// P2, P3: what a source sent is there whole, once, and from this round; of members only.
void World::check_received(i32 rank, u64 round, const OpenRound& open) {
  if (lies(rank)) return;  // who gives consent falsely is written over, and has itself to blame
  Member& member = at(rank);
  const auto view = views_.find(open.epoch);
  if (view == views_.end() || view->second.active != open.active)
    fail("P6: round " + std::to_string(round) + " of " + name(rank) + " has members that epoch " +
         std::to_string(open.epoch) + " has not");
  for (i32 src = 0; src < schedule_.num_ranks; ++src) {
    if (!open.taken.has(src)) continue;
    const std::string where = name(rank) + " took from " + name(src) + " in round " + std::to_string(round);
    if (!open.active.has(src)) return fail("P7: " + where + " what one who is out has sent");
    const Entry& sent = at(src).history[round];
    if (sent.begun && sent.epoch != open.epoch) return fail("P2: " + where + " rows of another epoch");
    const u64 word = *Context::word(member.endpoint->context().inbound(open, src),
                                    member.endpoint->context().at.signal[0][round % kNumParities][0]);
    const bool is_stream = member.endpoint->context().at.num_halves > 1;
    if (!is_stream && signal_field::Round::unpack(word) == round &&
        signal_field::Epoch::unpack(word) != (open.epoch & signal_field::Epoch::max))
      return fail("P2: " + where + " rows that were signed in another epoch");
    const Batch batch(schedule_, src, round);
    i32 num_due = 0;
    for (size_t choice = 0; choice < batch.experts.size(); ++choice) num_due += batch.rank_of(choice) == rank ? 1 : 0;
    const i32 first = open.received_from[static_cast<size_t>(src)];
    const i32 last = open.received_from[static_cast<size_t>(src) + 1];
    if (last - first != num_due) return fail("P3: " + where + " more or fewer rows than it sent");
    for (i32 i = first; i < last; ++i) {
      const Received& row = open.received[static_cast<size_t>(i)];
      const auto choice = static_cast<size_t>(row.src_token * kNumTopk + row.choice);
      if (row.src_token < 0 || row.src_token >= batch.num_tokens || row.choice < 0 || row.choice >= kNumTopk ||
          batch.experts[choice] != rank * kNumLocal + row.local_expert || row.weight != batch.weights[choice])
        return fail("P2: " + where + " a row of a choice that it did not make");
      for (i32 h = 0; h < kHidden; ++h) {
        const size_t at_value = static_cast<size_t>(row.position) * kHidden + static_cast<size_t>(h);
        if (member.recv[at_value] != sent_value(src, round, row.src_token, h))
          return fail("P2: " + where + " a row that is torn, stale or another's");
      }
    }
  }
}

// P3 and the history: what counts as delivered was taken there, in the same round, epoch and life.
void World::check_combined(i32 rank, u64 round, bool lost) {
  const Batch& batch = at(rank).batches[round % kNumParities];
  const Entry& mine = at(rank).history[round];
  const std::string where = " of " + name(rank) + " in round " + std::to_string(round);
  bool any_lost = false;
  for (size_t choice = 0; choice < batch.experts.size(); ++choice) {
    const i32 dst = batch.rank_of(choice);
    const auto code = static_cast<Outcome>(batch.codes[choice]);
    if ((code == Outcome::none) != (dst < 0)) return fail("P3: a choice" + where + " is none and has an expert");
    if (dst < 0) continue;
    if ((code == Outcome::unroutable) != !mine.active.has(dst))
      return fail("P3: a choice" + where + " is called unroutable, and " + name(dst) + " was in its view, or not so");
    const Entry& its = at(dst).history[round];
    if (code == Outcome::delivered) {
      ++report_.num_delivered;
      if (!its.received || !its.taken.has(rank))
        return fail("P3: a choice" + where + " came from one who never had it");
      if (its.epoch != mine.epoch) return fail("P2: an output" + where + " mixes epochs");
    }
    if (code != Outcome::lost) continue;
    any_lost = true;
    ++report_.num_lost;
    if (!excuses(rank, dst) && !excuses(dst, rank))
      return fail("P3: a choice" + where + " to " + name(dst) + " is lost, and both are well");
  }
  if (lost != any_lost) return fail("P3: `lost`" + where + " does not say what the codes say");
  if (!batch.sums_are_exact(rank, round)) fail("P2: the output" + where + " is not the sum of what was delivered");
}

// P5, P6: in the end all that live are in one view that holds none of the dead, or know that they are out.
void World::check_end() {
  const View& newest = views_.rbegin()->second;
  bool any_inside = false;
  for (i32 rank = 0; rank < schedule_.num_ranks; ++rank) {
    const Member& member = at(rank);
    const bool lives = is_alive(rank) && member.end != End::left;
    any_inside |= lives && newest.active.has(rank);
    if (!lives || !isolated_.empty()) continue;  // who cannot read the others' pages cannot know
    const u64 epoch = newest_view(member.endpoint->state().ring).epoch;
    const bool is_out = (member.endpoint->state().release & release_evicted) != 0;
    if (newest.active.has(rank) && (is_out || epoch != newest.epoch))
      fail("P6: " + name(rank) + " ends in epoch " + std::to_string(epoch) + " and not in " +
           std::to_string(newest.epoch));
    if (!newest.active.has(rank) && !is_out) fail("P6: " + name(rank) + " does not know that it is out");
    // One who is well may still be out: the only one so far to accuse a rank that died in silence loses the tie if it
    // is the higher of the two. Whether it might go was looked at when the view was decided.
    if (schedule_.must_finish && !faulty_.has(rank) && !evicted_.has(rank) && member.end != End::finished)
      fail("P1: " + name(rank) + " is well, and does not get through its rounds");
  }
  for (i32 rank = 0; rank < schedule_.num_ranks && any_inside && schedule_.must_finish; ++rank)
    if (!silent_.has(rank) && silent_.empty() && !is_alive(rank) && newest.active.has(rank))
      fail("P5: " + name(rank) + " is dead, and in the last view");
  // A host goes as one: nobody is left of the other one once somebody has gone.
  if (schedule_.ranks_per_host > 0 && newest.epoch > 0 && newest.active != RankSet::first(schedule_.num_ranks)) {
    const i32 size = schedule_.ranks_per_host, host = newest.active.lowest() / size;
    for (i32 rank = 0; rank < schedule_.num_ranks; ++rank)
      if (newest.active.has(rank) != (rank / size == host))
        return fail("P6: two hosts lost each other, and the last view is neither of them");
  }
  if (accuser_ >= 0 && schedule_.mix == "false_accuser") {
    RankSet others = RankSet::first(schedule_.num_ranks);
    others.remove(accuser_);
    if (newest.active != others)
      fail("P4: a rank accused everybody, and not just it is out; last epoch " + std::to_string(newest.epoch));
  }
}

}  // namespace fa2a::sim
