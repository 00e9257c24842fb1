// What each kind of fault does when it happens.
#include <algorithm>

#include "membership/two_copies.hpp"
#include "tests/simulator/world.hpp"

namespace fa2a::sim {

void World::stand_still(Member& member, const Fault& fault, i64 least_ns) {
  member.stood_still_ns += fault.duration_ns;
  if (fault.duration_ns >= least_ns) faulty_.add(member.life);
}

// Long enough for everybody to come to wait for it in two steps, one after the other, and to miss it there; and they
// need it for another round at least.
bool World::is_missed(const Member& member, const Fault& fault) const {
  return schedule_.long_stops_go && fault.duration_ns >= 4 * kSilenceMs * kMs &&
         member.round < schedule_.num_rounds - 1;
}

void World::die(i32 life, bool is_seen) {
  faulty_.add(life);
  if (!is_seen) silent_.add(life);
  machine(life).dead = true;
  links_.writer_died(life, schedule_.most_late_ns, scheduler_.dice.one_in(2));
  if (!is_seen) return;
  timed_.push_back({scheduler_.now() + 5 * kUs + scheduler_.dice.heavy(schedule_.exit_seen_ns), -1, life});
}

void World::make_sick(Member& member) {
  const ViewRing& ring = member.endpoint->state().ring;
  u64* row = page_of(member).accusations;
  sick_watcher = {row, schedule_.num_ranks, &ring};
  for (i32 peer = 0; peer < schedule_.num_ranks; ++peer)
    if (peer != member.rank) row[peer] = pack_accusation(newest_view(ring).epoch, Evidence::silence);
}

void World::mark_link(i32 life, i32 other) {
  bad_links_[static_cast<size_t>(life)].add(other);
  bad_links_[static_cast<size_t>(other)].add(life);
}

void World::cut(i32 life, i32 other) {
  at(life).endpoint->wire().faults.cut.add(at(other).rank);
  at(other).endpoint->wire().faults.cut.add(at(life).rank);
  isolated_.add(life);
  isolated_.add(other);
  mark_link(life, other);
}

void World::part(i32 rank) {
  const i32 size = schedule_.ranks_per_host, host = rank / size;
  for (i32 inside = host * size; inside < (host + 1) * size; ++inside)
    for (i32 outside = 0; outside < schedule_.num_ranks; ++outside)
      if (outside / size != host) cut(inside, outside);
}

void World::strike(i32 index) {
  const Fault& fault = schedule_.faults[static_cast<size_t>(index)];
  if (struck_[static_cast<size_t>(index)]) return;
  struck_[static_cast<size_t>(index)] = true;
  for (size_t i = 0; i < schedule_.faults.size(); ++i)
    if (schedule_.faults[i].after == index)
      timed_.push_back({scheduler_.now() + schedule_.faults[i].delay_ns, static_cast<i32>(i), -1});
  if (fault.is_of_world())
    return begin_joining(fault.rank, fault.kind == FaultKind::rejoin), void(++report_.num_faults);
  const i32 life = current_[static_cast<size_t>(fault.rank)], other = current_[static_cast<size_t>(fault.other)];
  if (life < 0 || !is_alive(life)) return;
  ++report_.num_faults;
  Member& member = at(life);
  const i64 until = scheduler_.now() + fault.duration_ns;
  switch (fault.kind) {
    case FaultKind::crash:
    case FaultKind::vanish:
      return die(life, fault.kind == FaultKind::crash);
    case FaultKind::leave:
      member.leaves = true;
      return;
    case FaultKind::retire:
      member.retires = true;
      return;
    case FaultKind::stop:
      machine(life).stopped_until = std::max(machine(life).stopped_until, until);
      member.must_go |= is_missed(member, fault);
      return stand_still(member, fault, kSilenceMs * kMs / 4);
    case FaultKind::hang:
      machine(life).kernel_paused_until = std::max(machine(life).kernel_paused_until, until);
      member.ever_hung |= fault.duration_ns >= kStallMs * kMs / 4;
      return stand_still(member, fault, kStallMs * kMs / 4);
    case FaultKind::sleep:
      machine(life).pulse_paused_until = std::max(machine(life).pulse_paused_until, until);
      return stand_still(member, fault, schedule_.short_sleeps ? kSilenceMs * kMs / 2 : kSilenceMs * kMs / 4);
    case FaultKind::cut:
      return cut(life, other);
    case FaultKind::part:
      return part(fault.rank);
    case FaultKind::lose:
      links_.link(life, other).loses_from = scheduler_.now();
      return mark_link(life, other);
    case FaultKind::accuse:
      accuser_ = fault.rank;
      faulty_.add(life);
      return make_sick(member);
    case FaultKind::lie:
      member.endpoint->wire().faults.lies = fault.lies;
      member.endpoint->wire().faults.seed = schedule_.seed;
      faulty_.add(life);
      return;
    case FaultKind::foreign: {
      auto* header = reinterpret_cast<PartitionHeader*>(at(other).endpoint->fabric().inbound(fault.rank));
      header->incarnation ^= 1ull << 40;
      links_.link(life, other).corrupts = true;
      return mark_link(life, other);
    }
    case FaultKind::join:
    case FaultKind::rejoin:
      return;
  }
}

// In the middle of a decision.
void World::strike_promised(const Member& member) {
  const TwoCopies<Promise>& given = page_of(member).promise;
  const Promise& promise = given.copies[given.version % 2];
  if (given.version == 0) return;
  for (size_t i = 0; i < schedule_.faults.size(); ++i) {
    const Fault& fault = schedule_.faults[i];
    if (fault.moment == Moment::access || fault.after >= 0 || struck_[i]) continue;
    const i32 life = current_[static_cast<size_t>(fault.rank)];
    if (life < 0 || at(life).endpoint == nullptr) continue;
    const bool is_own = fault.moment == Moment::own_promise && life == member.life;
    const bool is_for_it = fault.moment == Moment::newcomer_promised && promise.change.kind == ChangeKind::join &&
                           page_of(at(life)).incarnation == promise.change.incarnation;
    if (is_own || is_for_it) strike(static_cast<i32>(i));
  }
}

}  // namespace fa2a::sim
