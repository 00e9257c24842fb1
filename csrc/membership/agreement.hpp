// From accusations to the next view: promises of all its members, one proposal, one decision. Pure: reports and time
// in, effects out. The members decide between proposals by ballots over their pages, or an arbiter outside does.
#pragma once

#include <string>
#include <vector>

#include "membership/consensus.hpp"
#include "membership/member_report.hpp"
#include "protocol/control_page.hpp"
#include "protocol/round.hpp"

namespace fa2a {

struct AgreementOptions {
  i32 rank = 0;
  i32 num_ranks = 0;
  i32 num_partitions = 0;  // of each window
  i64 settle_ns = 50 * 1000000;
  i64 timeout_ns = 10000ll * 1000000;  // without a decision for this long, quorum counts as lost
  i64 patience_ns = 0;                 // nobody goes sooner for accusing of a stall whoever still stands where it stood
  i64 stagger_ns = 20 * 1000000;       // the i-th member of the next view proposes i times later
  std::vector<i32> host_of;            // [num_ranks], the same on every rank; empty: one rank a host
  bool by_windows = true;              // false: an arbiter outside decides between proposals
};

struct AgreementStep {
  bool promise = false;  // give this epoch's promise now
  StepChange change;     // or give it for this change, if this rank still holds for it; kind none: for nothing
  RankSet answered;      // whose ballots I voted on: publish record(), then wake them
  bool asks = false;     // publish record(), then request(), and wake everybody
  bool propose = false;  // hand `proposal` to the arbiter outside
  Decision proposal;
  bool decided = false;  // `decision` is the next view; install it
  Decision decision;
  bool evicted = false;      // the group went on without this rank
  bool quorum_lost = false;  // no right to go on for now
  RankSet waits_for;         // members whose promise is missing: their silence counts
};

class Agreement {
 public:
  Agreement(const AgreementOptions& options, const Decision& first);

  // `now_ns` never goes back. `reports` has one entry a rank.
  AgreementStep step(const std::vector<MemberReport>& reports, i64 now_ns);
  void promised(const Promise& promise) { promise_ = promise; }
  // What stands on this rank's page for the members that vote and propose.
  const AcceptorRecord<Decision>& record() const { return consensus_.record(); }
  const BallotRequest<Decision>& request() const { return consensus_.request(); }
  // The arbiter's answer, whoever's proposal it was.
  void learn(const Decision& decision);
  // The arbiter could not be asked; propose again after a pause.
  void proposal_failed(i64 now_ns) { proposed_ = false, ready_since_ns_ = now_ns + options_.stagger_ns; }
  void installed(const Decision& decision);

  const Decision& current() const { return current_; }
  bool changing() const { return changing_since_ns_ != 0; }

 private:
  struct Edges {
    std::vector<RankSet> accused_by;  // settled only
    bool any_settled = false;
    bool any_unsettled = false;
    RankSet silent_since;  // accused by one who lives, and has not beaten since
    // [accuser]: whom it accuses although that rank beats, or comes on, without a look at it since that this rank knows
    // of.
    std::vector<RankSet> not_looked_again;
    std::vector<RankSet> stands_for;  // [accuser]: whom it accuses of a stall, and who has not come on since
  };
  // One accusation as this rank follows it, from the step after the one that found it.
  struct Followed {
    bool is_found = false;
    i64 since_ns = 0;          // 0: not followed yet
    u64 accused_beat = 0;      // at that time
    u64 accused_progress = 0;  // at that time
    u64 accuser_beat = 0;      // last seen
    bool beats = false;        // the accused has beaten since
    bool comes_on = false;     // accused of a stall, it has come on since
    i32 num_looks = 0;         // how often the accuser's beat was seen to move after the later of these two
  };
  void follow(Followed& one, bool of_stall, const MemberReport& accuser, const MemberReport& accused, i64 now_ns) const;
  bool may_go_for(const Edges& edges, const std::vector<MemberReport>& reports, i32 accuser, const RankSet& next) const;
  bool others_may_join(const Edges& edges, i32 accuser, const RankSet& next, i64 now_ns) const;
  Edges read_edges(const std::vector<MemberReport>& reports, i64 now_ns);
  bool should_change(const std::vector<MemberReport>& reports, const Edges& edges, const RankSet& proven) const;
  StepChange change_to_promise(const std::vector<MemberReport>& reports) const;
  StepChange promised_change(const std::vector<MemberReport>& reports, const RankSet& next) const;
  void apply_change(const StepChange& change, Decision& proposal) const;
  bool adopt_from_peers(const std::vector<MemberReport>& reports, AgreementStep& out);
  struct Prospect {
    RankSet next;
    std::string reason;
    bool ready = false;  // all is there that a proposal needs
    i32 place = 0;       // of this rank among those that may propose
  };
  Prospect consider(const std::vector<MemberReport>& reports, const Edges& edges, const RankSet& proven, i64 now_ns,
                    AgreementStep& out);
  void propose_outside(const std::vector<MemberReport>& reports, const Edges& edges, const Prospect& prospect,
                       i64 now_ns, AgreementStep& out);
  void take_ballot_on(const std::vector<MemberReport>& reports, const Edges& edges, const Prospect& prospect,
                      i64 now_ns, AgreementStep& out);
  bool hand_out_decision(AgreementStep& out) const;
  Decision make_proposal(const std::vector<MemberReport>& reports, const Edges& edges, const Prospect& prospect) const;
  bool has_promised(const MemberReport& report) const {
    return report.promise.epoch_plus_one == current_.view.epoch + 1;
  }

  AgreementOptions options_;
  Decision current_;
  Consensus consensus_;
  Promise promise_;
  bool has_learned_ = false;
  Decision learned_;
  bool proposed_ = false;
  i64 changing_since_ns_ = 0;
  i64 ready_since_ns_ = 0;
  std::vector<Followed> accusations_;  // [accuser * num_ranks + accused]
};

}  // namespace fa2a
