// The search behind smallest_cover: split into pieces, take what every smallest cover shares, branch on the rest.
#include "membership/vertex_cover.hpp"

namespace fa2a {
namespace {

using Graph = std::vector<RankSet>;

i32 degree_within(const RankSet& neighbours, const RankSet& among, i32 num_words) {
  i32 total = 0;
  for (i32 i = 0; i < num_words; ++i) total += __builtin_popcountll(neighbours.words[i] & among.words[i]);
  return total;
}

i32 size_of(const RankSet& set) { return degree_within(set, set, RankSet::kNumWords); }

std::vector<i32> members_of(const RankSet& set) {
  std::vector<i32> out;
  for (i32 i = 0; i < RankSet::kNumWords; ++i)
    for (u64 bits = set.words[i]; bits != 0; bits &= bits - 1) out.push_back(i * 64 + __builtin_ctzll(bits));
  return out;
}

// The last rule of the order: as binary numbers, most significant word first.
bool holds_the_higher(const RankSet& a, const RankSet& b) {
  for (i32 i = RankSet::kNumWords - 1; i >= 0; --i)
    if (a.words[i] != b.words[i]) return a.words[i] > b.words[i];
  return false;
}

RankSet piece_around(const Graph& graph, i32 start, const RankSet& open) {
  RankSet piece, frontier;
  frontier.add(start);
  while (!frontier.empty()) {
    piece = piece | frontier;
    RankSet reached;
    for (i32 v : members_of(frontier)) reached = reached | graph[v];
    frontier = (reached & open).without(piece);
  }
  return piece;
}

// All covers of exactly `size` vertices of one small piece, of which it keeps the first in the order. Vertices are
// renumbered without gaps, in the same order, so that a node of the search costs a few words, not kMaxRanks bits.
class PieceSearch {
 public:
  PieceSearch(const Graph& graph, const std::vector<u64>& weight, const RankSet& piece)
      : vertex_of_(members_of(piece)) {
    num_words_ = (num_vertices() + 63) / 64;
    std::vector<i32> local_of(graph.size(), -1);
    for (i32 local = 0; local < num_vertices(); ++local) local_of[vertex_of_[local]] = local;
    for (i32 v : vertex_of_) {
      RankSet near;
      for (i32 u : members_of(graph[v] & piece)) near.add(local_of[u]);
      neighbours_.push_back(near);
      weight_.push_back(weight[v]);
    }
  }

  bool find(i32 size) {
    found_ = false;
    branch(RankSet::first(num_vertices()), RankSet{}, size);
    return found_;
  }

  void add_to(Cover& cover) const {
    for (i32 local = 0; local < num_vertices(); ++local) {
      if (best_.has(local)) cover.chosen.add(vertex_of_[local]);
      if (best_.has(local)) cover.searched.add(vertex_of_[local]);
      if (in_every_smallest_.has(local)) cover.in_every_smallest.add(vertex_of_[local]);
      if (in_every_heaviest_.has(local)) cover.in_every_heaviest.add(vertex_of_[local]);
    }
  }

 private:
  i32 num_vertices() const { return static_cast<i32>(vertex_of_.size()); }

  // Every cover either holds the vertex of largest degree, or does without it and then holds all its neighbours: the
  // two branches share no cover and miss none.
  void branch(const RankSet& open, const RankSet& taken, i32 num_left) {
    i32 widest = -1, widest_degree = 0, degree_sum = 0;
    for (i32 v = 0; v < num_vertices(); ++v) {
      if (!open.has(v)) continue;
      const i32 degree = degree_within(neighbours_[v], open, num_words_);
      degree_sum += degree;
      if (degree > widest_degree) widest = v, widest_degree = degree;
    }
    if (degree_sum / 2 > num_left * widest_degree) return;
    if (widest_degree <= 1) return settle_separate_edges(open, taken);

    RankSet rest = open, with_widest = taken;
    rest.remove(widest);
    with_widest.add(widest);
    branch(rest, with_widest, num_left - 1);
    const RankSet near = neighbours_[widest] & open;
    if (widest_degree <= num_left) branch(rest.without(near), taken | near, num_left - widest_degree);
  }

  // Edges that share no end are decided one by one, by the same order. Their ends are in no set of "every cover",
  // except that a heavier end is in all the heaviest.
  void settle_separate_edges(const RankSet& open, const RankSet& taken) {
    RankSet chosen = taken, certain = taken;
    for (i32 low : members_of(open)) {
      const i32 high = (neighbours_[low] & open).lowest();
      if (high <= low) continue;  // no edge, or met from its other end
      const i32 pick = weight_[low] > weight_[high] ? low : high;
      chosen.add(pick);
      if (weight_[low] != weight_[high]) certain.add(pick);
    }
    offer(chosen, taken, certain);
  }

