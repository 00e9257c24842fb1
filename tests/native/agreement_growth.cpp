// How the cost of one view change grows with the group: messages, bytes and time of a rank, for a death that all see.
//
//   agreement_growth [NUM_RANKS...]    one line of JSON each; 8, 32, 96 and 256 unless told
//
// Every rank runs the Agreement of production and takes a turn some time after it is rung, as its pulse would. A page
// is looked at word by word through its versions; a record is read when its version has moved. Reads of one's own page
// are not counted: they are no messages.
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "membership/agreement.hpp"
#include "membership/two_copies.hpp"

using namespace fa2a;

namespace {

constexpr i64 kUs = 1000, kMs = 1000000, kNever = 1ll << 62;
constexpr i64 kWakeUs = 50;  // from a ring to the turn that it brings about

struct Cost {
  u64 turns = 0, page_looks = 0, record_reads = 0, record_bytes = 0, accusation_words = 0;
  u64 stores = 0, stored_bytes = 0, rings = 0;
  double cpu_ms = 0;
};

struct Rank {
  std::unique_ptr<Agreement> agreement;
  std::vector<u64> seen;  // [peer * 4 + record]: the version that was read last
  bool alive = true, knows = false, poke = false, done = false;
  i64 wakes_at = kNever;
  Cost cost;
};

double cpu_ms() {
  timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return 1e3 * static_cast<double>(now.tv_sec) + 1e-6 * static_cast<double>(now.tv_nsec);
}

class Group {
 public:
  explicit Group(i32 num_ranks) : n_(num_ranks), ranks_(static_cast<size_t>(num_ranks)) {
    Decision first;
    first.view.active = RankSet::first(n_);
    for (i32 rank = 0; rank < n_; ++rank) first.view.incarnations[rank] = 1000 + static_cast<u64>(rank);
    for (i32 rank = 0; rank < n_; ++rank) {
      AgreementOptions options;
      options.rank = rank;
      options.num_ranks = n_;
      at(rank).agreement = std::make_unique<Agreement>(options, first);
      at(rank).seen.resize(static_cast<size_t>(n_) * 4);
      pages_.push_back(std::make_unique<ControlPage>());
      fa2a::publish(page(rank).decision, first);
      fa2a::publish(page(rank).acceptor, at(rank).agreement->record());
    }
    // What stands on a page before anything happens was read long ago.
    for (Rank& rank : ranks_)
      for (size_t i = 0; i < rank.seen.size(); i += 4) rank.seen[i + 1] = rank.seen[i + 2] = 1;
  }

  // The highest rank dies at time 0, and the kernel wakes one after the other. Returns when the last has decided.
  i64 run() {
    at(n_ - 1).alive = false;
    for (i32 rank = 0; rank + 1 < n_; ++rank) at(rank).wakes_at = (40 + rank % 8 * 5) * kUs;
    for (i64 now = 0;;) {
      i32 next = -1;
      for (i32 rank = 0; rank < n_; ++rank)
        if (at(rank).wakes_at != kNever && (next < 0 || at(rank).wakes_at < at(next).wakes_at)) next = rank;
      if (next < 0) return -1;
      now = std::max(now, at(next).wakes_at);
      at(next).wakes_at = now + 10 * kMs;  // the next beat
      turn(next, kMs + now);
      bool all_done = true;
      for (i32 rank = 0; rank + 1 < n_; ++rank) all_done &= at(rank).done;
      if (all_done) return now;
    }
  }

  Rank& at(i32 rank) { return ranks_[static_cast<size_t>(rank)]; }

 private:
  ControlPage& page(i32 rank) { return *pages_[static_cast<size_t>(rank)]; }

  void ring(i32 from, i32 to, i64 now) {
    if (from == to || !at(to).alive) return;
    ++at(from).cost.rings;
    at(to).wakes_at = std::min(at(to).wakes_at, now - kMs + kWakeUs * kUs);
  }

  template <class Record>
  void publish(i32 rank, TwoCopies<Record>& shared, const Record& record) {
    fa2a::publish(shared, record);
    ++at(rank).cost.stores;
    at(rank).cost.stored_bytes += sizeof(Record);
  }

  template <class Record>
  const Record* read(i32 reader, i32 owner, i32 which, const TwoCopies<Record>& shared) {
    u64& seen = at(reader).seen[static_cast<size_t>(owner * 4 + which)];
    if (shared.version == 0) return nullptr;
    if (seen != shared.version && reader != owner) {
      ++at(reader).cost.record_reads;
      at(reader).cost.record_bytes += sizeof(Record);
    }
    seen = shared.version;
    return &shared.copies[shared.version % 2];
  }

