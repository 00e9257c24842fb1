// Whole groups of Agreement through many epochs, on a seeded schedule: ranks die between any two stores, stop and wake,
// accuse one another falsely and take it back, and read pages late. One view an epoch, and in the end all that live
// agree.
//
//   agreement_schedules [NUM_SCHEDULES [FIRST_SEED [GUARD]]]    GUARD is out: ends with 3 when something went wrong
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

struct SimRank {
  std::unique_ptr<Agreement> agreement;
  std::vector<PageCopies> copies;
  RankSet known_dead, accuses;
  Promise promise;
  bool alive = true, evicted = false, ever_suspended = false;
  i64 stopped_until_ns = 0;
  u64 started = 0, announced_epoch = 0;
};

struct Group {
  i32 n;
  std::mt19937_64 dice;
  std::vector<std::unique_ptr<ControlPage>> pages;
  std::vector<SimRank> ranks;
  std::map<u64, Decision> decided;               // by epoch
  std::map<u64, std::vector<Promise>> promises;  // by epoch, of each rank
  i64 now_ns = kMs;
  i32 crashes_left = 0;
  bool calm = false;  // nobody fails any more
  u64 num_turns = 0, num_decided = 0, num_crashed_mid_turn = 0, num_suspended = 0;
  const char* wrong = nullptr;

  Group(i32 num_ranks, u64 seed) : n(num_ranks), dice(seed) {
    Decision first;
    first.view.active = RankSet::first(n);
    for (i32 rank = 0; rank < n; ++rank) first.view.incarnations[rank] = 1000 + static_cast<u64>(rank);
    decided[0] = first;
    crashes_left = static_cast<i32>(below(static_cast<u64>(n)));
    for (i32 rank = 0; rank < n; ++rank) {
      AgreementOptions options;
      options.rank = rank;
      options.num_ranks = n;
      options.settle_ns = 5 * kMs;
      options.timeout_ns = 200 * kMs;
      options.stagger_ns = 2 * kMs;
      SimRank r;
      r.agreement = std::make_unique<Agreement>(options, first);
      r.copies.resize(static_cast<size_t>(n));
      pages.push_back(std::make_unique<ControlPage>());
      publish(page(rank).decision, first);
      publish(page(rank).acceptor, r.agreement->record());
      ranks.push_back(std::move(r));
    }
  }

  u64 below(u64 limit) { return dice() % limit; }
  bool chance(u64 one_in) { return !calm && below(one_in) == 0; }
  ControlPage& page(i32 rank) { return *pages[static_cast<size_t>(rank)]; }
  SimRank& at(i32 rank) { return ranks[static_cast<size_t>(rank)]; }

