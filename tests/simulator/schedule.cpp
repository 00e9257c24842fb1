// From a mix and a seed to a schedule.
#include "tests/simulator/schedule.hpp"

#include <algorithm>
#include <functional>
#include <map>

#include "transport/faults.hpp"

namespace fa2a::sim {
namespace {

using Make = std::function<void(Schedule&, Dice&)>;

i32 some_rank(const Schedule& s, Dice& dice) { return static_cast<i32>(dice.below(static_cast<u64>(s.num_ranks))); }

// At any access of any round, or a little after another fault: in the middle of what that one set off.
Fault& add(Schedule& s, Dice& dice, FaultKind kind, i32 rank) {
  Fault fault;
  fault.kind = kind;
  fault.rank = fault.other = rank;
  fault.round = static_cast<i32>(dice.below(static_cast<u64>(s.num_rounds)));
  fault.accesses = 1 + static_cast<i64>(dice.below(static_cast<u64>(150 * s.num_ranks)));
  if (!s.faults.empty() && dice.one_in(2)) {
    fault.after = static_cast<i32>(dice.below(s.faults.size()));
    fault.delay_ns = dice.one_in(2) ? dice.heavy(2 * kMs) : dice.heavy(60 * kMs);
  }
  s.faults.push_back(fault);
  return s.faults.back();
}

// Different ranks, so many, in any order.
std::vector<i32> some_ranks(const Schedule& s, Dice& dice, i32 number) {
  std::vector<i32> all;
  for (i32 rank = 0; rank < s.num_ranks; ++rank) all.push_back(rank);
  for (size_t i = all.size(); i > 1; --i) std::swap(all[i - 1], all[dice.below(i)]);
  all.resize(static_cast<size_t>(std::min(number, s.num_ranks)));
  return all;
}

void crashes(Schedule& s, Dice& dice) {
  for (i32 rank : some_ranks(s, dice, 1 + static_cast<i32>(dice.below(static_cast<u64>(s.num_ranks)))))
    add(s, dice, dice.one_in(6) ? FaultKind::leave : FaultKind::crash, rank);
}

void silent_deaths(Schedule& s, Dice& dice) {
  const i32 most = s.num_ranks >= 5 ? 2 : s.num_ranks >= 3 ? 1 : 0;
  for (i32 rank : some_ranks(s, dice, most)) add(s, dice, FaultKind::vanish, rank);
}

// The one who would propose dies without a word, its promise given. Whoever still waits for it in a round is the first
// to miss it, and perhaps the only one for a while.
void silent_proposers(Schedule& s, Dice& dice) {
  s.num_ranks = 5 + static_cast<i32>(dice.below(2));
  add(s, dice, FaultKind::vanish, 1 + static_cast<i32>(dice.below(static_cast<u64>(s.num_ranks - 1))));
  Fault fault;
  fault.kind = FaultKind::vanish;
  fault.moment = Moment::own_promise;
  s.faults.push_back(fault);
}

void stops(Schedule& s, Dice& dice) {
  s.must_finish = false;  // half of the group may be stopped, and the other half is none
  for (i32 i = 0, number = 1 + static_cast<i32>(dice.below(3)); i < number; ++i)
    add(s, dice, FaultKind::stop, some_rank(s, dice)).duration_ns =
        dice.between(kMs, dice.one_in(2) ? 20 * kMs : 90 * kMs);
}

// As many are stopped as are well, at about the same time: by size alone, either half could go. Some are woken before
// all of the others have missed them.
void stopped_halves(Schedule& s, Dice& dice) {
  s.must_finish = false;  // those who are well decide alone only if the lowest is one of them
  s.num_ranks = dice.one_in(3) ? 6 : 4;
  s.long_stops_go = true;
  const i64 duration_ns = dice.between(kSilenceMs * kMs, 5 * kSilenceMs * kMs);
  for (i32 rank : some_ranks(s, dice, s.num_ranks / 2)) {
    const bool is_first = s.faults.empty();
    Fault& stop = add(s, dice, FaultKind::stop, rank);
    if (!is_first) stop.after = 0, stop.delay_ns = dice.heavy(dice.one_in(2) ? kMs : 12 * kMs);
    stop.duration_ns = duration_ns + dice.heavy(dice.one_in(2) ? kMs : kSilenceMs * kMs);
    s.long_stops_go &= rank != 0;
  }
}

// The watchers of those who are well doze again and again, each time for just too long to judge silence: then it is
// kernels that find a stopped rank out, by its stall, and it wakes about when they do, not at once to its full pace.
void dozing_watchers(Schedule& s, Dice& dice) {
  s.must_finish = false;
  s.short_sleeps = true;
  s.num_ranks = std::max(s.num_ranks, 3);
  const i32 rank = some_rank(s, dice);
  Fault& stop = add(s, dice, FaultKind::stop, rank);
  stop.duration_ns = dice.between(kStallMs * kMs, kStallMs * kMs + 8 * kMs);
  Fault hang = stop;
  hang.kind = FaultKind::hang;
  hang.after = 0, hang.delay_ns = stop.duration_ns - kMs, hang.duration_ns = 6 * kMs;
  s.faults.push_back(hang);
  for (i32 other = 0; other < s.num_ranks; ++other) {
    for (i64 at = dice.heavy(2 * kMs); other != rank && at < 40 * kMs; at += dice.between(9 * kMs, 14 * kMs)) {
      Fault& sleep = add(s, dice, FaultKind::sleep, other);
      sleep.after = 0, sleep.delay_ns = at;
      sleep.duration_ns = dice.between(kSilenceMs * kMs / 4 + 200 * kUs, 6 * kMs);
    }
  }
}

// About as long as it takes to be suspected and taken back, so that both happen.
void hung_kernels(Schedule& s, Dice& dice) {
  s.must_finish = false;
  for (i32 i = 0, number = 1 + static_cast<i32>(dice.below(3)); i < number; ++i)
    add(s, dice, FaultKind::hang, some_rank(s, dice)).duration_ns =
        dice.one_in(3) ? dice.between(kMs, 120 * kMs)
                       : dice.between(kStallMs * kMs - 6 * kMs, kStallMs * kMs + 8 * kMs);
}

// A rank whose kernel stands still in the middle of a copy, and whose beat fails twice, each time for just long enough:
// it is given up and taken back by the same members twice, and its peer comes to the slot again that it still copies.
void twice_given_up(Schedule& s, Dice& dice) {
  s.must_finish = false;
  const i32 rank = some_rank(s, dice);
  Fault& hang = add(s, dice, FaultKind::hang, rank);
  hang.accesses = 1 + static_cast<i64>(dice.below(static_cast<u64>(60 * s.num_ranks)));
  hang.duration_ns = dice.between(44 * kMs, 70 * kMs);
  for (i32 i = 0; i < 2; ++i) {
    Fault& sleep = add(s, dice, FaultKind::sleep, rank);
    sleep.after = i;
    sleep.delay_ns =
        i == 0 ? dice.heavy(4 * kMs) : dice.between(kSilenceMs * kMs + 3 * kMs, kSilenceMs * kMs + 12 * kMs);
    sleep.duration_ns = dice.between(kSilenceMs * kMs, kSilenceMs * kMs + 2 * kBeatMs * kMs);
  }
}

void slept_watchers(Schedule& s, Dice& dice) {
  s.must_finish = false;
  for (i32 i = 0, number = 1 + static_cast<i32>(dice.below(4)); i < number; ++i)
    add(s, dice, FaultKind::sleep, some_rank(s, dice)).duration_ns = dice.between(kMs, 50 * kMs);
  if (dice.one_in(3)) add(s, dice, FaultKind::hang, some_rank(s, dice)).duration_ns = dice.between(kMs, 60 * kMs);
  if (dice.one_in(2)) add(s, dice, FaultKind::crash, some_rank(s, dice));
}

void add_link(Schedule& s, Dice& dice, FaultKind kind) {
  Fault& fault = add(s, dice, kind, some_rank(s, dice));
  fault.other = (fault.rank + 1 + static_cast<i32>(dice.below(static_cast<u64>(s.num_ranks - 1)))) % s.num_ranks;
}

void cut_links(Schedule& s, Dice& dice) {
  s.must_finish = false;  // whoever can read nobody's page is suspended
  for (i32 i = 0, number = 1 + static_cast<i32>(dice.below(2)); i < number; ++i) add_link(s, dice, FaultKind::cut);
}

// Two hosts that lose each other. Who is seen to be missing depends on who was waited for, and all of one host goes.
void lost_hosts(Schedule& s, Dice& dice) {
  s.must_finish = false;
  s.ranks_per_host = dice.one_in(2) ? 2 : 3;
  s.num_ranks = 2 * s.ranks_per_host;
  add(s, dice, FaultKind::part, some_rank(s, dice));
}

void lost_stores(Schedule& s, Dice& dice) {
  s.must_finish = false;
  for (i32 i = 0, number = 1 + static_cast<i32>(dice.below(2)); i < number; ++i) add_link(s, dice, FaultKind::lose);
}

void late_stores(Schedule& s, Dice& dice) {
  s.delays = {3 * kMs, true};
  s.most_late_ns = 80 * kMs;
  crashes(s, dice);
  if (dice.one_in(2)) hung_kernels(s, dice);
}

void false_accuser(Schedule& s, Dice& dice) {
  s.num_ranks = std::max(s.num_ranks, 3);
  add(s, dice, FaultKind::accuse, some_rank(s, dice));
}

void liars(Schedule& s, Dice& dice) {
  s.must_finish = false;
  Fault& fault = add(s, dice, FaultKind::lie, some_rank(s, dice));
  constexpr u32 kLies[] = {lie_count,  lie_expert,        lie_choice,    lie_num_choices, lie_twice,
                           lie_claims, lie_combine_count, lie_old_epoch, lie_old_epoch,   lie_future};
  fault.lies = kLies[dice.below(sizeof kLies / sizeof kLies[0])];
}

void foreign(Schedule& s, Dice& dice) {
  s.must_finish = false;
  add_link(s, dice, FaultKind::foreign);
  if (dice.one_in(2)) add(s, dice, FaultKind::crash, some_rank(s, dice));
}

void everything(Schedule& s, Dice& dice) {
  s.most_late_ns = 40 * kMs;
  const Make parts[] = {crashes, silent_deaths, stops, hung_kernels, slept_watchers, cut_links, lost_stores, liars};
  for (i32 i = 0; i < 2; ++i) parts[dice.below(sizeof parts / sizeof parts[0])](s, dice);
  s.must_finish = false;
}

// Ranks mark step starts, at which alone lives begin.
void mark_steps(Schedule& s, Dice& dice) {
  s.num_ranks = std::max(s.num_ranks, 3);
  s.rounds_per_step = 1 + static_cast<i32>(dice.below(3));
  s.num_rounds = 4 + static_cast<i32>(dice.below(8));
  s.num_spare_partitions = static_cast<i32>(dice.below(2));
  s.most_late_ns = 40 * kMs;
}

// `delay_ns` after the fault before it, or after the schedule begins if there is none.
Fault& add_after(Schedule& s, FaultKind kind, i32 rank, i64 delay_ns) {
  Fault fault;
  fault.kind = kind;
  fault.rank = fault.other = rank;
  fault.after = static_cast<i32>(s.faults.size()) - 1;
  fault.delay_ns = delay_ns;
  s.faults.push_back(fault);
  return s.faults.back();
}

// Ranks that the group has room for come in, some at once. Nothing keeps them out.
void growth(Schedule& s, Dice& dice) {
  mark_steps(s, dice);
  s.all_come_in = true;
  s.num_founders = 1 + static_cast<i32>(dice.below(static_cast<u64>(s.num_ranks - 1)));
  for (i32 rank = s.num_founders; rank < s.num_ranks; ++rank)
    add_after(s, FaultKind::join, rank, dice.heavy(6 * kMs)).after = -1;
  if (!dice.one_in(3)) return;
  // Somebody dies meanwhile, a newcomer perhaps: then not everybody comes in.
  s.all_come_in = false;
  add_after(s, FaultKind::crash, some_rank(s, dice), dice.heavy(8 * kMs));
}

// Members leave as planned while others hiccup. Nobody loses a choice over it.
void planned_leaves(Schedule& s, Dice& dice) {
  mark_steps(s, dice);
  for (i32 rank : some_ranks(s, dice, 1 + static_cast<i32>(dice.below(2)))) {
    add(s, dice, FaultKind::retire, rank).after = -1;
    if (dice.one_in(3)) add_after(s, FaultKind::rejoin, rank, dice.heavy(4 * kMs));
  }
  if (dice.one_in(2))
    add(s, dice, FaultKind::sleep, some_rank(s, dice)).duration_ns = dice.between(kMs, kSilenceMs * kMs / 4 - kMs);
}

// Ranks die and are replaced; newcomers die, fall silent or stand still on their way in, and others come after them.
void joins(Schedule& s, Dice& dice) {
  mark_steps(s, dice);
  s.must_finish = false;
  for (i32 rank : some_ranks(s, dice, 1 + static_cast<i32>(dice.below(2)))) {
    const bool wakes = dice.one_in(4);
    Fault& end = add(s, dice, wakes ? FaultKind::stop : dice.one_in(4) ? FaultKind::vanish : FaultKind::crash, rank);
    if (wakes) end.duration_ns = dice.between(kSilenceMs * kMs, 4 * kSilenceMs * kMs);
    add_after(s, wakes ? FaultKind::rejoin : FaultKind::join, rank, dice.heavy(8 * kMs));
    if (!dice.one_in(2)) continue;
    const FaultKind second[] = {FaultKind::crash, FaultKind::vanish, FaultKind::stop, FaultKind::sleep};
    Fault& again = add_after(s, second[dice.below(4)], rank, dice.heavy(12 * kMs));
    again.duration_ns = dice.between(kMs, 40 * kMs);
    if (again.kind == FaultKind::crash || again.kind == FaultKind::vanish)
      add_after(s, FaultKind::join, rank, dice.one_in(2) ? dice.heavy(kMs) : dice.heavy(20 * kMs));
  }
  if (dice.one_in(3)) add(s, dice, FaultKind::crash, some_rank(s, dice));
}

// Several are on their way in at once, and some die there: the place that is put aside goes from one to the other and
// back, and a second newcomer knocks for a rank whose first one may be in the next view already.
void rival_newcomers(Schedule& s, Dice& dice) {
  mark_steps(s, dice);
  s.rounds_per_step = 1;
  s.most_compute_ns = 3 * kMs;
  s.num_founders = 1 + static_cast<i32>(dice.below(static_cast<u64>(s.num_ranks - 2)));
  for (i32 rank = s.num_founders; rank < s.num_ranks; ++rank) {
    // The highest comes first and must wait for the next step start; the others may be before it in line by then.
    const bool is_first = rank == s.num_ranks - 1;
    add_after(s, FaultKind::join, rank, is_first ? dice.heavy(kMs) : dice.between(kMs / 2, 5 * kMs)).after = -1;
    if (is_first || dice.one_in(3)) continue;
    Fault& crash = add_after(s, FaultKind::crash, rank, dice.between(kMs, 5 * kMs));
    if (dice.one_in(2)) crash.moment = Moment::newcomer_promised, crash.after = -1;
    const auto died = static_cast<i32>(s.faults.size()) - 1;
    if (dice.one_in(2)) add_after(s, FaultKind::join, rank, dice.heavy(300 * kUs));
    // Who would propose is late, so that the decision is under way for long.
    Fault& slow = add_after(s, FaultKind::sleep, 0, dice.heavy(100 * kUs));
    slow.after = died;
    slow.duration_ns = dice.between(kMs, kSilenceMs * kMs / 4);
  }
}

// An old life that is stopped in mid-row, or dies with rows under way, and stores on while its replacement sends.
void zombies(Schedule& s, Dice& dice) {
  mark_steps(s, dice);
  s.must_finish = false;
  const i32 rank = some_rank(s, dice);
  const bool wakes = !dice.one_in(4);
  Fault& stop = add(s, dice, wakes ? FaultKind::stop : FaultKind::crash, rank);
  stop.round = static_cast<i32>(dice.below(3));
  stop.duration_ns = dice.between(2 * kSilenceMs * kMs, 6 * kSilenceMs * kMs);
  add_after(s, FaultKind::join, rank, dice.heavy(20 * kMs));
  if (dice.one_in(3)) add_after(s, FaultKind::stop, rank, dice.between(20 * kMs, 60 * kMs)).duration_ns = 40 * kMs;
}

const std::vector<std::pair<std::string, Make>>& mixes() {
  static const std::vector<std::pair<std::string, Make>> all = {
      {"delays", [](Schedule& s, Dice&) { s.delays = {3 * kMs, true}; }},
      {"crashes", crashes},
      {"silent_deaths", silent_deaths},
      {"stops", stops},
      {"hung_kernels", hung_kernels},
      {"twice_given_up", twice_given_up},
      {"slept_watchers", slept_watchers},
      {"cut_links", cut_links},
      {"lost_hosts", lost_hosts},
      {"lost_stores", lost_stores},
      {"late_stores", late_stores},
      {"false_accuser", false_accuser},
      {"liars", liars},
      {"foreign", foreign},
      {"everything", everything},
      {"silent_proposers", silent_proposers},
      {"growth", growth},
      {"planned_leaves", planned_leaves},
      {"joins", joins},
      {"rival_newcomers", rival_newcomers},
      {"zombies", zombies},
      {"stopped_halves", stopped_halves},
      {"dozing_watchers", dozing_watchers}};
  return all;
}

}  // namespace

const char* name_of(FaultKind kind) {
  constexpr const char* kNames[] = {"crash", "vanish", "leave", "stop",    "hang", "sleep",  "part",  "cut",
                                    "lose",  "accuse", "lie",   "foreign", "join", "rejoin", "retire"};
  return kNames[static_cast<size_t>(kind)];
}

const std::vector<std::string>& mix_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> out;
    for (const auto& mix : mixes()) out.push_back(mix.first);
    return out;
  }();
  return names;
}

