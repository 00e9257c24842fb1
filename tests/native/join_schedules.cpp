// Whole groups of Agreement in which lives begin and members leave at step starts, on a seeded schedule: ranks die and
// stop between any two stores, come to a step start early or late, hold and give up holding, and read pages late.
//
//   join_schedules [NUM_SCHEDULES [FIRST_SEED [GUARD]]]    GUARD is out: ends with 3 when something went wrong
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <memory>
#include <random>
#include <vector>

#include "membership/pulse.hpp"
#include "tests/native/guard_names.hpp"
#include "tests/native/sanitized.hpp"

using namespace fa2a;

namespace {

constexpr i64 kMs = 1000000;
constexpr u64 kRoundsPerStep = 3;
constexpr u64 kNoRound = ~0ull;

struct SimRank {
  std::unique_ptr<Agreement> agreement;
  std::shared_ptr<ControlPage> page;                 // of this life
  std::vector<std::shared_ptr<ControlPage>> mapped;  // what this rank has where each rank's page is
  std::vector<PageCopies> copies;
  RankSet known_dead;
  Promise promise;
  u64 incarnation = 0, started = 0, announced_epoch = 0, filled_for = kNoRound;
  bool alive = true, joining = false, out = false, wants_to_leave = false;
  bool holds = false, committed = false;  // at the step start of round `started`
  StepChange held;
  StepHold published;
  i64 stopped_until_ns = 0;
};

struct Group {
  i32 n;
  std::mt19937_64 dice;
  std::vector<SimRank> ranks;
  std::map<u64, Decision> decided;
  i64 now_ns = kMs;
  bool calm = false;
  i32 deaths_left = 0;
  u64 next_incarnation = 5000, num_joined = 0, num_left = 0, num_deaths = 0, num_vain = 0;
  const char* wrong = nullptr;

  Group(i32 num_ranks, u64 seed) : n(num_ranks), dice(seed) {
    Decision first;
    first.view.active = RankSet::first(n);
    for (i32 rank = 0; rank < n; ++rank) {
      first.view.incarnations[rank] = 1000 + static_cast<u64>(rank);
      first.view.partitions[rank] = static_cast<u16>(rank);
    }
    decided[0] = first;
    deaths_left = 1 + static_cast<i32>(below(4));
    for (i32 rank = 0; rank < n; ++rank) {
      ranks.emplace_back();
      begin_life(rank, first, first.view.incarnations[rank]);
    }
    for (SimRank& rank : ranks)
      for (i32 peer = 0; peer < n; ++peer) rank.mapped[static_cast<size_t>(peer)] = at(peer).page;
  }

  u64 below(u64 limit) { return dice() % limit; }
  bool chance(u64 one_in) { return !calm && below(one_in) == 0; }
  ControlPage& page(i32 rank) { return *at(rank).page; }
  SimRank& at(i32 rank) { return ranks[static_cast<size_t>(rank)]; }

  void begin_life(i32 rank, const Decision& view, u64 incarnation) {
    SimRank fresh;
    fresh.incarnation = incarnation;
    fresh.joining = !view.view.active.has(rank);
    fresh.copies.resize(static_cast<size_t>(n));
    fresh.page = std::make_shared<ControlPage>();
    fresh.page->incarnation = incarnation;
    fresh.mapped.assign(static_cast<size_t>(n), fresh.page);
    at(rank) = std::move(fresh);
    set_base(rank, view);
    if (!at(rank).joining) publish(page(rank).decision, view);
  }

  void set_base(i32 rank, const Decision& view) {
    AgreementOptions options;
    options.rank = rank;
    options.num_ranks = n;
    options.num_partitions = n + 1;
    options.settle_ns = 5 * kMs;
    options.timeout_ns = 200 * kMs;
    options.stagger_ns = 2 * kMs;
    Decision base = view;
    base.view.incarnations[rank] = at(rank).incarnation;
    at(rank).agreement = std::make_unique<Agreement>(options, base);
    at(rank).announced_epoch = view.view.epoch;
    publish(page(rank).acceptor, at(rank).agreement->record());
    if (!at(rank).joining) return;
    for (i32 peer = 0; peer < n; ++peer) map(rank, peer);
  }

