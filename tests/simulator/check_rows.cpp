// P2 and P3, of what a call returned: every row whole, once, from this round and this life; every choice accounted for.
#include "tests/simulator/world.hpp"

namespace fa2a::sim {

bool World::lies(const Member& member) const {
  for (const Fault& fault : schedule_.faults)
    if (fault.kind == FaultKind::lie && fault.rank == member.rank) return true;
  return false;
}

// Does `member` find words of `peer` in its window that mean anything? From a liar, or one whose partition is
// another's, not.
bool World::misleads(const Member& member, const Member& peer) const {
  if (lies(peer)) return true;
  for (const Fault& fault : schedule_.faults) {
    if (fault.kind == FaultKind::foreign && fault.rank == peer.rank && fault.other == member.rank) return true;
  }
  return false;
}

// Whoever took this rank's rows before its call came back took them in the epoch that they were sent in.
void World::check_taken_early(const Member& member, u64 round) {
  const View& view = views_[member.entry(round).epoch];
  for (const auto& dst : members_) {
    const Entry& its = dst->entry(round);
    if (!its.received || !its.taken.has(member.rank)) continue;
    if (its.epoch == view.epoch || life_in(views_[its.epoch], member.rank) != &member) continue;
    fail("P2: " + name_of(*dst) + " took from " + name_of(member) + " in round " + std::to_string(round) +
         " rows of another epoch");
  }
}

// P2, P3: what a source sent is there whole, once, and from this round; of members, and of the life that is one, only.
void World::check_received(Member& member, u64 round, const OpenRound& open) {
  if (lies(member)) return;  // who gives consent falsely is written over, and has itself to blame
  const auto view = views_.find(open.epoch);
  if (view == views_.end() || view->second.active != open.active)
    return fail("P6: round " + std::to_string(round) + " of " + name_of(member) + " has members that epoch " +
                std::to_string(open.epoch) + " has not");
  for (i32 src = 0; src < schedule_.num_ranks; ++src) {
    if (!open.taken.has(src)) continue;
    const Member* life = life_in(view->second, src);
    if (!open.active.has(src) || life == nullptr)
      return fail("P7: " + name_of(member) + " took in round " + std::to_string(round) + " what rank " +
                  std::to_string(src) + " has sent, which is out");
    check_rows_of(member, *life, round, open);
  }
}

void World::check_rows_of(Member& member, const Member& src, u64 round, const OpenRound& open) {
  const std::string where = name_of(member) + " took from " + name_of(src) + " in round " + std::to_string(round);
  const Entry& sent = src.entry(round);
  if (sent.begun && sent.epoch != open.epoch) return fail("P2: " + where + " rows of another epoch");
  const Context& context = member.endpoint->context();
  const u64 word = *Context::word(context.inbound(open, src.rank), context.at.signal[0][round % kNumParities][0]);
  const bool is_stream = context.at.num_halves > 1;
  if (!is_stream && signal_field::Round::unpack(word) == round &&
      signal_field::Epoch::unpack(word) != (open.epoch & signal_field::Epoch::max))
    return fail("P2: " + where + " rows that were signed in another epoch");
  const Batch batch(schedule_, src.life, round);
  i32 num_due = 0;
  for (size_t choice = 0; choice < batch.experts.size(); ++choice)
    num_due += batch.rank_of(choice) == member.rank ? 1 : 0;
  const i32 first = open.received_from[static_cast<size_t>(src.rank)];
  const i32 last = open.received_from[static_cast<size_t>(src.rank) + 1];
  if (last - first != num_due) return fail("P3: " + where + " more or fewer rows than it sent");
  for (i32 i = first; i < last; ++i) {
    const Received& row = open.received[static_cast<size_t>(i)];
    const auto choice = static_cast<size_t>(row.src_token * kNumTopk + row.choice);
    if (row.src_token < 0 || row.src_token >= batch.num_tokens || row.choice < 0 || row.choice >= kNumTopk ||
        batch.experts[choice] != member.rank * kNumLocal + row.local_expert || row.weight != batch.weights[choice])
      return fail("P2: " + where + " a row of a choice that it did not make");
    for (i32 h = 0; h < kHidden; ++h) {
      const size_t at_value = static_cast<size_t>(row.position) * kHidden + static_cast<size_t>(h);
      if (member.recv[at_value] != sent_value(src.life, round, row.src_token, h))
        return fail("P2: " + where + " a row that is torn, stale or another's");
    }
  }
}

// P3 and the history: what counts as delivered was taken there, in the same round, epoch and life.
void World::check_combined(Member& member, u64 round, bool lost) {
  const Batch& batch = member.batches[round % kNumParities];
  const Entry& mine = member.entry(round);
  const View& view = views_[mine.epoch];
  const std::string where = " of " + name_of(member) + " in round " + std::to_string(round);
  std::vector<i32> holders(static_cast<size_t>(schedule_.num_ranks), 0);
  bool any_lost = false;
  for (size_t choice = 0; choice < batch.experts.size(); ++choice) {
    const i32 dst = batch.rank_of(choice);
    const auto code = static_cast<Outcome>(batch.codes[choice]);
    if ((code == Outcome::none) != (dst < 0)) return fail("P3: a choice" + where + " is none and has an expert");
    if (dst < 0) continue;
    if ((code == Outcome::unroutable) != !mine.active.has(dst))
      return fail("P3: a choice" + where + " is called unroutable, and rank " + std::to_string(dst) +
                  " was in its view, or not so");
    if (code == Outcome::unroutable) continue;
    const Member* life = life_in(view, dst);
    if (life == nullptr) return fail("P6: an output" + where + " counts on a life that there never was");
    const Entry& its = life->entry(round);
    holders[static_cast<size_t>(dst)] = life->life;
    if (code == Outcome::delivered) {
      ++report_.num_delivered;
      if (!its.received || !its.taken.has(member.rank))
        return fail("P3: a choice" + where + " came from one who never had it");
      if (its.epoch != mine.epoch) return fail("P2: an output" + where + " mixes epochs or lives");
    }
    if (code != Outcome::lost) continue;
    any_lost = true;
    ++report_.num_lost;
    // Who is suspended may not begin the round that others are in, and is given up there after a while.
    if (suspended_.has(life->life) || suspended_.has(member.life)) continue;
    if (!excuses(member, *life) && !excuses(*life, member))
      return fail("P3: a choice" + where + " to " + name_of(*life) + " is lost, and both are well");
  }
  if (lost != any_lost) return fail("P3: `lost`" + where + " does not say what the codes say");
  if (!batch.sums_are_exact(member.life, round, holders))
    fail("P2: the output" + where + " is not the sum of what was delivered");
}

}  // namespace fa2a::sim
