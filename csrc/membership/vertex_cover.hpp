// The fewest vertices that touch every edge of a graph: exact where that is affordable, at most twice the fewest
// elsewhere.
//
// Why a search of its own: `verdict` needs more than a smallest cover. All ranks must pick the *same* one among the
// smallest, and an operator wants to know whether there was a choice. So the usual shortcuts that keep only *some*
// smallest cover (take the neighbour of a leaf, crown rules) are not allowed here. Used instead are rules that hold for
// every smallest cover:
//   - connected pieces are independent, in size, in weight and in the order of ties;
//   - if some cover has k vertices, a vertex with more than k neighbours is in every smallest cover, because leaving it
//     out costs all its neighbours. This alone settles "a few sick ranks accuse everybody" at any size;
//   - k vertices touch at most k times the largest degree edges; and no cover is smaller than a matching.
//
// Bounds. A piece left over by these rules is searched for covers of up to kExactCover vertices. Each step of the
// search takes one vertex, or all its neighbours (at least two: a piece of separate edges is settled directly), so a
// search for k vertices visits T(k) <= 1 + T(k-1) + T(k-2) nodes: 4,180 for k = 16, and 10,925 for all k up to 16
// together. A piece that needs more gets the smaller of two greedy covers (largest degree first; both ends of a maximal
// matching), the latter never more than twice the fewest. Nothing depends on time, addresses or edge order.
#pragma once

#include <vector>

#include "protocol/rank_set.hpp"

namespace fa2a {

constexpr i32 kExactCover = 16;  // per connected piece, after the vertices that every smallest cover shares

struct Cover {
  RankSet chosen;
  RankSet searched;           // of `chosen`: found exactly; the others were taken greedily
  RankSet in_every_smallest;  // of `searched`: no cover of this size does without it
  RankSet in_every_heaviest;  // of `searched`: none of this size *and* this weight does without it
  bool exact() const { return searched == chosen; }
};

// The first cover in this order: fewest vertices; then the largest sum of `weight`; then the larger set, read as a
// binary number in which vertex v is bit v (so the set that holds the highest vertex in which two covers differ wins).
// `neighbours` is symmetric, without loops; both arrays have one entry per vertex, at most kMaxRanks.
Cover smallest_cover(const std::vector<RankSet>& neighbours, const std::vector<u64>& weight);

}  // namespace fa2a
