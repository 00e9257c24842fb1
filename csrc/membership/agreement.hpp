// From accusations to the next view: promises of all its members, one proposal, one decision. Pure: reports and time
// in, effects out. Who decides between proposals is an arbiter outside (today the rendezvous store's compare_set).
#pragma once

#include <string>
#include <vector>

#include "protocol/control_page.hpp"
#include "protocol/round.hpp"

namespace fa2a {

// What this rank can read of one member at this instant.
struct MemberReport {
  bool proven_dead = false;  // exit or left, verified by this rank itself
  bool accused = false;      // this rank's kernels or watcher hold a suspicion against it
  Promise promise;
  const u64* accusations = nullptr;    // its row of the matrix; nullptr: cannot be read
  const Decision* decision = nullptr;  // the newest view it knows to be decided; nullptr: cannot be read
};

struct AgreementOptions {
  i32 rank = 0;
  i32 num_ranks = 0;
  i64 settle_ns = 50 * 1000000;
  i64 timeout_ns = 10000ll * 1000000;  // without a decision for this long, quorum counts as lost
  i64 stagger_ns = 20 * 1000000;       // the i-th member of the next view proposes i times later
};

struct AgreementStep {
  bool promise = false;  // give this epoch's promise now
  bool propose = false;  // hand `proposal` to the arbiter
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
  };
  Edges read_edges(const std::vector<MemberReport>& reports, i64 now_ns);
  bool should_change(const std::vector<MemberReport>& reports, const Edges& edges, const RankSet& proven) const;
  bool adopt_from_peers(const std::vector<MemberReport>& reports, AgreementStep& out);
  void consider(const std::vector<MemberReport>& reports, const Edges& edges, const RankSet& proven, i64 now_ns,
                AgreementStep& out);
  Decision make_proposal(const std::vector<MemberReport>& reports, const Edges& edges, const RankSet& next,
                         const std::string& reason) const;
  bool has_promised(const MemberReport& report) const {
    return report.promise.epoch_plus_one == current_.view.epoch + 1;
  }

  AgreementOptions options_;
  Decision current_;
  Promise promise_;
  bool has_learned_ = false;
  Decision learned_;
  bool proposed_ = false;
  i64 changing_since_ns_ = 0;
  i64 ready_since_ns_ = 0;
  std::vector<i64> first_seen_ns_;  // [accuser * num_ranks + accused]; 0: not accused now
};

}  // namespace fa2a
