// P6 to P8, of views: one an epoch, installed in order, promised by all its members, and who may come and go.
#include <string.h>

#include "membership/two_copies.hpp"
#include "tests/simulator/world.hpp"

namespace fa2a::sim {

// P6: one view an epoch, installed in order; whoever is in it has promised, and started nothing from its first round
// on.
void World::watch_views(Member& member) {
  const TwoCopies<Decision>& published = page_of(member).decision;
  if (published.version != member.decision_version) {
    member.decision_version = published.version;
    watch_decision(published.copies[published.version % 2].view);
  }
  const ViewRing& ring = member.endpoint->state().ring;
  if (ring.newest == member.newest) return;
  const View& before = ring.views[member.newest % kNumViews];
  const View& view = ring.views[ring.newest % kNumViews];
  if (ring.newest != member.newest + 1 || view.epoch != before.epoch + 1)
    fail("P6: " + name_of(member) + " installs epoch " + std::to_string(view.epoch) + " after " +
         std::to_string(before.epoch));
  if (!view.active.has(member.rank)) fail("P6: " + name_of(member) + " installs a view without itself");
  member.newest = ring.newest;
  const RankSet left_out = before.active.without(view.active);
  if (!left_out.without(member.endpoint->state().suspects).empty())
    fail("P1: " + name_of(member) + " installs epoch " + std::to_string(view.epoch) +
         ", and may wait for one who is out");
  if (view.incarnations[member.rank] != page_of(member).incarnation)
    fail("P8: " + name_of(member) + " installs a view that names another life of it");
  watch_decision(view);
  watch_addresses(member);
}

// P8: whoever comes and goes, those who stay keep their buffers where they are.
void World::watch_addresses(Member& member) {
  const Fabric& fabric = member.endpoint->fabric();
  std::vector<const void*> now;
  for (i32 rank = 0; rank < schedule_.num_ranks; ++rank) {
    now.push_back(&fabric.page(rank));
    now.push_back(fabric.outbound(rank));
  }
  for (i32 partition = 0; partition < num_partitions(config_of(member.rank).shape); ++partition)
    now.push_back(fabric.inbound(partition));
  if (!member.addresses.empty() && member.addresses != now)
    fail("P8: what " + name_of(member) + " has at an address has moved");
  member.addresses = now;
}

// Whoever is at fault, whose link is bad, or who is at odds with one at fault that is kept: accusations cannot tell
// which of two is to blame, only that one must go. Not for one who only ever died in silence: whoever accuses it of
// that does so after its death, and a beat that stands still is to be seen by all.
bool World::may_go(const Member& member, const View& next) const {
  if (faulty_.has(member.life) || member.leaves || member.retires ||
      !bad_links_[static_cast<size_t>(member.life)].empty())
    return true;
  for (i32 rank = 0; rank < schedule_.num_ranks; ++rank) {
    const Member* other = next.active.has(rank) ? life_in(next, rank) : nullptr;
    if (other == nullptr || !faulty_.has(other->life)) continue;
    if (!other->ever_hung && rank != accuser_ && !lies(*other)) continue;
    if (member.suspects.has(rank) || other->suspects.has(member.rank)) return true;
  }
  return false;
}

void World::watch_decision(const View& view) {
  const auto [found, is_new] = views_.emplace(view.epoch, view);
  if (memcmp(&found->second, &view, sizeof view) != 0)
    return fail("P6: two views of epoch " + std::to_string(view.epoch));
  if (!is_new) return;
  const View& before = views_[view.epoch - 1];
  for (i32 rank = 0; rank < schedule_.num_ranks; ++rank) {
    const Member* life = before.active.has(rank) ? life_in(before, rank) : nullptr;
    if (life == nullptr || (view.active.has(rank) && view.incarnations[rank] == before.incarnations[rank])) continue;
    evicted_.add(life->life);
    report_.num_retired += life->retires && !faulty_.has(life->life) ? 1 : 0;
    if (!may_go(*life, view))
      fail("P4: " + name_of(*life) + ", who is well, is out of epoch " + std::to_string(view.epoch));
  }
  watch_newcomers(before, view);
  watch_promises(before, view);
}

// Of those who stay: a newcomer's hold is all that it can promise.
void World::watch_promises(const View& before, const View& view) {
  for (i32 rank = 0; rank < schedule_.num_ranks; ++rank) {
    const bool stays = view.active.has(rank) && before.active.has(rank);
    const Member* life = stays ? life_in(before, rank) : nullptr;
    if (life == nullptr) continue;
    const TwoCopies<Promise>& given = page_of(*life).promise;
    const Promise& promise = given.copies[given.version % 2];
    if (given.version == 0 || promise.epoch_plus_one < view.epoch)
      fail("P6: epoch " + std::to_string(view.epoch) + " keeps " + name_of(*life) + ", who never promised");
    else if (promise.epoch_plus_one == view.epoch && promised_round(promise) > view.first_round)
      fail("P6: epoch " + std::to_string(view.epoch) + " begins with a round that " + name_of(*life) + " has started");
  }
}

// P8: a life begins at a step start of all who stay, once, with memory that no other member has, and none comes back.
void World::watch_newcomers(const View& before, const View& view) {
  const std::string epoch = "epoch " + std::to_string(view.epoch);
  for (i32 rank = 0; rank < schedule_.num_ranks; ++rank) {
    if (!view.active.has(rank)) continue;
    Member* life = life_in(view, rank);
    if (life == nullptr)
      return fail("P8: " + epoch + " names a life of rank " + std::to_string(rank) + " that is none");
    if (evicted_.has(life->life)) fail("P8: " + epoch + " takes " + name_of(*life) + " back, who was out");
    for (i32 other = 0; other < rank; ++other)
      if (view.active.has(other) && view.partitions[other] == view.partitions[rank])
        fail("P8: " + epoch + " gives two members one partition");
    if (before.active.has(rank) && before.incarnations[rank] == view.incarnations[rank]) continue;
    ++report_.num_joined;
    life->entered_at = view.first_round;
    for (const auto& member : members_) {
      const bool stays = view.active.has(member->rank) && life_in(before, member->rank) == member.get() &&
                         before.active.has(member->rank) && is_there(*member);
      const bool is_there_too = member->holds_here && static_cast<u64>(member->round) == view.first_round;
      if (stays && !is_there_too)
        fail("P8: " + name_of(*life) + " is let in while " + name_of(*member) + " stands at no step start");
    }
  }
}

}  // namespace fa2a::sim