Schedule make_schedule(const std::string& mix, u64 seed) {
  Schedule s;
  s.mix = mix;
  s.seed = seed;
  Dice dice(seed * 0x9e3779b97f4a7c15ull);
  constexpr i32 kSizes[] = {2, 3, 3, 3, 4, 4, 5, 6};
  s.num_ranks = kSizes[dice.below(8)];
  s.num_founders = 0;
  s.num_rounds = 3 + static_cast<i32>(dice.below(6));
  s.num_tokens = 1 + static_cast<i32>(dice.below(4));
  s.num_chunk_tokens = dice.one_in(2) ? s.num_tokens : 1 + static_cast<i32>(dice.below(static_cast<u64>(s.num_tokens)));
  s.two_open = dice.one_in(3);
  constexpr i64 kAccesses[] = {4, 20, 80, 300};
  s.pace = {kAccesses[dice.below(4)], dice.one_in(2) ? 0 : 300 * kUs};
  constexpr i64 kDelays[] = {0, 2 * kUs, 50 * kUs, 1 * kMs};
  s.delays = {kDelays[dice.below(4)], dice.one_in(2)};
  s.most_compute_ns = dice.one_in(2) ? 0 : 3 * kMs;
  s.exit_seen_ns = dice.one_in(4) ? 5 * kMs : 100 * kUs;
  s.clock_skew_ns = dice.one_in(2) ? 0 : 900 * kMs;
  for (const auto& one : mixes())
    if (one.first == mix) one.second(s, dice);
  if (s.num_founders == 0) s.num_founders = s.num_ranks;
  return s;
}

