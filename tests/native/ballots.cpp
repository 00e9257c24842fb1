// Every schedule of agreement for two and three members, within a bound of ballots and of crashes, which come between
// any two stores: no two views are ever decided, and whoever lives and is a quorum decides. Then one schedule of five
// by name, and many of five at random.
//
//   ballots                 what CI walks; deeper with `ballots deep`
//   ballots without GUARD   the same with a guard out: ends with 3 when two views were decided
#include <stdio.h>
#include <string.h>

#include <random>
#include <string>
#include <unordered_set>

#include "tests/native/ballot_model.hpp"
#include "tests/native/guard_names.hpp"
#include "tests/native/sanitized.hpp"

using namespace fa2a;
using namespace fa2a::model;

namespace {

struct Fingerprint {
  u64 low, high;
  bool operator==(const Fingerprint& other) const { return low == other.low && high == other.high; }
};
struct FirstHalf {
  size_t operator()(const Fingerprint& print) const { return static_cast<size_t>(print.low); }
};

// 128 bits of mixed words: two of ten million states share one with a chance of 1e-24.
struct Mixer {
  Fingerprint print{0x9e3779b97f4a7c15ull, 0xc2b2ae3d27d4eb4full};
  void add(const void* from, size_t num_bytes) {
    const auto* words = static_cast<const u64*>(from);
    for (size_t i = 0; i < num_bytes / sizeof(u64); ++i) {
      print.low = (print.low ^ words[i]) * 0xff51afd7ed558ccdull;
      print.low ^= print.low >> 32;
      print.high = (print.high + words[i]) * 0xc4ceb9fe1a85ec53ull;
      print.high ^= print.high >> 29;
    }
  }
};

Fingerprint fingerprint(const State& state, i32 num_ranks) {
  static_assert(sizeof(Rank) % sizeof(u64) == 0, "hashed as words");
  Mixer mixer;
  for (i32 rank = 0; rank < num_ranks; ++rank) {
    const Rank& r = state.ranks[rank];
    // Nobody can tell how often a record was published, nor, with the guard, what the other copy holds.
    mixer.add(&visible(r), sizeof(Record));
    if (!guarded(guard_record_before_answer)) mixer.add(&r.page.copies[(r.page.version + 1) % 2], sizeof(Record));
    mixer.add(&r.request, sizeof(Rank) - sizeof r.page);
  }
  mixer.add(&state.num_crashes, sizeof state.num_crashes);
  return mixer.print;
}

struct Found {
  u64 num_states = 0;
  u64 num_decisions = 0;
  u64 num_completions = 0;
  bool two_views = false;
  bool stuck = false;
};

// One view for all, whoever finds it out.
bool is_torn(const State& state, i32 num_ranks) {
  u64 value = 0;
  for (i32 rank = 0; rank < num_ranks; ++rank) {
    const u64 decision = state.ranks[rank].decision;
    if (decision == 0) continue;
    if (value != 0 && value != decision) return true;
    value = decision;
  }
  return false;
}

void finish_stores(State& state, const Bounds& bounds, i32 rank) {
  while (can(state, bounds, {Kind::publish, rank})) take(state, bounds, {Kind::publish, rank});
}

// From here on nobody fails and nobody but `stopped` is slow, and one rank after the other tries: does the group
// decide?
bool decides(State state, Bounds bounds, i32 stopped) {
  const i32 n = bounds.num_ranks;
  for (i32 turn = 0; turn < 8 * n; ++turn) {
    for (i32 rank = 0; rank < n; ++rank) {
      Rank& r = state.ranks[rank];
      if (r.dead != 0 || rank == stopped) continue;
      finish_stores(state, bounds, rank);
      for (i32 peer = 0; peer < n; ++peer) {
        if (peer != stopped && state.ranks[peer].decision != 0) return true;
        if (can(state, bounds, {Kind::serve, rank, peer})) take(state, bounds, {Kind::serve, rank, peer});
        finish_stores(state, bounds, rank);
      }
      const bool mine = turn / 8 == rank;
      bounds.num_ballots[rank] = mine ? ~0ull : 0;
      if (can(state, bounds, {Kind::begin, rank})) take(state, bounds, {Kind::begin, rank});
      finish_stores(state, bounds, rank);
      for (i32 peer = 0; peer < n; ++peer)
        if (can(state, bounds, {Kind::read, rank, peer})) take(state, bounds, {Kind::read, rank, peer});
      if (can(state, bounds, {Kind::advance, rank})) take(state, bounds, {Kind::advance, rank});
      if (r.decision != 0) return true;
    }
  }
  return false;
}

bool must_decide(const State& state, const Bounds& bounds, i32 stopped) {
  RankSet living, going;
  for (i32 rank = 0; rank < bounds.num_ranks; ++rank) {
    if (state.ranks[rank].dead != 0) continue;
    living.add(rank);
    if (rank != stopped) going.add(rank);
  }
  return is_quorum(going, living);
}

// `share`: of how many states one is run to its end.
void walk(const Bounds& bounds, bool until_found, u64 share, Found& found) {
  std::unordered_set<Fingerprint, FirstHalf> seen;
  std::vector<State> stack{first_state(bounds)};
  std::vector<Step> steps;
  seen.insert(fingerprint(stack[0], bounds.num_ranks));
  while (!stack.empty()) {
    const State state = stack.back();
    stack.pop_back();
    ++found.num_states;
    for (i32 stopped = -1; stopped < bounds.num_ranks && found.num_states % share == 0; ++stopped) {
      if (!must_decide(state, bounds, stopped) || (stopped >= 0 && state.ranks[stopped].dead != 0)) continue;
      ++found.num_completions;
      if (!decides(state, bounds, stopped)) found.stuck = true;
    }
    steps_of(state, bounds, steps);
    for (const Step& step : steps) {
      State next = state;
      if (take(next, bounds, step) != 0) ++found.num_decisions;
      if (is_torn(next, bounds.num_ranks)) {
        found.two_views = true;
        if (until_found) return;
      }
      if (seen.insert(fingerprint(next, bounds.num_ranks)).second) stack.push_back(next);
    }
  }
}

Bounds bounds_of(i32 num_ranks, std::vector<u64> num_ballots, u64 num_crashes) {
  Bounds out;
  out.adopting = num_ranks == 2;
  out.num_ranks = num_ranks;
  out.num_crashes = num_crashes;
  for (size_t i = 0; i < kMost; ++i) out.num_ballots[i] = i < num_ballots.size() ? num_ballots[i] : 0;
  return out;
}

bool explore(const Bounds& bounds, u64 share) {
  Found found;
  walk(bounds, false, share, found);
  printf("%d members, ballots", bounds.num_ranks);
  for (i32 rank = 0; rank < bounds.num_ranks; ++rank) printf(" %llu", bounds.num_ballots[rank]);
  printf(", %llu crashes: %llu states, %llu decisions, %llu runs to the end; two views: %s, stuck: %s\n",
         bounds.num_crashes, found.num_states, found.num_decisions, found.num_completions,
         found.two_views ? "YES" : "never", found.stuck ? "YES" : "never");
  fflush(stdout);
  // A model in which nobody ever decides would be clean too.
  return !found.two_views && !found.stuck && found.num_decisions > 0;
}

// Takes the steps it is told, in the five-member schedule.
struct Script {
  State state;
  Bounds bounds;
  bool possible = true;