  void offer(const RankSet& chosen, const RankSet& in_every_smallest, const RankSet& in_every_heaviest) {
    u64 weight = 0;
    for (i32 v : members_of(chosen)) weight += weight_[v];
    in_every_smallest_ = found_ ? in_every_smallest_ & in_every_smallest : in_every_smallest;
    if (!found_ || weight > best_weight_) {
      best_ = chosen;
      best_weight_ = weight;
      in_every_heaviest_ = in_every_heaviest;
    } else if (weight == best_weight_) {
      in_every_heaviest_ = in_every_heaviest_ & in_every_heaviest;
      if (holds_the_higher(chosen, best_)) best_ = chosen;
    }
    found_ = true;
  }

  std::vector<i32> vertex_of_;
  Graph neighbours_;
  std::vector<u64> weight_;
  i32 num_words_ = 0;
  bool found_ = false;
  RankSet best_, in_every_smallest_, in_every_heaviest_;
  u64 best_weight_ = 0;
};

// Drops vertices whose neighbours all stay in the cover, lower ranks first. What remains is minimal, so each vertex has
// a neighbour outside: a cover never takes a whole piece.
RankSet without_idle(const Graph& graph, const RankSet& piece, RankSet cover) {
  for (i32 v : members_of(cover))
    if ((graph[v] & piece).without(cover).empty()) cover.remove(v);
  return cover;
}

RankSet cover_by_degree(const Graph& graph, const std::vector<u64>& weight, const RankSet& piece) {
  const std::vector<i32> vertices = members_of(piece);
  std::vector<i32> degree(graph.size(), 0);
  for (i32 v : vertices) degree[v] = degree_within(graph[v], piece, RankSet::kNumWords);
  RankSet cover;
  for (;;) {
    i32 next = vertices.front();
    for (i32 v : vertices)
      if (degree[v] > degree[next] || (degree[v] == degree[next] && weight[v] >= weight[next])) next = v;
    if (degree[next] == 0) return without_idle(graph, piece, cover);
    cover.add(next);
    degree[next] = 0;
    for (i32 u : members_of((graph[next] & piece).without(cover))) --degree[u];
  }
}

RankSet maximal_matching_ends(const Graph& graph, const RankSet& piece) {
  RankSet open = piece, ends;
  for (i32 v : members_of(piece)) {
    const i32 partner = open.has(v) ? (graph[v] & open).lowest() : -1;
    if (partner < 0) continue;
    for (i32 end : {v, partner}) {
      ends.add(end);
      open.remove(end);
    }
  }
  return ends;
}

// Vertices that leaving out would cost more than `size` vertices; each one found leaves one fewer to find the rest
// with.
RankSet forced_by_degree(const Graph& graph, const RankSet& piece, i32 size) {
  RankSet open = piece, forced;
  for (bool again = true; again;) {
    again = false;
    for (i32 v : members_of(open)) {
      if (degree_within(graph[v], open, RankSet::kNumWords) <= size) continue;
      forced.add(v);
      open.remove(v);
      --size;
      again = true;
    }
  }
  return forced;
}

// Adds one piece's cover; returns what is still uncovered (non-empty only after forced vertices were taken).
RankSet cover_piece(const Graph& graph, const std::vector<u64>& weight, const RankSet& piece, Cover& cover) {
  const RankSet matched = maximal_matching_ends(graph, piece);
  const RankSet by_matching = without_idle(graph, piece, matched);
  RankSet greedy = cover_by_degree(graph, weight, piece);
  if (size_of(by_matching) < size_of(greedy)) greedy = by_matching;

  const RankSet forced = forced_by_degree(graph, piece, size_of(greedy));
  if (!forced.empty()) {
    cover.chosen = cover.chosen | forced;
    cover.searched = cover.searched | forced;
    cover.in_every_smallest = cover.in_every_smallest | forced;
    cover.in_every_heaviest = cover.in_every_heaviest | forced;
    return piece.without(forced);
  }
  PieceSearch search(graph, weight, piece);
  for (i32 size = size_of(matched) / 2; size <= kExactCover; ++size) {
    if (!search.find(size)) continue;
    search.add_to(cover);
    return RankSet{};
  }
  cover.chosen = cover.chosen | greedy;
  return RankSet{};
}

}  // namespace

Cover smallest_cover(const std::vector<RankSet>& neighbours, const std::vector<u64>& weight) {
  Cover cover;
  std::vector<RankSet> uncovered = {RankSet::first(static_cast<i32>(neighbours.size()))};
  while (!uncovered.empty()) {
    RankSet open = uncovered.back();
    uncovered.pop_back();
    for (i32 v : members_of(open)) {
      if (!open.has(v)) continue;  // went with an earlier piece
      const RankSet piece = piece_around(neighbours, v, open);
      open = open.without(piece);
      if (size_of(piece) == 1) continue;
      const RankSet rest = cover_piece(neighbours, weight, piece, cover);
      if (!rest.empty()) uncovered.push_back(rest);
    }
  }
  return cover;
}

}  // namespace fa2a
