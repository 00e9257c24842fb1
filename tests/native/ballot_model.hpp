// A few members that decide between their proposals, as a state and the steps that each of them can take next. The code
// under test is the one that runs: answer, count_votes, next_move and publish_half.
#pragma once

#include <vector>

#include "membership/ballot.hpp"
#include "membership/two_copies.hpp"

namespace fa2a::model {

using Record = AcceptorRecord<u64>;
using Request = BallotRequest<u64>;
constexpr i32 kMost = 5;
constexpr u64 kIncarnations[kMost] = {11, 12, 13, 14, 15};
constexpr u64 kEpoch = 7;

// What one rank holds. Everything is whole words, so that a state is hashed as it lies in memory.
struct Rank {
  // On its page, which outlives it.
  TwoCopies<Record> page;
  Request request;
  u64 decision = 0;  // 0: it knows of none
  // In its own memory.
  u64 dead = 0;
  u64 asking = 0;      // it counts for `request`, which stays on the page when it no longer does
  Record own;          // what it will have published once `num_halves` is done
  u64 num_halves = 2;  // of the publication of `own`
  u64 num_begun = 0;   // ballots
  u64 highest_seen = 0;
  Record read[kMost];  // as a proposer
  u64 was_read[kMost] = {};
  u64 knows_dead[kMost] = {};
};

struct State {
  Rank ranks[kMost];
  u64 num_crashes = 0;
};

struct Bounds {
  i32 num_ranks = 3;
  bool adopting = true;  // false: who could adopt a decision is slow instead, which is as bad and has fewer states
  u64 num_ballots[kMost] = {1, 1, 1, 1, 1};  // how often each may begin one
  u64 num_crashes = 1;
};

enum class Kind : u32 { begin, serve, publish, read, advance, adopt, crash };
struct Step {
  Kind kind;
  i32 rank;
  i32 peer = 0;  // means nothing for steps without one
};

inline State first_state(const Bounds& bounds) {
  State state;
  for (i32 rank = 0; rank < bounds.num_ranks; ++rank) {
    Rank& r = state.ranks[rank];
    r.own.incarnation = kIncarnations[rank];
    r.own.epoch = kEpoch;
    publish(r.page, r.own);
  }
  return state;
}

inline const Record& visible(const Rank& rank) { return rank.page.copies[rank.page.version % 2]; }

inline bool proposing(const Rank& rank) { return rank.asking != 0; }

// The fresh proposal of a rank, told apart from everybody else's.
inline u64 own_value(i32 rank) { return 100 + static_cast<u64>(rank); }

inline Tally<u64> tally_of(const State& state, const Bounds& bounds, i32 rank) {
  const Rank& r = state.ranks[rank];
  Vote<u64> votes[kMost];
  for (i32 peer = 0; peer < bounds.num_ranks; ++peer)
    votes[peer] = {r.was_read[peer] != 0 ? &r.read[peer] : nullptr, r.knows_dead[peer] != 0};
  votes[rank] = {&visible(r), false};
  return count_votes({bounds.num_ranks, kEpoch, RankSet::first(bounds.num_ranks), kIncarnations}, votes,
                     r.request.phase, r.request.ballot);
}

inline void forget_reads(Rank& rank) {
  for (i32 peer = 0; peer < kMost; ++peer) rank.read[peer] = Record(), rank.was_read[peer] = rank.knows_dead[peer] = 0;
}

// The first half comes with the step that made the record: to die before it is to die before that step.
inline void store(Rank& rank) {
  publish_half(rank.page, rank.own, false);
  rank.num_halves = 1;
}

// A decision is on the page before the record moves on to the next epoch.
inline void close_epoch(Rank& rank, u64 decision) {
  rank.decision = decision;
  rank.asking = 0;
  forget_reads(rank);
  rank.own.epoch = kEpoch + 1;
  rank.own.promised = rank.own.accepted_ballot = rank.own.accepted = 0;
  store(rank);
}

inline bool can(const State& state, const Bounds& bounds, const Step& step) {
  const Rank& r = state.ranks[step.rank];
  if (r.dead != 0) return false;
  const bool idle = r.num_halves == 2;  // the thread publishes before it does anything else
  switch (step.kind) {
    case Kind::publish:
      return !idle;
    case Kind::crash:
      return state.num_crashes < bounds.num_crashes;
    case Kind::begin:
      return idle && r.decision == 0 && !proposing(r) && r.num_begun < bounds.num_ballots[step.rank];
    case Kind::serve: {
      Record own = r.own;
      return idle && r.decision == 0 && answer(own, state.ranks[step.peer].request);
    }
    case Kind::read: {
      if (!idle || !proposing(r) || step.peer == step.rank) return false;
      const Rank& peer = state.ranks[step.peer];
      const Record& now = visible(peer);
      const Record& had = r.read[step.peer];
      const bool news = r.was_read[step.peer] == 0 || had.epoch != now.epoch || had.promised != now.promised ||
                        had.accepted_ballot != now.accepted_ballot || had.accepted != now.accepted;
      return news || (peer.dead != 0 && r.knows_dead[step.peer] == 0);
    }
    case Kind::advance:
      return idle && proposing(r) && next_move(r.request, tally_of(state, bounds, step.rank)) != ProposerMove::wait;
    case Kind::adopt:
      return bounds.adopting && idle && r.decision == 0 && state.ranks[step.peer].decision != 0;
  }
  return false;
}

// Returns the view that the step decided, or 0.
inline u64 take(State& state, const Bounds& bounds, const Step& step) {
  Rank& r = state.ranks[step.rank];
  switch (step.kind) {
    case Kind::publish:
      publish_half(r.page, r.own, true);
      r.num_halves = 2;
      break;
    case Kind::crash: {
      // What was in its memory is gone; clearing it makes equal what nobody can tell apart.
      const u64 num_begun = r.num_begun;
      Rank left;
      left.page = r.page, left.request = r.request, left.decision = r.decision;
      left.dead = 1, left.num_begun = num_begun;
      r = left;
      ++state.num_crashes;
      break;
    }
    case Kind::begin: {
      ++r.num_begun;
      r.request = Request();
      r.request.epoch = kEpoch;
      r.request.ballot = next_ballot(r.own.promised > r.highest_seen ? r.own.promised : r.highest_seen, step.rank);
      r.request.phase = BallotPhase::prepare;
      r.asking = 1;
      forget_reads(r);
      answer(r.own, r.request);
      store(r);
      break;
    }
    case Kind::serve:
      answer(r.own, state.ranks[step.peer].request);
      store(r);
      break;
    case Kind::read: {
      const Rank& peer = state.ranks[step.peer];
      r.read[step.peer] = visible(peer);
      r.was_read[step.peer] = 1;
      r.knows_dead[step.peer] = peer.dead;  // the proof came before this read, and a frozen record does not change
      break;
    }
    case Kind::advance: {
      const Tally<u64> tally = tally_of(state, bounds, step.rank);
      const ProposerMove move = next_move(r.request, tally);
      if (move == ProposerMove::choose) {
        r.request.value = tally.accepted != nullptr ? *tally.accepted : own_value(step.rank);
        r.request.phase = BallotPhase::accept;
      } else if (move == ProposerMove::decided) {
        const u64 value = r.request.value;
        close_epoch(r, value);
        return value;
      } else {
        r.asking = 0;
        r.highest_seen = tally.highest_promised;
        forget_reads(r);
      }
      break;
    }
    case Kind::adopt:
      close_epoch(r, state.ranks[step.peer].decision);
      break;
  }
  return 0;
}

inline void steps_of(const State& state, const Bounds& bounds, std::vector<Step>& out) {
  out.clear();
  for (i32 rank = 0; rank < bounds.num_ranks; ++rank) {
    for (Kind kind : {Kind::publish, Kind::begin, Kind::advance, Kind::crash})
      if (can(state, bounds, {kind, rank})) out.push_back({kind, rank});
    for (i32 peer = 0; peer < bounds.num_ranks; ++peer)
      for (Kind kind : {Kind::serve, Kind::read, Kind::adopt})
        if (can(state, bounds, {kind, rank, peer})) out.push_back({kind, rank, peer});
  }
}

}  // namespace fa2a::model