  // A member keeps the page of a life that is in its view, however long that is gone: its record may have to be
  // counted, and its decision read.
  void map(i32 rank, i32 peer) {
    SimRank& r = at(rank);
    const auto p = static_cast<size_t>(peer);
    if (peer == rank || at(peer).page == nullptr || r.mapped[p] == at(peer).page) return;
    r.mapped[p] = at(peer).page;
    r.copies[p] = PageCopies();
    r.known_dead.remove(peer);
  }
  bool has_promised_for(i32 rank, i32 peer) {
    return at(rank).committed && at(rank).held.rank == static_cast<u64>(peer) && guarded(guard_visitor_kept);
  }
  const ControlPage& seen(i32 rank, i32 peer) { return *at(rank).mapped[static_cast<size_t>(peer)]; }

  // Between any two stores. Somebody of the newest view stays, or there is nothing to come back to.
  bool dies(i32 rank) {
    if (deaths_left == 0 || !chance(60)) return false;
    bool others = false;
    for (i32 peer = 0; peer < n; ++peer)
      others |= peer != rank && at(peer).alive && !at(peer).joining && !at(peer).wants_to_leave &&
                decided.rbegin()->second.view.active.has(peer);
    if (!others) return false;
    --deaths_left;
    ++num_deaths;
    at(rank).alive = false;
    return true;
  }

  template <class Record>
  bool publish_or_die(i32 rank, TwoCopies<Record>& shared, const Record& record) {
    publish_half(shared, record, false);
    if (dies(rank)) return false;
    publish_half(shared, record, true);
    return !dies(rank);
  }

  const View& view_of(i32 rank) { return at(rank).agreement->current().view; }

  std::vector<MemberReport> read(i32 rank) {
    std::vector<MemberReport> reports(static_cast<size_t>(n));
    SimRank& r = at(rank);
    for (i32 peer = 0; peer < n; ++peer) {
      if (!view_of(rank).active.has(peer) && !has_promised_for(rank, peer)) map(rank, peer);
      const bool is_gone = !at(peer).alive || r.mapped[static_cast<size_t>(peer)] != at(peer).page;
      if (peer != rank && is_gone && view_of(rank).active.has(peer) && (calm || below(3) == 0)) r.known_dead.add(peer);
      MemberReport& report = reports[static_cast<size_t>(peer)];
      report.proven_dead = report.accused = r.known_dead.has(peer);
      if (peer != rank && !report.proven_dead && chance(10)) continue;
      read_page(seen(rank, peer), /*by_windows=*/true, r.copies[static_cast<size_t>(peer)], report);
    }
    return reports;
  }

  StepChange visible_change(i32 rank) {
    const View& view = view_of(rank);
    for (i32 other = 0; other < n; ++other) {
      SimRank& o = at(other);
      if (view.active.has(other) && o.alive && o.wants_to_leave && view.active.size() > 1)
        return {ChangeKind::leave, static_cast<u64>(other), view.incarnations[other]};
      if (!view.active.has(other) && o.alive && o.joining && page(other).ready_for == view.epoch + 1)
        return {ChangeKind::join, static_cast<u64>(other), o.incarnation};
    }
    return StepChange();
  }

  // The caller's thread: one thing a call.
  void run_rounds(i32 rank) {
    SimRank& r = at(rank);
    if (r.joining || r.out || r.committed) return;
    const View& view = view_of(rank);
    bool somebody_passed = false, all_closed = true;
    for (i32 peer = 0; peer < n; ++peer) {
      if (!view.active.has(peer) || peer == rank) continue;
      somebody_passed |= at(peer).started > r.started && at(peer).incarnation == view.incarnations[peer];
      all_closed &= at(peer).started >= r.started || r.known_dead.has(peer);
    }
    if (r.holds && (somebody_passed || chance(30)))
      r.holds = false, ++num_vain;  // gives up, and goes on
    else if (r.holds)
      return;
    else if (all_closed && r.started % kRoundsPerStep == 0 && r.started >= view.first_round && below(8) != 0) {
      const StepChange change = visible_change(rank);
      if (change.kind != ChangeKind::none && !somebody_passed) {
        r.holds = true;
        r.held = change;
        return;
      }
    }
    const bool gate = r.promise.epoch_plus_one != view.epoch + 1 || r.started < r.promise.limit;
    if (all_closed && gate && (r.known_dead & view.active).empty()) ++r.started;
  }