  std::vector<MemberReport> look(i32 rank) {
    std::vector<MemberReport> reports(static_cast<size_t>(n_));
    for (i32 peer = 0; peer < n_; ++peer) {
      MemberReport& report = reports[static_cast<size_t>(peer)];
      ControlPage& from = page(peer);
      report.proven_dead = report.accused = peer == n_ - 1;
      const Promise* promise = read(rank, peer, 0, from.promise);
      if (promise != nullptr) report.promise = *promise;
      report.accusations = from.accusations;
      report.decision = read(rank, peer, 1, from.decision);
      report.votes = read(rank, peer, 2, from.acceptor);
      report.request = read(rank, peer, 3, from.request);
      if (peer == rank) continue;
      ++at(rank).cost.page_looks;
      at(rank).cost.accusation_words += static_cast<u64>(n_);
    }
    return reports;
  }

  void turn(i32 rank, i64 now) {
    const double begun = cpu_ms();
    Rank& r = at(rank);
    ++r.cost.turns;
    if (!r.knows) {
      r.knows = r.poke = true;
      store_release(&page(rank).accusations[n_ - 1], pack_accusation(0, Evidence::exit));
      ++r.cost.stores;
      r.cost.stored_bytes += sizeof(u64);
    }
    AgreementStep step = r.agreement->step(look(rank), now);
    apply(rank, step, now);
    for (i32 peer = 0; peer < n_ && r.poke; ++peer) ring(rank, peer, now);
    r.poke = false;
    r.cost.cpu_ms += cpu_ms() - begun;
  }

  void apply(i32 rank, const AgreementStep& step, i64 now) {
    Rank& r = at(rank);
    if (step.promise) {
      Promise promise;
      promise.epoch_plus_one = r.agreement->current().view.epoch + 1;
      r.agreement->promised(promise);
      publish(rank, page(rank).promise, promise);
      r.poke = true;
      r.wakes_at = now - kMs + kWakeUs * kUs;
    }
    if (!step.answered.empty() || step.asks) publish(rank, page(rank).acceptor, r.agreement->record());
    if (step.asks) {
      publish(rank, page(rank).request, r.agreement->request());
      r.poke = true;
      r.wakes_at = now - kMs + kWakeUs * kUs;
    }
    for (i32 peer = 0; peer < n_; ++peer)
      if (step.answered.has(peer)) ring(rank, peer, now);
    if (!step.decided) return;
    publish(rank, page(rank).decision, step.decision);
    r.agreement->installed(step.decision);
    publish(rank, page(rank).acceptor, r.agreement->record());
    r.poke = r.done = true;
  }

  i32 n_;
  std::vector<Rank> ranks_;
  std::vector<std::unique_ptr<ControlPage>> pages_;
};

template <class Get>
u64 most(Group& group, i32 num_ranks, Get get) {
  u64 out = 0;
  for (i32 rank = 0; rank < num_ranks; ++rank) out = std::max<u64>(out, get(group.at(rank).cost));
  return out;
}

}  // namespace

int main(int num_arguments, char** arguments) {
  std::vector<i32> sizes = {8, 32, 96, 256};
  if (num_arguments > 1) sizes.clear();
  for (int i = 1; i < num_arguments; ++i) sizes.push_back(atoi(arguments[i]));
  for (i32 n : sizes) {
    if (n < 2 || n > kMaxRanks) return fprintf(stderr, "%d ranks: give 2 to %d\n", n, kMaxRanks), 2;
    Group group(n);
    const i64 decided = group.run();
    if (decided < 0) return fprintf(stderr, "%d ranks never decide\n", n), 1;
    double cpu = 0;
    for (i32 rank = 0; rank < n; ++rank) cpu = std::max(cpu, group.at(rank).cost.cpu_ms);
    auto largest = [&](u64 Cost::* what) { return most(group, n, [what](const Cost& cost) { return cost.*what; }); };
    printf(
        "{\"ranks\": %d, \"turns\": %llu, \"page_looks\": %llu, \"record_reads\": %llu, \"record_bytes\": %llu, "
        "\"accusation_words\": %llu, \"stores\": %llu, \"stored_bytes\": %llu, \"rings\": %llu, "
        "\"decided_ms\": %.3f, \"cpu_ms\": %.3f}\n",
        n, largest(&Cost::turns), largest(&Cost::page_looks), largest(&Cost::record_reads),
        largest(&Cost::record_bytes), largest(&Cost::accusation_words), largest(&Cost::stores),
        largest(&Cost::stored_bytes), largest(&Cost::rings), 1e-6 * static_cast<double>(decided), cpu);
  }
  return 0;
}
