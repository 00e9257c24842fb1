// One rank's agreement on made-up reports: of which age is an accusation that a rank finds when it wakes in mid-turn?
//
//   followed [without]    without the guard `found_first`
//
// Rank 0 has read the beats, is stopped, and so is rank 1, a little later. Rank 2 misses rank 1 and says so. Rank 0
// wakes, goes on with its turn, and finds that. Which of the two is left out?
#include <stdio.h>

#include <memory>

#include "membership/agreement.hpp"

using namespace fa2a;

namespace {

constexpr i64 kMs = 1000000;
constexpr i32 kAccused = 1, kAccuser = 2, kNumRanks = 3;

class Reader {
 public:
  Reader() {
    AgreementOptions options;
    options.num_ranks = kNumRanks;
    options.by_windows = false;  // its proposal is seen, and nobody's vote is needed
    Decision first;
    first.view.active = RankSet::first(kNumRanks);
    agreement_ = std::make_unique<Agreement>(options, first);
    for (MemberReport& report : reports_) report.accusations = nobody_, report.beat = 1;
    row_[kAccused] = pack_accusation(0, Evidence::silence);
    reports_[kAccuser].accusations = row_;
  }

  void beats(i32 rank) { ++reports_[static_cast<size_t>(rank)].beat; }

  // One turn. Every rank gives its promise as soon as this one does.
  AgreementStep turn(i64 now_ns) {
    AgreementStep step = agreement_->step(reports_, now_ns);
    if (!step.promise) return step;
    Promise promise;
    promise.epoch_plus_one = 1, promise.limit = promise.started = 5;
    agreement_->promised(promise);
    for (MemberReport& report : reports_) report.promise = promise;
    return step;
  }

 private:
  u64 nobody_[kMaxRanks] = {}, row_[kMaxRanks] = {};
  std::vector<MemberReport> reports_ = std::vector<MemberReport>(kNumRanks);
  std::unique_ptr<Agreement> agreement_;
};

}  // namespace

int main(int argc, char**) {
  if (argc > 1) guards_off |= 1ull << guard_found_first;
  auto reader = std::make_unique<Reader>();
  reader->turn(100 * kMs);  // that of the beats before the stop
  reader->beats(kAccused);  // once more before it was stopped itself
  for (i64 now_ms = 2000; now_ms < 4000; now_ms += 10) {
    reader->beats(kAccuser);
    const AgreementStep step = reader->turn(now_ms * kMs);
    if (!step.propose) continue;
    const bool accused_goes = !step.proposal.view.active.has(kAccused);
    printf("the %s goes, after %lld ms\n", accused_goes ? "accused" : "accuser", static_cast<long long>(now_ms - 2000));
    return accused_goes ? 0 : 3;
  }
  printf("nothing is proposed\n");
  return 1;
}
