// Votes, ballots, and who gives way to whom.
#include "membership/consensus.hpp"

#include <algorithm>

namespace fa2a {

namespace {

constexpr i32 kMostPatience = 16;  // a rival that is stopped for good must not hold up the others for long

}  // namespace

void Consensus::begin_epoch(const Decision& current) {
  current_ = current;
  record_ = AcceptorRecord<Decision>();
  record_.incarnation = current.view.incarnations[rank_];
  record_.epoch = current.view.epoch;
  request_ = BallotRequest<Decision>();
  tally_ = Tally<Decision>();
  highest_seen_ = rival_ballot_ = 0;
  rival_since_ns_ = 0;
  num_given_way_ = 0;
}

RankSet Consensus::vote(const std::vector<MemberReport>& reports, i64 now_ns) {
  RankSet answered;
  for (i32 rank = 0; rank < num_ranks_; ++rank) {
    const BallotRequest<Decision>* request = reports[static_cast<size_t>(rank)].request;
    if (request == nullptr || rank == rank_ || !current_.view.active.has(rank)) continue;
    // A request of another epoch is none of this one's; one under another rank's ballot would not be its own.
    if (request->epoch != record_.epoch || rank_of_ballot(request->ballot) != rank) continue;
    if (!answer(record_, *request)) continue;
    answered.add(rank);
    rival_ballot_ = request->ballot;
    rival_since_ns_ = now_ns;
  }
  return answered;
}

Electorate Consensus::electorate() const {
  return {num_ranks_, current_.view.epoch, current_.view.active, current_.view.incarnations};
}

ProposerMove Consensus::next(const std::vector<MemberReport>& reports) {
  votes_.clear();
  for (const MemberReport& report : reports) votes_.push_back(vote_of(report));
  tally_ = count_votes(electorate(), votes_.data(), request_.phase, request_.ballot);
  highest_seen_ = std::max({highest_seen_, tally_.highest_promised, record_.promised});
  return next_move(request_, tally_);
}

// Each waits longer than the one before it, longer each time it had to give way, and anew for whatever a rival asks: of
// two ranks that take ballots from each other one must come to have a long enough time for itself.
bool Consensus::may_begin(i32 place, i64 ready_since_ns, i64 now_ns) const {
  if (proposing()) return false;
  const i64 num_staggers = place + (rival_ballot_ != 0 ? 1 : 0) + static_cast<i64>(num_given_way_) * (place + 1);
  return now_ns - std::max(ready_since_ns, rival_since_ns_) >= num_staggers * stagger_ns_;
}

void Consensus::begin() {
  request_ = BallotRequest<Decision>();
  request_.epoch = current_.view.epoch;
  request_.ballot = highest_seen_ = next_ballot(highest_seen_, rank_);
  request_.phase = BallotPhase::prepare;
  answer(record_, request_);
}

void Consensus::ask_to_accept(const Decision& decision) {
  request_.value = decision;
  request_.phase = BallotPhase::accept;
  answer(record_, request_);
}

void Consensus::give_way(i64 now_ns) {
  request_ = BallotRequest<Decision>();
  rival_since_ns_ = now_ns;
  num_given_way_ = std::min(num_given_way_ + 1, kMostPatience);
}

RankSet Consensus::living(const std::vector<MemberReport>& reports) const {
  RankSet out = current_.view.active;
  for (i32 rank = 0; rank < num_ranks_; ++rank) {
    const Vote<Decision> vote = vote_of(reports[static_cast<size_t>(rank)]);
    const u64 incarnation = current_.view.incarnations[rank];
    if (is_discounted(vote, incarnation, current_.view.epoch, ~0ull, BallotPhase::prepare)) out.remove(rank);
  }
  return out;
}

}  // namespace fa2a
