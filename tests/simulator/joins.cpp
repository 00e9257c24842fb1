// How a life begins in a simulated group, as a process does it that joins: it finds the members, knocks, and waits
// until it is let in. What the store would tell it, this world does.
#include "tests/simulator/files.hpp"
#include "tests/simulator/world.hpp"

namespace fa2a::sim {

namespace {

constexpr i64 kLookNs = 300 * kUs, kLongLookNs = 1 * kMs;
// Of the newcomer's patience: some holds in vain, and what its former life takes to be found out.
constexpr i64 kLongestJoin = 300 * kMs;

}  // namespace

void World::begin_joining(i32 rank, bool comes_back) {
  if (comes_back && current_[static_cast<size_t>(rank)] < 0) return;
  Member& member = begin_life(rank);
  member.is_in = false;
  member.comes_back = comes_back;
  spawn_worker(member);
}

// The life before, when it is of the same process: it has to know that it is out, and to have closed.
bool World::former_is_out(const Member& member) const {
  for (i32 life = member.life - 1; life >= 0; --life)
    if (at(life).rank == member.rank) return at(life).end == End::evicted || at(life).end == End::left;
  return false;
}

// As a store tells of it: the newest life of a rank is the one that counts.
void World::open_life(Member& newcomer, i32 rank, u64 incarnation) {
  const i32 life = current_[static_cast<size_t>(rank)];
  if (rank == newcomer.rank || life < 0 || at(life).endpoint == nullptr) return;
  const Member& member = at(life);
  const u64 its = page_of(member).incarnation;
  if (incarnation != 0 && incarnation != its) return;
  newcomer.endpoint->open_member(rank, process_of(life), member.endpoint->page_fd(), its);
}

// False: it was not let in, or is out again already.
bool World::come_in(Member& member) {
  const i64 deadline = scheduler_.now() + kLongestJoin;
  auto has_time = [&] { return !scheduler_.over && scheduler_.now() < deadline; };
  auto rest = [&](i64 duration_ns) { scheduler_.sleep_until(scheduler_.now() + duration_ns, nullptr, 0); };
  while (member.comes_back && !former_is_out(member) && has_time()) rest(kLongLookNs);
  if (!has_time()) return member.end = End::not_let_in, false;
  member.endpoint = std::make_unique<Endpoint>(config_of(member.rank), nullptr, "");
  member.endpoint->create_newcomer();
  links_.is_called(member.life, page_of(member).incarnation);
  member.end = End::running;
  while (has_time()) {
    const JoinProgress progress = member.endpoint->go_on_joining();
    if (progress.stage == JoinStage::in) {
      member.endpoint->serve_as_newcomer();
      member.is_in = true;
      return true;
    }
    if (progress.stage == JoinStage::out) break;
    if (progress.stage == JoinStage::member_unknown) open_life(member, progress.rank, progress.incarnation);
    for (i32 rank = 0; rank < schedule_.num_ranks && progress.stage == JoinStage::no_members; ++rank)
      open_life(member, rank, 0);
    rest(progress.stage == JoinStage::waits ? kLookNs : kLongLookNs);
  }
  if (!scheduler_.over) member.endpoint->close();
  member.end = End::not_let_in;
  return false;
}

}  // namespace fa2a::sim
