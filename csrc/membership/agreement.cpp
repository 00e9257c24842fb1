// The steps of a view change on one rank. docs/membership.md tells the whole story in order.
#include "membership/agreement.hpp"

#include <string.h>

#include "membership/verdict.hpp"

namespace fa2a {

namespace {

// Of an accuser's beat, until it has looked around after the accused beat: the turn of the first new beat may have
// begun before that, the turn of the second has not, and is over once there is a third.
constexpr i32 kLooksToTakeBack = 3;

}  // namespace

Agreement::Agreement(const AgreementOptions& options, const Decision& first)
    : options_(options),
      current_(first),
      consensus_(options.rank, options.num_ranks, options.stagger_ns),
      accusations_(static_cast<size_t>(options.num_ranks) * static_cast<size_t>(options.num_ranks)) {
  consensus_.begin_epoch(first);
}

void Agreement::learn(const Decision& decision) {
  if (decision.view.epoch != current_.view.epoch + 1) return;
  has_learned_ = true;
  learned_ = decision;
}

void Agreement::installed(const Decision& decision) {
  current_ = decision;
  consensus_.begin_epoch(decision);
  has_learned_ = proposed_ = false;
  changing_since_ns_ = ready_since_ns_ = 0;
  accusations_.assign(accusations_.size(), Followed());
}

void Agreement::follow(Followed& one, bool of_stall, const MemberReport& accuser, const MemberReport& accused,
                       i64 now_ns) const {
  // Not by what the turn that finds the accusation has read before it, nor by that turn's time: this rank may have been
  // stopped in between, for as long as the accused.
  if (!one.is_found && guarded(guard_found_first)) {
    one.is_found = true;
    return;
  }
  if (one.since_ns == 0) {
    one.since_ns = now_ns;
    one.accused_beat = accused.beat;
    one.accused_progress = accused.progress;
  }
  if (one.beats && accuser.beat != one.accuser_beat) ++one.num_looks;
  one.accuser_beat = accuser.beat;
  one.beats |= accused.beat != one.accused_beat;
  if (one.comes_on || !of_stall || !has_come_on(accused.progress, one.accused_progress)) return;
  one.comes_on = true;
  one.num_looks = 0;  // a beat takes no stall back
}

// Edges count once they are `settle` old by this rank's own clock, so that everybody who suffers from the same rank has
// had time to say so. Only words of the current epoch are accusations.
Agreement::Edges Agreement::read_edges(const std::vector<MemberReport>& reports, i64 now_ns) {
  Edges edges;
  const i32 n = options_.num_ranks;
  edges.accused_by.resize(static_cast<size_t>(n));
  edges.not_looked_again.resize(static_cast<size_t>(n));
  edges.stands_for.resize(static_cast<size_t>(n));
  for (i32 accuser = 0; accuser < n; ++accuser) {
    const MemberReport& told = reports[static_cast<size_t>(accuser)];
    if (told.accusations == nullptr || !current_.view.active.has(accuser)) continue;
    for (i32 accused = 0; accused < n; ++accused) {
      const MemberReport& about = reports[static_cast<size_t>(accused)];
      Followed& one =
          accusations_[static_cast<size_t>(accuser) * static_cast<size_t>(n) + static_cast<size_t>(accused)];
      const u64 word = load_acquire(told.accusations + accused);
      const bool live = accused != accuser && current_.view.active.has(accused) &&
                        accusation_field::Kind::unpack(word) != 0 &&
                        accusation_field::Epoch::unpack(word) == current_.view.epoch;
      if (!live) {
        one = Followed();
        continue;
      }
      const bool of_stall = accusation_field::Kind::unpack(word) == static_cast<u64>(Evidence::stall);
      follow(one, of_stall, told, about, now_ns);
      if (one.since_ns == 0 || now_ns - one.since_ns < options_.settle_ns) {
        edges.any_unsettled = true;
        continue;
      }
      edges.accused_by[static_cast<size_t>(accuser)].add(accused);
      edges.any_settled = true;
      if (told.proven_dead) continue;
      if (!one.beats)
        edges.silent_since.add(accused);
      else if (one.num_looks < kLooksToTakeBack)
        edges.not_looked_again[static_cast<size_t>(accuser)].add(accused);
      else if (of_stall && !one.comes_on && guarded(guard_late_waiters))
        edges.stands_for[static_cast<size_t>(accuser)].add(accused);
    }
  }
  return edges;
}

// A promise of anybody starts mine: it costs a pause at the gate, and every member's is needed.
bool Agreement::should_change(const std::vector<MemberReport>& reports, const Edges& edges,
                              const RankSet& proven) const {
  if (edges.any_settled || !(proven & current_.view.active).empty()) return true;
  for (i32 rank = 0; rank < options_.num_ranks; ++rank) {
    const MemberReport& report = reports[static_cast<size_t>(rank)];
    if (!current_.view.active.has(rank)) continue;
    // Kernels hold at the gate for as long as a suspicion stands, and only a view lifts it: even one that proved false
    // needs a decision, with the same members.
    if (report.accused || has_promised(report)) return true;
  }
  return false;
}

// May this epoch's promise be given for the change that this rank holds for? When every member, and a newcomer with
// them, says of itself that it holds for the same one at the same round: then that round is the first of a step on all
// of them, and nobody has begun it. Or when a member, who saw that, has promised so: what it saw cannot be unseen.
StepChange Agreement::change_to_promise(const std::vector<MemberReport>& reports) const {
  const StepHold& own = reports[static_cast<size_t>(options_.rank)].hold;
  if (own.change.kind == ChangeKind::none || own.epoch_plus_one != current_.view.epoch + 1) return StepChange();
  const auto newcomer = static_cast<i32>(own.change.rank);
  bool all_hold = own.change.kind == ChangeKind::leave || reports[static_cast<size_t>(newcomer)].hold == own;
  bool is_promised = false;
  for (i32 rank = 0; rank < options_.num_ranks; ++rank) {
    if (!current_.view.active.has(rank)) continue;
    const MemberReport& report = reports[static_cast<size_t>(rank)];
    all_hold &= report.hold == own;
    is_promised |=
        has_promised(report) && report.promise.change == own.change && promised_round(report.promise) == own.round;
  }
  return all_hold || is_promised || !guarded(guard_step_start) ? own.change : StepChange();
}

// The change for which all of the next members have promised, at one round. One promise for anything else, and the view
// is decided without it: that member may be in the midst of a step.
StepChange Agreement::promised_change(const std::vector<MemberReport>& reports, const RankSet& next) const {
  const Promise& own = promise_;
  if (own.change.kind == ChangeKind::none || own.epoch_plus_one != current_.view.epoch + 1) return StepChange();
  for (i32 rank = 0; rank < options_.num_ranks; ++rank) {
    if (!next.has(rank) || !guarded(guard_step_start)) continue;
    const Promise& promise = reports[static_cast<size_t>(rank)].promise;
    const bool same = has_promised(reports[static_cast<size_t>(rank)]) && promise.change == own.change &&
                      promised_round(promise) == promised_round(own);
    if (!same) return StepChange();
  }
  return own.change;
}

void Agreement::apply_change(const StepChange& change, Decision& proposal) const {
  if (change.kind == ChangeKind::none) return;
  const auto rank = static_cast<i32>(change.rank);
  View& view = proposal.view;
  if (change.kind == ChangeKind::join) {
    view.partitions[rank] = static_cast<u16>(partition_for_newcomer(current_.view, rank, options_.num_partitions));
    view.incarnations[rank] = change.incarnation;
    view.active.add(rank);
  } else {
    view.active.remove(rank);
  }
  const char* what = change.kind == ChangeKind::join ? " joined" : " left as it had asked to";
  const bool alone = (current_.view.active | view.active).without(current_.view.active & view.active).size() == 1;
  const std::string before = alone ? "" : std::string(proposal.reason) + "; ";
  const std::string reason = before + "rank " + std::to_string(rank) + what;
  memset(proposal.reason, 0, sizeof proposal.reason);
  strncpy(proposal.reason, reason.c_str(), sizeof proposal.reason - 1);
}

// Members spread a decision over their control pages: only a proposer counts votes, or talks to an arbiter outside.
bool Agreement::adopt_from_peers(const std::vector<MemberReport>& reports, AgreementStep& out) {
  for (i32 rank = 0; rank < options_.num_ranks; ++rank) {
    const Decision* decision = reports[static_cast<size_t>(rank)].decision;
    if (decision == nullptr || rank == options_.rank || decision->view.epoch <= current_.view.epoch) continue;
    // A member's promise is part of every decision that keeps it, so a rank that missed one is not a member. If its
    // number is in there, it is another life's by now.
    const View& view = decision->view;
    const u64 my_life = current_.view.incarnations[options_.rank];
    if (!view.active.has(options_.rank) || view.incarnations[options_.rank] != my_life) {
      out.evicted = true;
      out.decision = *decision;
      return true;
    }
    learn(*decision);
  }
  return false;
}

Decision Agreement::make_proposal(const std::vector<MemberReport>& reports, const Edges& edges,
                                  const Prospect& prospect) const {
  Decision proposal = current_;
  proposal.view.epoch = current_.view.epoch + 1;
  proposal.view.active = prospect.next;
  for (i32 rank = 0; rank < options_.num_ranks; ++rank) {
    const MemberReport& report = reports[static_cast<size_t>(rank)];
    // After everything that any kept member may have started. Taking one rank's own word for it would let a peer that
    // is ahead run the same round under the old view.
    const bool counts = rank == options_.rank || guarded(guard_promise);
    if (prospect.next.has(rank) && counts && has_promised(report) &&
        promised_round(report.promise) > proposal.view.first_round)
      proposal.view.first_round = promised_round(report.promise);
    // What a rank said before it died does not count against those it named.
    if (report.proven_dead) continue;
    for (i32 accused = 0; accused < options_.num_ranks; ++accused) {
      const bool named = edges.accused_by[static_cast<size_t>(rank)].has(accused);
      if (!named || reports[static_cast<size_t>(accused)].proven_dead) continue;
      ++proposal.past_edges[rank];
      ++proposal.past_edges[accused];
    }
  }
  memset(proposal.reason, 0, sizeof proposal.reason);
  strncpy(proposal.reason, prospect.reason.c_str(), sizeof proposal.reason - 1);
  apply_change(promised_change(reports, prospect.next), proposal);
  return proposal;
}

// May this rank go for what it accuses those of who stay? Whoever is woken and beats is accused until its accusers have
// looked again: those who did so first stay, and the one who is a moment later would go for having been right.
bool Agreement::may_go_for(const Edges& edges, const std::vector<MemberReport>& reports, i32 accuser,
                           const RankSet& next) const {
  if (!guarded(guard_looked_again) || next.has(accuser) || edges.silent_since.has(accuser)) return true;
  if (reports[static_cast<size_t>(accuser)].proven_dead) return true;
  return (edges.not_looked_again[static_cast<size_t>(accuser)] & next).empty();
}

// Is it too early to let this rank go for a stall that it accuses those of who stay? The first to miss them are those
// who came to wait first. The others, with experts that took longer, have not waited for `stall_ms` yet; and a few
// accusers of more ranks are the smaller choice. Not for one who is accused itself: it may go for that.
bool Agreement::others_may_join(const Edges& edges, i32 accuser, const RankSet& next, i64 now_ns) const {
  if (now_ns - changing_since_ns_ >= options_.patience_ns || next.has(accuser)) return false;
  for (i32 rank = 0; rank < options_.num_ranks; ++rank)
    if (next.has(rank) && edges.accused_by[static_cast<size_t>(rank)].has(accuser)) return false;
  return !(edges.stands_for[static_cast<size_t>(accuser)] & next).empty();
}

Agreement::Prospect Agreement::consider(const std::vector<MemberReport>& reports, const Edges& edges,
                                        const RankSet& proven, i64 now_ns, AgreementStep& out) {
  VerdictInput input;
  input.num_ranks = options_.num_ranks;
  input.members = current_.view.active;
  input.proven_dead = proven;
  input.accused_by = edges.accused_by.data();
  input.past_edges = current_.past_edges;
  input.host_of = options_.host_of.empty() ? nullptr : options_.host_of.data();
  if (guarded(guard_silent_go))
    for (i32 rank = 0; rank < options_.num_ranks; ++rank)
      if (edges.silent_since.has(rank) && reports[static_cast<size_t>(rank)].beat != 0) input.silent.add(rank);
  const Verdict verdict = fa2a::verdict(input);

  Prospect prospect;
  prospect.next = verdict.next;
  prospect.reason = verdict.reason;
  bool all_promised = true;
  i32 num_promised = 0;
  for (i32 rank = 0; rank < options_.num_ranks; ++rank) {
    if (!verdict.next.has(rank)) continue;
    if (rank < options_.rank) ++prospect.place;
    if (has_promised(reports[static_cast<size_t>(rank)])) {
      ++num_promised;
    } else {
      all_promised = false;
      out.waits_for.add(rank);
    }
  }
  // Its promise may be older than what it is accused of: a rank that died in silence since then would be kept, and the
  // only one so far to have found out would go for it. Whoever lives beats again in a moment; whoever does not is
  // waited for, and accused by this rank too.
  const RankSet unheard = edges.silent_since & verdict.next;
  if (guarded(guard_beaten_since)) {
    all_promised &= unheard.empty();
    out.waits_for = out.waits_for | unheard;
  }
  for (i32 rank = 0; rank < options_.num_ranks; ++rank) {
    if (others_may_join(edges, rank, verdict.next, now_ns)) all_promised = false;
    if (may_go_for(edges, reports, rank, verdict.next)) continue;
    all_promised = false;
    out.waits_for.add(rank);  // if it never looks again, it is silent itself
  }
  // A quorum of promises is not enough: a member that has not promised may be starting the round that the others call
  // the next view's first.
  if (!guarded(guard_all_promised)) all_promised = 2 * num_promised > verdict.next.size();

  const RankSet alive = options_.by_windows ? consensus_.living(reports) : current_.view.active.without(proven);
  const bool mine = verdict.next.has(options_.rank);
  // Something is being claimed that is not settled: with nothing proven, wait until it is or until it is withdrawn. Not
  // for ever: accusations that come and go must not hold the group.
  const bool patient = now_ns - changing_since_ns_ < 3 * options_.settle_ns || !edges.any_settled;
  const bool premature = edges.any_unsettled && proven.empty() && patient;
  prospect.ready = all_promised && is_quorum(verdict.next, alive) && mine && !premature;
  if (!prospect.ready)
    ready_since_ns_ = 0;
  else if (ready_since_ns_ == 0)
    ready_since_ns_ = now_ns;
  return prospect;
}

void Agreement::propose_outside(const std::vector<MemberReport>& reports, const Edges& edges, const Prospect& prospect,
                                i64 now_ns, AgreementStep& out) {
  if (!prospect.ready || proposed_ || now_ns - ready_since_ns_ < prospect.place * options_.stagger_ns) return;
  proposed_ = true;
  out.propose = true;
  out.proposal = make_proposal(reports, edges, prospect);
}

// One move a step: what it publishes must be on the page before it counts.
void Agreement::take_ballot_on(const std::vector<MemberReport>& reports, const Edges& edges, const Prospect& prospect,
                               i64 now_ns, AgreementStep& out) {
  switch (consensus_.next(reports)) {
    case ProposerMove::wait:
      if (!prospect.ready || !consensus_.may_begin(prospect.place, ready_since_ns_, now_ns)) return;
      consensus_.begin();
      out.asks = true;
      return;
    case ProposerMove::choose:
      // Free to choose, and what I stood for when I began is gone (a member died since): the ballot waits, as any
      // proposal does, until all is there again.
      if (consensus_.bound_to() == nullptr && !prospect.ready) return;
      consensus_.ask_to_accept(consensus_.bound_to() != nullptr ? Decision(*consensus_.bound_to())
                                                                : make_proposal(reports, edges, prospect));
      out.asks = true;
      return;
    case ProposerMove::decided:
      learn(Decision(consensus_.request().value));
      return;
    case ProposerMove::give_way:
      consensus_.give_way(now_ns);
      return;
  }
}

bool Agreement::hand_out_decision(AgreementStep& out) const {
  if (!has_learned_) return false;
  (learned_.view.active.has(options_.rank) ? out.decided : out.evicted) = true;
  out.decision = learned_;
  return true;
}

AgreementStep Agreement::step(const std::vector<MemberReport>& reports, i64 now_ns) {
  AgreementStep out;
  if (adopt_from_peers(reports, out) || hand_out_decision(out)) return out;
  // Everybody votes: suspended or not, whether it promised to hold its rounds or sees no reason to.
  if (options_.by_windows) out.answered = consensus_.vote(reports, now_ns);
  RankSet proven;
  for (i32 rank = 0; rank < options_.num_ranks; ++rank)
    if (reports[static_cast<size_t>(rank)].proven_dead && current_.view.active.has(rank)) proven.add(rank);
  const Edges edges = read_edges(reports, now_ns);
  const bool promised = promise_.epoch_plus_one == current_.view.epoch + 1;
  if (!promised) {
    out.promise = should_change(reports, edges, proven);
    out.change = change_to_promise(reports);
    if (out.promise && changing_since_ns_ == 0) changing_since_ns_ = now_ns;
    return out;
  }
  if (changing_since_ns_ == 0) changing_since_ns_ = now_ns;
  const Prospect prospect = consider(reports, edges, proven, now_ns, out);
  if (options_.by_windows)
    take_ballot_on(reports, edges, prospect, now_ns, out);
  else
    propose_outside(reports, edges, prospect, now_ns, out);
  if (!hand_out_decision(out)) out.quorum_lost = now_ns - changing_since_ns_ > options_.timeout_ns;
  return out;
}

}  // namespace fa2a