  void take_one(Kind kind, i32 rank, i32 peer = 0) {
    if (!can(state, bounds, {kind, rank, peer})) possible = false;
    if (possible) take(state, bounds, {kind, rank, peer});
    finish_stores(state, bounds, rank);
  }
  // `rank` asks, `living` answer, and it reads `all`; then it counts.
  void ask(i32 rank, const std::vector<i32>& living, const std::vector<i32>& all) {
    for (i32 peer : living)
      if (can(state, bounds, {Kind::serve, peer, rank})) take_one(Kind::serve, peer, rank);
    for (i32 peer : all)
      if (can(state, bounds, {Kind::read, rank, peer})) take_one(Kind::read, rank, peer);
  }
};

// {0, 1, 2} decide while 3 and 4 are stopped; 0 and 1 die; 3 and 4 wake, and are the majority of the living. Rank 0 may
// die before it finds the decision, which then stands in the records only, or after it has published it.
bool five_members(bool published) {
  Script script;
  script.bounds = bounds_of(5, {1, 0, 0, 1, 0}, 2);
  script.bounds.adopting = true;
  script.state = first_state(script.bounds);
  script.take_one(Kind::begin, 0);
  script.ask(0, {1, 2}, {1, 2});
  script.take_one(Kind::advance, 0);
  script.ask(0, {0, 1, 2}, {1, 2});
  if (published) script.take_one(Kind::advance, 0);
  script.take_one(Kind::crash, 0);
  script.take_one(Kind::crash, 1);

  script.take_one(Kind::begin, 3);
  script.ask(3, {4}, {0, 1, 4});
  if (published) {
    // Rank 0's record has moved on, so it is no vote and discounts nobody: 3 and 4 are two of four.
    if (can(script.state, script.bounds, {Kind::advance, 3})) script.possible = false;
    script.take_one(Kind::adopt, 3, 0);
  } else {
    script.take_one(Kind::advance, 3);
    script.ask(3, {3, 4}, {4});
    script.take_one(Kind::advance, 3);
  }
  const u64 found = script.state.ranks[3].decision;
  printf("five members, two of three deciders dead, decision %s: rank 3 ends with %llu, decided was %llu\n",
         published ? "published" : "in the records only", found, own_value(0));
  return script.possible && found == own_value(0);
}

// Above three members every schedule is too many: as many as asked, at random, each to its end.
bool at_random(u64 num_schedules, u64 seed) {
  std::mt19937_64 dice(seed);
  u64 num_steps = 0, num_decided = 0;
  std::vector<Step> steps;
  for (u64 schedule = 0; schedule < num_schedules; ++schedule) {
    const Bounds bounds = bounds_of(4 + static_cast<i32>(schedule % 2), {2, 2, 2, 2, 2}, dice() % 4);
    State state = first_state(bounds);
    for (steps_of(state, bounds, steps); !steps.empty(); steps_of(state, bounds, steps), ++num_steps) {
      const Step step = steps[dice() % steps.size()];
      if (step.kind == Kind::crash && dice() % 16 != 0) continue;
      if (take(state, bounds, step) != 0) ++num_decided;
      if (is_torn(state, bounds.num_ranks)) {
        printf("schedule %llu of seed %llu decides two views\n", schedule, seed);
        return false;
      }
    }
  }
  printf("four and five members: %llu schedules at random (seed %llu), %llu steps, %llu decisions, never two views\n",
         num_schedules, seed, num_steps, num_decided);
  return num_decided > 0;
}

int without(const std::string& name) {
  if (!take_out(name)) return fprintf(stderr, "no guard is called %s\n", name.c_str()), 2;
  Found found;
  for (const Bounds& bounds : {bounds_of(2, {1, 1}, 1), bounds_of(3, {1, 1, 1}, 1)})
    if (!found.two_views) walk(bounds, true, 1, found);
  printf("without %s: two views %s after %llu states\n", name.c_str(), found.two_views ? "decided" : "not found",
         found.num_states);
  return found.two_views ? 3 : 0;
}

}  // namespace

int main(int num_arguments, char** arguments) {
  if (num_arguments == 3 && strcmp(arguments[1], "without") == 0) return without(arguments[2]);
  const bool deep = num_arguments == 2 && strcmp(arguments[1], "deep") == 0;
  bool ok = explore(bounds_of(2, {2, 2}, kSanitized ? 1 : 2), 1);
  ok = ok && explore(bounds_of(3, {1, 1, 0}, kSanitized ? 0 : 2), 4);
  if (deep) ok = ok && explore(bounds_of(3, {2, 1, 0}, 1), 64);
  return ok && five_members(false) && five_members(true) && at_random(deep ? 200000 : 2000, 1) ? 0 : 1;
}