  // Between any two stores of a turn. True: the rank is gone and stores nothing more.
  bool dies(i32 rank) {
    if (crashes_left == 0 || !chance(40)) return false;
    --crashes_left;
    ++num_crashed_mid_turn;
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

  void look(i32 rank) {
    SimRank& r = at(rank);
    const Decision& current = r.agreement->current();
    for (i32 peer = 0; peer < n; ++peer) {
      if (peer == rank || !current.view.active.has(peer)) continue;
      if (!at(peer).alive && (calm || below(3) == 0)) r.known_dead.add(peer);
      const bool stopped = at(peer).stopped_until_ns > now_ns;
      // Suspected while stopped, or for no reason; what moves again is taken back.
      if (!r.known_dead.has(peer) && ((stopped && chance(8)) || chance(400))) r.accuses.add(peer);
      if (r.accuses.has(peer) && !stopped && at(peer).alive && (calm || below(6) == 0)) r.accuses.remove(peer);
      const Evidence kind = r.known_dead.has(peer) ? Evidence::exit
                            : r.accuses.has(peer)  ? Evidence::silence
                                                   : Evidence::none;
      store_release(&page(rank).accusations[peer],
                    kind == Evidence::none ? 0 : pack_accusation(current.view.epoch, kind));
    }
  }

  std::vector<MemberReport> read(i32 rank) {
    std::vector<MemberReport> reports(static_cast<size_t>(n));
    for (i32 peer = 0; peer < n; ++peer) {
      MemberReport& report = reports[static_cast<size_t>(peer)];
      report.proven_dead = at(rank).known_dead.has(peer);
      report.accused = at(rank).accuses.has(peer) || report.proven_dead;
      if (peer != rank && !report.proven_dead && chance(10)) continue;  // not readable this turn
      read_page(page(peer), /*by_windows=*/true, at(rank).copies[static_cast<size_t>(peer)], report);
    }
    return reports;
  }

  void check(const Decision& decision) {
    const u64 epoch = decision.view.epoch;
    const auto [found, is_new] = decided.emplace(epoch, decision);
    num_decided += is_new ? 1 : 0;
    if (memcmp(&found->second, &decision, sizeof decision) != 0) wrong = "two views of one epoch";
    for (i32 rank = 0; rank < n && is_new; ++rank) {
      if (!decision.view.active.has(rank)) continue;
      const auto& given = promises[epoch - 1];
      if (given.empty() || given[static_cast<size_t>(rank)].epoch_plus_one == 0)
        wrong = "a view with a member that never promised";
      else if (promised_round(given[static_cast<size_t>(rank)]) > decision.view.first_round)
        wrong = "a view that begins in a round which a member has started";
    }
  }

  void turn(i32 rank) {
    ++num_turns;
    store_release(&page(rank).process_beat, static_cast<u64>(now_ns));
    SimRank& r = at(rank);
    look(rank);
    AgreementStep step = r.agreement->step(read(rank), now_ns);
    if (step.promise) {
      const View& view = r.agreement->current().view;
      r.started += below(3);
      r.promise.epoch_plus_one = view.epoch + 1;
      r.promise.limit = r.promise.started = std::max(r.started, view.first_round);
      r.agreement->promised(r.promise);
      auto& given = promises[view.epoch];
      given.resize(static_cast<size_t>(n));
      given[static_cast<size_t>(rank)] = r.promise;
      if (!publish_or_die(rank, page(rank).promise, r.promise)) return;
    }
    if (!step.answered.empty() || step.asks)
      if (!publish_or_die(rank, page(rank).acceptor, r.agreement->record())) return;
    if (step.asks)
      if (!publish_or_die(rank, page(rank).request, r.agreement->request())) return;
    if (step.quorum_lost && !r.ever_suspended) ++num_suspended, r.ever_suspended = true;
    if (!step.evicted && !step.decided) return;
    check(step.decision);
    if (r.announced_epoch != step.decision.view.epoch)
      if (!publish_or_die(rank, page(rank).decision, step.decision)) return;
    r.announced_epoch = step.decision.view.epoch;
    r.evicted = step.evicted;
    if (step.evicted || chance(3)) return;  // the device may keep the install waiting
    r.started = std::max(r.started, step.decision.view.first_round);
    r.accuses = RankSet();
    r.agreement->installed(step.decision);
    publish_or_die(rank, page(rank).acceptor, r.agreement->record());
  }

  void run(i32 num_steps) {
    for (i32 i = 0; i < num_steps && wrong == nullptr; ++i) {
      now_ns += static_cast<i64>(below(kMs));
      const i32 rank = static_cast<i32>(below(static_cast<u64>(n)));
      SimRank& r = at(rank);
      if (!r.alive || r.evicted || r.stopped_until_ns > now_ns) continue;
      if (chance(60)) r.stopped_until_ns = now_ns + static_cast<i64>(below(100)) * kMs;
      if (!dies(rank)) turn(rank);
    }
  }

  // Everybody who lives is in one view that holds nobody else, or knows that it is out.
  void check_end() {
    if (wrong != nullptr) return;
    RankSet living, inside;
    const Decision* newest = nullptr;
    for (i32 rank = 0; rank < n; ++rank) {
      if (!at(rank).alive) continue;
      living.add(rank);
      if (at(rank).evicted) continue;
      inside.add(rank);
      const Decision& current = at(rank).agreement->current();
      if (newest != nullptr && newest->view.epoch != current.view.epoch) wrong = "living members in different epochs";
      newest = &current;
    }
    if (living.empty()) return;
    if (newest == nullptr) {
      // Whoever was in the newest view may be dead, all of them: then the rest is rightly out.
      if (!(decided.rbegin()->second.view.active & living).empty())
        wrong = "a member of the newest view thinks it is out";
    } else if (newest->view.active != inside) {
      wrong = "the last view is not what lives";
    }
  }
};

}  // namespace

int main(int num_arguments, char** arguments) {
  const u64 num_schedules = num_arguments > 1 ? strtoull(arguments[1], nullptr, 10) : kSanitized ? 20 : 150;
  const u64 first_seed = num_arguments > 2 ? strtoull(arguments[2], nullptr, 10) : 1;
  if (num_arguments > 3 && !take_out(arguments[3])) return fprintf(stderr, "no guard is called %s\n", arguments[3]), 2;
  u64 num_turns = 0, num_decided = 0, num_mid_turn = 0, num_suspended = 0, most_epochs = 0;
  for (u64 seed = first_seed; seed < first_seed + num_schedules; ++seed) {
    Group group(2 + static_cast<i32>(seed % 5), seed);
    group.run(1500);
    group.calm = true;
    for (SimRank& rank : group.ranks) rank.stopped_until_ns = 0;
    group.run(3000);
    group.check_end();
    if (group.wrong != nullptr) {
      printf("seed %llu (%d ranks): %s\n", seed, group.n, group.wrong);
      return 3;
    }
    num_turns += group.num_turns, num_decided += group.num_decided, num_mid_turn += group.num_crashed_mid_turn;
    num_suspended += group.num_suspended;
    most_epochs = std::max(most_epochs, group.decided.rbegin()->first);
  }
  printf(
      "%llu schedules from seed %llu: %llu turns, %llu views, at most %llu in a row, %llu deaths in mid-turn, "
      "%llu ranks suspended for a while; one view an epoch, and the living always agreed\n",
      num_schedules, first_seed, num_turns, num_decided, most_epochs, num_mid_turn, num_suspended);
  return num_decided > 0 ? 0 : 1;
}
