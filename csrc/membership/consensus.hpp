// One rank's part in the ballots of the current epoch: it votes on everybody's, and takes its own through. Pure: what
// the members' pages say and time in, a record and a request to publish out.
#pragma once

#include <vector>

#include "membership/ballot.hpp"
#include "membership/member_report.hpp"

namespace fa2a {

class Consensus {
 public:
  Consensus(i32 rank, i32 num_ranks, i64 stagger_ns) : rank_(rank), num_ranks_(num_ranks), stagger_ns_(stagger_ns) {}

  // A view was installed (the decision is published by then): the votes of the epoch before are closed.
  void begin_epoch(const Decision& current);

  // What must stand on this rank's page, and may be published as often as one likes.
  const AcceptorRecord<Decision>& record() const { return record_; }
  const BallotRequest<Decision>& request() const { return request_; }

  // Answers the members' requests. Returns whose were answered; unless that is empty, the record must be published.
  RankSet vote(const std::vector<MemberReport>& reports, i64 now_ns);
  // Where this rank's own ballot stands. Its own vote counts as it stands on its page, like everybody's.
  ProposerMove next(const std::vector<MemberReport>& reports);
  // After `choose`: the view that this ballot has to repeat; nullptr: any.
  const Decision* bound_to() const { return tally_.accepted; }

  bool proposing() const { return request_.phase != BallotPhase::none; }
  // May the `place`-th of the proposers, ready since `ready_since_ns`, begin a ballot?
  bool may_begin(i32 place, i64 ready_since_ns, i64 now_ns) const;
  // Both change the record and the request: publish both.
  void begin();
  void ask_to_accept(const Decision& decision);
  void give_way(i64 now_ns);

  // The members that are left to count when every dead one is discounted that can be, by whatever ballot.
  RankSet living(const std::vector<MemberReport>& reports) const;

 private:
  Electorate electorate() const;
  static Vote<Decision> vote_of(const MemberReport& report) { return {report.votes, report.proven_dead}; }

  i32 rank_;
  i32 num_ranks_;
  i64 stagger_ns_;
  Decision current_;
  AcceptorRecord<Decision> record_;
  BallotRequest<Decision> request_;
  Tally<Decision> tally_;
  std::vector<Vote<Decision>> votes_;
  u64 highest_seen_ = 0;    // ballot, mine included
  u64 rival_ballot_ = 0;    // the newest of somebody else that I have answered
  i64 rival_since_ns_ = 0;  // when it, or the next thing it asked, was seen; or when I gave way
  i32 num_given_way_ = 0;
};

}  // namespace fa2a