i32 Schedule::num_lives() const {
  i32 number = num_founders;
  for (const Fault& fault : faults) number += fault.is_of_world() ? 1 : 0;
  return number;
}

std::string describe(const Schedule& s) {
  std::string text = "mix " + s.mix + ", seed " + std::to_string(s.seed) + ": " + std::to_string(s.num_ranks) +
                     " ranks, " + std::to_string(s.num_rounds) + " rounds of up to " + std::to_string(s.num_tokens) +
                     " tokens in chunks of " + std::to_string(s.num_chunk_tokens) + (s.two_open ? ", two open" : "") +
                     ", stores take up to " + std::to_string(s.delays.most_ns / kUs) + " us" +
                     (s.delays.reorders ? " in any order" : "");
  if (s.rounds_per_step > 0) text += ", steps of " + std::to_string(s.rounds_per_step);
  if (s.num_founders < s.num_ranks) text += ", " + std::to_string(s.num_founders) + " of them from the start";
  text += "\n";
  for (size_t i = 0; i < s.faults.size(); ++i) {
    const Fault& fault = s.faults[i];
    text += "  fault " + std::to_string(i) + ": " + name_of(fault.kind) + " rank " + std::to_string(fault.rank);
    if (fault.other != fault.rank) text += " and rank " + std::to_string(fault.other);
    if (fault.moment != Moment::access && fault.after < 0)
      text += fault.moment == Moment::own_promise ? " once it has promised" : " once somebody has promised for it";
    else if (fault.is_of_world() && fault.after < 0)
      text += ", " + std::to_string(fault.delay_ns / kUs) + " us after the beginning";
    else if (fault.after >= 0)
      text += ", " + std::to_string(fault.delay_ns / kUs) + " us after fault " + std::to_string(fault.after);
    else
      text += " in round " + std::to_string(fault.round) + " at access " + std::to_string(fault.accesses);
    if (fault.duration_ns > 0) text += ", for " + std::to_string(fault.duration_ns / kUs) + " us";
    if (fault.lies != 0) text += ", lies " + std::to_string(fault.lies);
    text += "\n";
  }
  return text;
}

}  // namespace fa2a::sim
