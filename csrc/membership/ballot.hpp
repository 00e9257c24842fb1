// Single-decree consensus among the members of one view, over records that each member keeps on its own page. Pure, and
// the same for every kind of value: a view in production, a number where every schedule is walked.
//
// docs/membership.md, "How the members decide", has the rules and the argument that they suffice.
#pragma once

#include "protocol/control_page.hpp"
#include "protocol/guards.hpp"
#include "protocol/rank_set.hpp"

namespace fa2a {

constexpr u32 kBallotRankBits = 10;
static_assert(1 << kBallotRankBits >= kMaxRanks, "a ballot names its rank");

// Above `highest`, and no other rank's ever.
constexpr u64 next_ballot(u64 highest, i32 rank) {
  return ((highest >> kBallotRankBits) + 1) << kBallotRankBits | static_cast<u64>(rank);
}
constexpr i32 rank_of_ballot(u64 ballot) { return static_cast<i32>(ballot & ((1 << kBallotRankBits) - 1)); }

// The acceptor. True: the record changed, and must be stored; storing it is the answer.
template <class Value>
bool answer(AcceptorRecord<Value>& own, const BallotRequest<Value>& request) {
  if (request.epoch != own.epoch) return false;
  if (request.phase == BallotPhase::prepare) {
    if (request.ballot <= own.promised) return false;
    own.promised = request.ballot;
    return true;
  }
  if (request.phase != BallotPhase::accept) return false;
  if (request.ballot < own.promised || request.ballot == own.accepted_ballot) return false;
  own.promised = own.accepted_ballot = request.ballot;
  own.accepted = request.value;
  return true;
}

// What a proposer holds of one member when it counts.
template <class Value>
struct Vote {
  const AcceptorRecord<Value>* record = nullptr;  // as last read from its page; nullptr: cannot be read
  bool proven_dead = false;                       // by this rank itself, before it last read the record
};

// Whose votes count.
struct Electorate {
  i32 num_ranks = 0;
  u64 epoch = 0;
  RankSet members;
  const u64* incarnations = nullptr;  // [num_ranks]
};

template <class Value>
struct Tally {
  bool quorum = false;
  u64 highest_promised = 0;
  u64 accepted_ballot = 0;          // the highest in any record that was read
  const Value* accepted = nullptr;  // at that ballot; nullptr: nobody has accepted anything
};

// More than half of those that count; exactly half when it holds the lowest of them.
inline bool is_quorum(const RankSet& yes, const RankSet& counted) {
  const i32 twice = 2 * yes.size(), all = counted.size();
  return twice > all || (twice == all && all > 0 && yes.has(counted.lowest()));
}

// Is this the record of a dead member that answers for it? Of an earlier epoch it is an empty one: its writer never
// came to this one, and never will. `exit` alone is no answer: the dead may have decided, and only their records tell.
template <class Value>
bool is_discounted(const Vote<Value>& vote, u64 incarnation, u64 epoch, u64 ballot, BallotPhase phase) {
  if (!vote.proven_dead) return false;
  if (!guarded(guard_frozen_records)) return true;
  if (!guarded(guard_records_at_accept) && phase == BallotPhase::accept) return true;
  if (vote.record == nullptr || vote.record->incarnation != incarnation) return false;
  return vote.record->epoch < epoch || (vote.record->epoch == epoch && vote.record->promised <= ballot);
}

// `votes` has one entry a rank.
template <class Value>
Tally<Value> count_votes(const Electorate& electorate, const Vote<Value>* votes, BallotPhase phase, u64 ballot) {
  Tally<Value> out;
  RankSet counted = electorate.members, yes;
  for (i32 rank = 0; rank < electorate.num_ranks; ++rank) {
    if (!electorate.members.has(rank)) continue;
    const Vote<Value>& vote = votes[rank];
    const u64 incarnation = electorate.incarnations[rank];
    const bool discounted = is_discounted(vote, incarnation, electorate.epoch, ballot, phase);
    if (discounted) counted.remove(rank);
    const AcceptorRecord<Value>* record = vote.record;
    // A record of a later epoch is no vote here: its page has the decision that closed this one.
    if (record == nullptr || record->incarnation != incarnation || record->epoch != electorate.epoch) continue;
    if (vote.proven_dead && !guarded(guard_frozen_records)) continue;
    if (record->promised > out.highest_promised) out.highest_promised = record->promised;
    // Of everybody that was read, not only of the quorum: a higher ballot can only repeat what was decided below it.
    if (record->accepted_ballot > out.accepted_ballot) {
      out.accepted_ballot = record->accepted_ballot;
      out.accepted = &record->accepted;
    }
    const u64 answered = phase == BallotPhase::prepare ? record->promised : record->accepted_ballot;
    if (answered == ballot && !discounted) yes.add(rank);
  }
  out.quorum = is_quorum(yes, counted);
  return out;
}

// What a proposer does after a count.
enum class ProposerMove : u32 { wait, choose, decided, give_way };

template <class Value>
ProposerMove next_move(const BallotRequest<Value>& request, const Tally<Value>& tally) {
  if (request.phase == BallotPhase::none) return ProposerMove::wait;
  if (tally.quorum) return request.phase == BallotPhase::prepare ? ProposerMove::choose : ProposerMove::decided;
  // Above mine: of a rival, or of a dead member, whom only a higher ballot discounts.
  return tally.highest_promised > request.ballot ? ProposerMove::give_way : ProposerMove::wait;
}

}  // namespace fa2a
