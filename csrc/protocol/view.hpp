// Who is in: the view record, the ring that a rank keeps of them, and which one a round uses.
#pragma once

#include "protocol/compiler.hpp"
#include "protocol/memory.hpp"
#include "protocol/rank_set.hpp"

namespace fa2a {

// Decided once per epoch, the same on every rank that installs it.
struct View {
  u64 epoch = 0;
  u64 first_round = 0;  // rounds below it run under the view before, on every rank
  RankSet active;
  u64 incarnations[kMaxRanks] = {};
  u16 partitions[kMaxRanks] = {};  // which partition of each window belongs to this rank's incarnation
};

constexpr u32 kNumViews = 8;

// Published by one word. A record is overwritten only once this rank has started the first round of a view after it.
struct ViewRing {
  u64 newest = 0;  // counts installed views; the record stands at newest % kNumViews
  View views[kNumViews];
};

FA2A_HD const View& newest_view(const ViewRing& ring) { return ring.views[load_acquire(&ring.newest) % kNumViews]; }

// The decided view with the largest first_round <= round. A rank that lags behind therefore runs the rounds below the
// new view's first under the old one, as its peers did.
FA2A_HD const View& view_for_round(const ViewRing& ring, u64 round) {
  u64 index = load_acquire(&ring.newest);
  for (u32 step = 0; step + 1 < kNumViews && index > 0; ++step, --index)
    if (ring.views[index % kNumViews].first_round <= round) break;
  return ring.views[index % kNumViews];
}

// May record newest + 1 be written? It takes the place of record newest + 1 - kNumViews. That one is dead once no round
// from `started` on can fall between its first round and its successor's. (Rounds that are open keep a copy.)
FA2A_HD bool ring_has_room(const ViewRing& ring, u64 started) {
  if (ring.newest + 1 < kNumViews) return true;
  const View& oldest = ring.views[(ring.newest + 1) % kNumViews];
  const View& successor = ring.views[(ring.newest + 2) % kNumViews];
  return started >= successor.first_round || oldest.first_round == successor.first_round;
}

// Which partition of every window a newcomer that takes the place of `rank` gets: the lowest that no member holds, and
// not the one of that rank's last life while there is another. All who know the view choose alike.
FA2A_HD constexpr i32 partition_for_newcomer(const View& view, i32 rank, i32 num_partitions) {
  for (i32 partition = 0; partition < num_partitions; ++partition) {
    bool held = view.partitions[rank] == partition;
    for (i32 member = 0; member < kMaxRanks && !held; ++member)
      held = view.active.has(member) && view.partitions[member] == partition;
    if (!held) return partition;
  }
  return view.partitions[rank];
}

}  // namespace fa2a
