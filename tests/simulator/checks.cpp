// P1, P4 and P5, and the bounds that hold while calls run: each failure says which promise was broken, by whom and
// when.
#include "tests/simulator/world.hpp"

namespace fa2a::sim {
namespace {

std::string name(u64 accusation) {
  constexpr const char* kNames[] = {"its kernel", "exit", "left", "silence", "stall", "link"};
  return kNames[accusation_field::Kind::unpack(accusation)];
}

// Long enough for everybody to fail in turn, each by silence and each view change with a rival; far less than for ever.
constexpr i64 kLongestCall = 900 * kMs;
// Of a hold: what it may last, a wait that looks every tick, and a caller that hiccups.
constexpr i64 kLongestHold = kJoinHoldMs * kMs + 14 * kMs;

}  // namespace

// What everybody was doing when it happened.
std::string World::describe_ranks() const {
  std::string text;
  for (const auto& one : members_) {
    const Member& member = *one;
    text += "\n  " + name_of(member) + (is_alive(member.life) ? "" : " (dead)") + ": ";
    if (member.endpoint == nullptr) {
      text += "waits for its former life to end";
      continue;
    }
    const RankState& state = member.endpoint->state();
    const ControlPage& page = page_of(member);
    text += (member.is_in ? "started " + std::to_string(state.started) : std::string("on its way in")) + ", " +
            (member.call == nullptr ? "in no call" : member.call) + ", phase " +
            std::to_string(progress_field::Phase::unpack(page.progress)) + ", tick " +
            std::to_string(progress_field::Tick::unpack(page.progress)) + ", epoch " +
            std::to_string(newest_view(state.ring).epoch) + ", limit " +
            (state.round_limit == kNoLimit ? "none" : std::to_string(state.round_limit)) + ", suspects";
    for (i32 peer = 0; peer < schedule_.num_ranks; ++peer)
      if (state.suspects.has(peer)) text += " " + std::to_string(peer) + " (" + name(page.accusations[peer]) + ")";
  }
  return text;
}

void World::fail(const std::string& what) {
  if (!report_.wrong.empty() || scheduler_.over) return;
  report_.wrong = what + " (at " + std::to_string((scheduler_.now() - 1000 * kMs) / kUs) + " us)";
  report_.ranks = describe_ranks();
}

// May `a` have lost sight of `b`? Also if `a` is out, and does not know yet: the others have gone on without it.
bool World::excuses(const Member& a, const Member& b) const {
  return faulty_.has(b.life) || evicted_.has(a.life) || evicted_.has(b.life) ||
         bad_links_[static_cast<size_t>(a.life)].has(b.life) || b.end == End::left || b.leaves;
}

void World::watch_all() {
  for (auto& member : members_)
    if (is_there(*member)) watch(*member);
  if (links_.wrong != nullptr) fail(std::string("P8: ") + links_.wrong);
  if (scheduler_.num_steps % 256 == 0) watch_calls();
}

void World::watch(Member& member) {
  const RankState& state = member.endpoint->state();
  // The view first: whoever it leaves out is suspected for it.
  if (state.ring.newest != member.newest || page_of(member).decision.version != member.decision_version)
    watch_views(member);
  if ((state.release & release_quorum_lost) != 0) suspended_.add(member.life);
  if (state.suspects != member.suspects) watch_suspects(member);
  strike_promised(member);
}

// P4: nobody who lives, beats and is not late is suspected, whoever else dies.
void World::watch_suspects(Member& member) {
  const RankState& state = member.endpoint->state();
  const RankSet suspects = state.suspects, fresh = suspects.without(member.suspects);
  member.suspects = suspects;
  const View& view = newest_view(state.ring);
  for (i32 peer = 0; peer < schedule_.num_ranks; ++peer) {
    const Member* other = fresh.has(peer) ? life_in(view, peer) : nullptr;
    if (other == nullptr) continue;
    const u64 accusation = page_of(member).accusations[peer];
    // A kernel gives up one who has promised not to begin the round that it waits in. That is all: nobody is accused.
    const TwoCopies<Promise>& given = page_of(*other).promise;
    const Promise& promise = given.copies[given.version % 2];
    const bool is_held_back =
        given.version != 0 && promise.epoch_plus_one == view.epoch + 1 && state.started > promised_round(promise);
    if (is_held_back && accusation_field::Kind::unpack(accusation) == 0) continue;
    if (!excuses(member, *other))
      fail("P4: " + name_of(member) + " suspects " + name_of(*other) + ", who is well, by " + name(accusation));
    // Who retires closes only once it is decided that it is out.
    if (other->retires && accusation == pack_accusation(view.epoch, Evidence::left))
      fail("P4: " + name_of(member) + " takes for a fault that " + name_of(*other) + " has left as was decided");
  }
}

// P1: a call returns in bounded time, whatever others do. What a rank stood still itself does not count.
void World::watch_calls() {
  for (auto& one : members_) {
    Member& member = *one;
    if (!is_there(member)) continue;
    watch_deaths(member);
    if (member.call == nullptr) continue;
    const i64 lasts = scheduler_.now() - member.call_began - member.stood_still_ns;
    if (lasts > kLongestCall)
      fail("P1: " + std::string(member.call) + " of " + name_of(member) + " in round " + std::to_string(member.round) +
           " does not return");
    const bool holds =
        std::string(member.call) == "begin_step" && member.endpoint->pulse().hold_state() == HoldState::holding;
    if (holds && lasts > kLongestHold) fail("P8: " + name_of(member) + " is held at a step start for too long");
  }
}

// P5: who is gone on the same host, and marked by the operating system, is known to be within a few looks.
void World::watch_deaths(Member& member) {
  constexpr i64 kLongestBlindness = 6 * kBeatMs * kMs;
  const Machine& mine = machine(member.life);
  const View& view = newest_view(member.endpoint->state().ring);
  const bool looks = std::max(mine.stopped_until, mine.pulse_paused_until) <= scheduler_.now();
  bool is_blind = false;
  for (i32 peer = 0; peer < schedule_.num_ranks && looks && member.is_in && member.end == End::running; ++peer) {
    if (!view.active.has(peer) || member.suspects.has(peer) || evicted_.has(member.life)) continue;
    const Member* other = life_in(view, peer);
    is_blind |= other != nullptr && marked_dead_.has(other->life);
  }
  if (!is_blind) return void(member.blind_since = 0);
  if (member.blind_since == 0) member.blind_since = scheduler_.now();
  // It is looked at now and then only: a pause may have been over all that time.
  const i64 since = std::max({member.blind_since, mine.stopped_until, mine.pulse_paused_until});
  if (scheduler_.now() - since > kLongestBlindness)
    fail("P5: a member is dead, and " + name_of(member) + " does not see it");
}

// Nobody starts a round while it suspects a member: by the end of the call it must have got another view. An install
// publishes the view first and lifts the suspicion after, so a call may begin in between: then it is lifted by now.
void World::check_hold(const Member& member, const RankSet& suspects_before, u64 newest_before) {
  const RankState& state = member.endpoint->state();
  const RankSet stands = suspects_before & suspects_of(state) & newest_view(state.ring).active;
  if (state.ring.newest == newest_before && !stands.empty())
    fail("P2: " + name_of(member) + " starts a round of a view in which it suspects a member");
}

// Ranks are never more than two rounds apart, and two more for each view that took one back who had been given up:
// words of rounds far apart could not be told apart.
void World::check_distance(const Member& member) {
  const RankState& state = member.endpoint->state();
  const View& view = newest_view(state.ring);
  for (i32 peer = 0; peer < schedule_.num_ranks; ++peer) {
    const Member* other = peer != member.rank && view.active.has(peer) ? life_in(view, peer) : nullptr;
    if (other == nullptr || !is_alive(other->life) || evicted_.has(other->life) || other->end != End::running) continue;
    if (misleads(member, *other)) continue;
    // Who was let in and does not know yet has begun nothing, and begins with the round that it was let in for.
    const u64 mine = state.started, its = std::max(other->endpoint->state().started, other->entered_at);
    if (mine > its + 2 * (1 + view.epoch))
      fail("P2: " + name_of(member) + " begins round " + std::to_string(mine - 1) + " while " + name_of(*other) +
           " is in round " + std::to_string(its));
  }
}

void World::check_end_of(const Member& member, const View& newest) {
  const RankState& state = member.endpoint->state();
  const u64 epoch = newest_view(state.ring).epoch;
  const bool is_inside = life_in(newest, member.rank) == &member && newest.active.has(member.rank);
  const bool is_out = (state.release & release_evicted) != 0;
  if (is_inside && (is_out || epoch != newest.epoch))
    fail("P6: " + name_of(member) + " ends in epoch " + std::to_string(epoch) + " and not in " +
         std::to_string(newest.epoch));
  if (!is_inside && !is_out) fail("P6: " + name_of(member) + " does not know that it is out");
  // Whether one who is out might go was looked at when the view was decided.
  if (schedule_.must_finish && !faulty_.has(member.life) && !evicted_.has(member.life) && member.end != End::finished)
    fail("P1: " + name_of(member) + " is well, and does not get through its rounds");
}

// P5, P6: in the end all that live are in one view that holds none of the dead, or know that they are out.
void World::check_end() {
  const View& newest = views_.rbegin()->second;
  bool any_inside = false;
  for (const auto& one : members_) {
    const Member& member = *one;
    const bool lives = is_there(member) && member.end != End::left;
    any_inside |= lives && newest.active.has(member.rank);
    if (schedule_.all_come_in && member.end == End::not_let_in)
      fail("P8: " + name_of(member) + " may come in, and was not let in");
    if (any_inside && member.must_go && newest.active.has(member.rank))
      fail("P5: " + name_of(member) + " stood still for long, and is in the last view");
    // Who cannot read the others' pages cannot know.
    if (lives && member.is_in && isolated_.empty()) check_end_of(member, newest);
  }
  for (const auto& one : members_) {
    const Member& member = *one;
    if (any_inside && schedule_.must_finish && silent_.empty() && member.is_in && !is_alive(member.life) &&
        newest.active.has(member.rank) && life_in(newest, member.rank) == &member)
      fail("P5: " + name_of(member) + " is dead, and in the last view");
  }
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