  bool update_hold(i32 rank) {
    SimRank& r = at(rank);
    StepHold next;
    if (r.committed) next = r.published;
    if (r.holds && r.held == visible_change(rank)) next = {view_of(rank).epoch + 1, r.started, 0, r.held};
    if (r.holds && next.epoch_plus_one == 0) r.holds = false;
    if (next == r.published) return true;
    r.published = next;
    return publish_or_die(rank, page(rank).hold, next);
  }

  void check(const Decision& decision) {
    const u64 epoch = decision.view.epoch;
    const auto [found, is_new] = decided.emplace(epoch, decision);
    if (memcmp(&found->second, &decision, sizeof decision) != 0) wrong = "two views of one epoch";
    if (!is_new || epoch == 0 || decided.count(epoch - 1) == 0) return;
    const View& before = decided[epoch - 1].view;
    const View& view = decision.view;
    for (i32 rank = 0; rank < n; ++rank) {
      const bool stays = view.active.has(rank) && before.active.has(rank);
      if (stays && at(rank).incarnation == view.incarnations[rank] && at(rank).started > view.first_round)
        wrong = "a view that begins in a round which a member has started";
      if (!view.active.has(rank) || before.active.has(rank)) continue;
      ++num_joined;
      if (view.first_round % kRoundsPerStep != 0) wrong = "a newcomer in the midst of a step";
      if (at(rank).incarnation == view.incarnations[rank] && at(rank).filled_for != view.first_round)
        wrong = "a newcomer whose window is not ready";
      for (i32 other = 0; other < n; ++other)
        if (other != rank && view.active.has(other) && view.partitions[other] == view.partitions[rank])
          wrong = "two members with one partition";
    }
    for (i32 rank = 0; rank < n; ++rank)
      if (before.active.has(rank) && !view.active.has(rank) && at(rank).alive && at(rank).wants_to_leave) ++num_left;
  }

  void turn_of_newcomer(i32 rank) {
    SimRank& r = at(rank);
    const Decision* newest = nullptr;
    for (i32 peer = 0; peer < n; ++peer) {
      auto& copy = r.copies[static_cast<size_t>(peer)].decision;
      if (peer == rank || chance(10) || !copy.newest(seen(rank, peer).decision)) continue;
      if (newest == nullptr || copy.record.view.epoch > newest->view.epoch) newest = &copy.record;
    }
    if (newest == nullptr) return;
    if (newest->view.epoch > view_of(rank).epoch) {
      if (newest->view.incarnations[rank] == r.incarnation) {
        r.joining = false;
        if (!newest->view.active.has(rank)) return void(r.out = true);
        const Decision decision = *newest;
        r.started = decision.view.first_round;
        set_base(rank, decision);
        publish(page(rank).decision, decision);
        publish(page(rank).hold, StepHold());
        return;
      }
      set_base(rank, *newest);
      store_release(&page(rank).ready_for, 0);
      r.filled_for = kNoRound;
      return;
    }
    store_release(&page(rank).ready_for, view_of(rank).epoch + 1);
    const StepChange me{ChangeKind::join, static_cast<u64>(rank), r.incarnation};
    u64 round = kNoRound;
    for (i32 peer = 0; peer < n; ++peer) {
      if (!view_of(rank).active.has(peer)) continue;
      auto& copy = r.copies[static_cast<size_t>(peer)].hold;
      if (!copy.newest(seen(rank, peer).hold)) return;
      const StepHold& hold = copy.record;
      if (!(hold.change == me) || hold.epoch_plus_one != view_of(rank).epoch + 1) return;
      if (round != kNoRound && hold.round != round) return;
      round = hold.round;
    }
    if (round == r.filled_for) return;
    r.filled_for = round;
    publish_or_die(rank, page(rank).hold, StepHold{view_of(rank).epoch + 1, round, 0, me});
  }

