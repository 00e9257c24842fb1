// The search for a host that explains all accusations.
#include "membership/host_cut.hpp"

namespace fa2a {
namespace {

struct Candidate {
  RankSet ranks;
  i32 num_ranks = 0, highest = -1;
  u64 num_edges = 0;
};

// Whoever comes later in rank order wins a full tie: it is the one with the higher rank.
bool goes_before(const Candidate& a, const Candidate& b) {
  if (a.num_ranks != b.num_ranks) return a.num_ranks < b.num_ranks;
  if (a.num_edges != b.num_edges) return a.num_edges > b.num_edges;
  return a.highest > b.highest;
}

Candidate host_with(const HostCutInput& input, i32 rank) {
  Candidate host;
  for (i32 mate = 0; mate < static_cast<i32>(input.neighbours.size()); ++mate) {
    if (!input.alive.has(mate) || input.host_of[mate] != input.host_of[rank]) continue;
    host.ranks.add(mate);
    ++host.num_ranks;
    host.num_edges += input.num_edges[mate];
    host.highest = mate;
  }
  return host;
}

bool explains_everything(const HostCutInput& input, const RankSet& host) {
  for (i32 rank = 0; rank < static_cast<i32>(input.neighbours.size()); ++rank) {
    const RankSet& others = input.neighbours[rank];
    const bool inside = host.has(rank);
    if (inside && (others.empty() || !(others & host).empty())) return false;
    if (!inside && !others.without(host).empty()) return false;
  }
  return true;
}

}  // namespace

RankSet cut_off_host(const HostCutInput& input) {
  Candidate best;
  RankSet looked_at;
  for (i32 rank = 0; input.host_of != nullptr && rank < static_cast<i32>(input.neighbours.size()); ++rank) {
    if (!input.alive.has(rank) || looked_at.has(rank)) continue;
    const Candidate host = host_with(input, rank);
    looked_at = looked_at | host.ranks;
    if (host.num_ranks < 2 || host.num_ranks > input.most_ranks) continue;
    if (!explains_everything(input, host.ranks)) continue;
    if (best.num_ranks == 0 || goes_before(host, best)) best = host;
  }
  return best.ranks;
}

}  // namespace fa2a