  void turn(i32 rank) {
    SimRank& r = at(rank);
    if (r.joining) return turn_of_newcomer(rank);
    if (!update_hold(rank)) return;
    AgreementStep step = r.agreement->step(read(rank), now_ns);
    const bool is_for_change = step.change.kind != ChangeKind::none && r.holds && r.held == step.change;
    if (is_for_change) r.holds = false, r.committed = true;
    if (step.promise || is_for_change) {
      const View& view = view_of(rank);
      r.promise = Promise();
      r.promise.epoch_plus_one = view.epoch + 1;
      r.promise.limit = r.promise.started = std::max(r.started, view.first_round);
      if (is_for_change) r.promise.change = step.change;
      r.agreement->promised(r.promise);
      if (!publish_or_die(rank, page(rank).promise, r.promise)) return;
    }
    if (!step.answered.empty() || step.asks)
      if (!publish_or_die(rank, page(rank).acceptor, r.agreement->record())) return;
    if (step.asks)
      if (!publish_or_die(rank, page(rank).request, r.agreement->request())) return;
    if (!step.evicted && !step.decided) return;
    if (step.decided || step.decision.view.epoch == view_of(rank).epoch + 1) check(step.decision);
    if (r.announced_epoch != step.decision.view.epoch)
      if (!publish_or_die(rank, page(rank).decision, step.decision)) return;
    r.announced_epoch = step.decision.view.epoch;
    r.out = step.evicted;
    if (step.evicted) return;
    r.committed = false;
    r.agreement->installed(step.decision);
    publish_or_die(rank, page(rank).acceptor, r.agreement->record());
  }

  void run(i32 num_steps) {
    for (i32 i = 0; i < num_steps && wrong == nullptr; ++i) {
      now_ns += static_cast<i64>(below(kMs));
      const i32 rank = static_cast<i32>(below(static_cast<u64>(n)));
      SimRank& r = at(rank);
      // A place that the newest view leaves empty is taken by a new life.
      const Decision& newest = decided.rbegin()->second;
      if ((!r.alive || r.out) && !newest.view.active.has(rank) && below(20) == 0) {
        begin_life(rank, newest, ++next_incarnation);
        continue;
      }
      if (!r.alive || r.out || r.stopped_until_ns > now_ns) continue;
      if (chance(80)) r.stopped_until_ns = now_ns + static_cast<i64>(below(30)) * kMs;
      if (!r.joining && chance(500) && deaths_left < 3) r.wants_to_leave = true;
      if (dies(rank)) continue;
      if (below(2) == 0)
        run_rounds(rank);
      else
        turn(rank);
    }
  }

  // In the calm everybody comes back: nothing that happened may have closed the door.
  void check_end() {
    const View& view = decided.rbegin()->second.view;
    if (wrong == nullptr && view.active.size() != n) wrong = "somebody who may come in did not";
  }
};

}  // namespace

int main(int num_arguments, char** arguments) {
  const u64 num_schedules = num_arguments > 1 ? strtoull(arguments[1], nullptr, 10) : kSanitized ? 15 : 100;
  const u64 first_seed = num_arguments > 2 ? strtoull(arguments[2], nullptr, 10) : 1;
  if (num_arguments > 3 && !take_out(arguments[3])) return fprintf(stderr, "no guard is called %s\n", arguments[3]), 2;
  u64 num_joined = 0, num_left = 0, num_deaths = 0, num_vain = 0, num_views = 0;
  for (u64 seed = first_seed; seed < first_seed + num_schedules; ++seed) {
    Group group(2 + static_cast<i32>(seed % 4), seed);
    group.run(3000);
    group.calm = true;
    for (SimRank& rank : group.ranks) rank.stopped_until_ns = 0, rank.wants_to_leave = false;
    group.run(6000);
    group.check_end();
    if (group.wrong != nullptr) {
      printf("seed %llu (%d ranks): %s\n", seed, group.n, group.wrong);
      return 3;
    }
    num_joined += group.num_joined, num_left += group.num_left, num_deaths += group.num_deaths;
    num_vain += group.num_vain, num_views += group.decided.size();
  }
  printf(
      "%llu schedules from seed %llu: %llu views, %llu lives began, %llu members left as planned, %llu deaths, "
      "%llu holds in vain; one view an epoch, every life began at a step start, and all came back\n",
      num_schedules, first_seed, num_views, num_joined, num_left, num_deaths, num_vain);
  return num_joined > 0 && num_left > 0 ? 0 : 1;
}
