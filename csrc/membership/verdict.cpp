// The verdict and the sentence that explains it to the operator who is woken by it.
#include "membership/verdict.hpp"

#include <algorithm>
#include <vector>

#include "membership/host_cut.hpp"
#include "membership/vertex_cover.hpp"
#include "protocol/control_page.hpp"

namespace fa2a {
namespace {

constexpr i32 kMaxRanges = 4;  // of one list of ranks: "0-4, 7, 9-12" is three

// What counts after the rules have thrown out what does not: accusations between members not proven dead.
struct Accusations {
  std::vector<RankSet> made;        // [num_ranks]
  std::vector<RankSet> neighbours;  // [num_ranks], either direction
  std::vector<u64> num_edges;       // [num_ranks]: directed ones now, made or received, plus past ones
  RankSet silent;                   // of those who are part of one

  // More than all accusations that there can be: 2^32 past ones of each of 2^10 ranks, and those of now.
  static constexpr u64 kSilentWeight = 1ull << 48;
  std::vector<u64> weights() const {
    std::vector<u64> out = num_edges;
    for (i32 rank = 0; rank < static_cast<i32>(out.size()); ++rank)
      if (silent.has(rank)) out[static_cast<size_t>(rank)] += kSilentWeight;
    return out;
  }
};

Accusations live_accusations(const VerdictInput& input, i32 num_ranks, const RankSet& alive) {
  Accusations live{std::vector<RankSet>(num_ranks), std::vector<RankSet>(num_ranks),
                   std::vector<u64>(input.past_edges, input.past_edges + num_ranks), input.silent & alive};
  for (i32 a = 0; a < num_ranks; ++a) {
    if (!alive.has(a)) continue;
    live.made[a] = input.accused_by[a] & alive;
    live.made[a].remove(a);
    for (i32 b = 0; b < num_ranks; ++b) {
      if (!live.made[a].has(b)) continue;
      live.neighbours[a].add(b);
      live.neighbours[b].add(a);
      ++live.num_edges[a];
      ++live.num_edges[b];
    }
  }
  return live;
}

// "rank 3", "ranks 0-4, 7", "ranks 0, 2, 4, 6 and 40 more".
std::string name_ranks(const RankSet& ranks) {
  std::string out;
  i32 num_ranges = 0, num_named = 0;
  for (i32 first = 0; first < kMaxRanks && num_ranges < kMaxRanges; ++first) {
    if (!ranks.has(first)) continue;
    i32 last = first;
    while (ranks.has(last + 1)) ++last;
    out += (num_ranges++ > 0 ? ", " : "") + std::to_string(first);
    if (last > first) out += (last == first + 1 ? ", " : "-") + std::to_string(last);
    num_named += last - first + 1;
    first = last;
  }
  const i32 num_more = ranks.size() - num_named;
  if (num_more > 0) out += " and " + std::to_string(num_more) + " more";
  return (ranks.size() == 1 ? "rank " : "ranks ") + out;
}

// The accusations between one evicted rank and those that stay: there is always one, or the rank would have stayed too.
std::string name_accusations(const Accusations& live, i32 rank, const RankSet& kept) {
  const RankSet made = live.made[rank] & kept;
  const RankSet only_received = (live.neighbours[rank] & kept).without(made);
  RankSet both;
  for (i32 other = 0; other < static_cast<i32>(live.made.size()); ++other)
    if (made.has(other) && live.made[other].has(rank)) both.add(other);
  const RankSet only_made = made.without(both);

  std::string text;
  if (!both.empty()) text += "accuses and is accused by " + name_ranks(both);
  if (!only_made.empty()) text += (text.empty() ? "" : ", ") + ("accuses " + name_ranks(only_made));
  if (!only_received.empty()) text += (text.empty() ? "" : ", ") + ("is accused by " + name_ranks(only_received));
  return text;
}

// Which rule decided against this rank and not against the ones it is at odds with.
std::string name_rule(const VerdictInput& input, const Accusations& live, const Cover& cover, i32 rank,
                      const RankSet& kept) {
  if (cover.in_every_smallest.has(rank)) return "any other choice would cost more ranks";
  if (cover.in_every_heaviest.has(rank)) {
    if (live.silent.has(rank)) return "no equally small choice has as many ranks that have not beaten since";
    std::string text = "no equally small choice has as many accusations (here " + std::to_string(live.num_edges[rank]);
    const u32 num_past = input.past_edges[rank];
    if (num_past > 0) text += ", " + std::to_string(num_past) + " of them in earlier epochs";
    return text + ")";
  }
  if (!cover.searched.has(rank)) return "these accusations are too tangled for an exact choice";
  const RankSet opponents = live.neighbours[rank] & kept;
  const bool is_pair = opponents.size() == 1 && opponents.lowest() < rank;
  return is_pair ? "the tie goes against the higher rank" : "the tie goes against the choice with the higher ranks";
}

// Ranks evicted for word-for-word the same reason share one clause, so that a lost host is one clause and not eight.
struct Clause {
  std::string text;
  RankSet ranks;
};

std::vector<Clause> explain(const VerdictInput& input, const Accusations& live, const Cover& cover,
                            const RankSet& kept) {
  std::vector<Clause> clauses;
  for (i32 rank = 0; rank < static_cast<i32>(live.made.size()); ++rank) {
    if (!cover.chosen.has(rank)) continue;
    const std::string accusations = name_accusations(live, rank, kept);
    const bool is_list = accusations.find(", ") != std::string::npos;
    const std::string text = accusations + (is_list ? ", and " : " and ") + name_rule(input, live, cover, rank, kept);
    auto same = std::find_if(clauses.begin(), clauses.end(), [&](const Clause& c) { return c.text == text; });
    if (same == clauses.end()) same = clauses.insert(clauses.end(), Clause{text, RankSet{}});
    same->ranks.add(rank);
  }
  return clauses;
}

void append(std::string& text, const std::string& part) { text += (text.empty() ? "" : "; ") + part; }

std::string name_rest(const RankSet& unexplained, bool searched, bool is_anyone_left) {
  std::string text;
  if (!unexplained.empty()) append(text, name_ranks(unexplained) + " evicted: for further accusations");
  if (!searched) append(text, "for accusations at most twice as many were evicted as had to be");
  if (!is_anyone_left) append(text, "no member is left");
  return text;
}

// Clauses for as long as they fit: the view carries kReasonBytes, and half a sentence misleads. The dead and the rest
// always fit, as lists of ranks are short.
std::string name_reason(const std::vector<Clause>& clauses, const std::string& about_dead, const RankSet& accused,
                        bool searched, bool is_anyone_left) {
  std::string text = about_dead;
  RankSet unexplained = accused;
  for (const Clause& clause : clauses) {
    std::string longer = text, whole;
    append(longer,
           name_ranks(clause.ranks) + " evicted: " + (clause.ranks.size() == 1 ? "it " : "each ") + clause.text);
    whole = longer;
    append(whole, name_rest(unexplained.without(clause.ranks), searched, is_anyone_left));
    if (whole.size() >= kReasonBytes) break;
    text = longer;
    unexplained = unexplained.without(clause.ranks);
  }
  const std::string rest = name_rest(unexplained, searched, is_anyone_left);
  if (!rest.empty()) append(text, rest);
  return text;
}

// A host all of whose members died is one event to whoever reads this.
std::string name_dead(const VerdictInput& input, const RankSet& members, const RankSet& dead) {
  if (dead.empty()) return "";
  std::string hosts;
  i32 num_named = 0;
  RankSet whole;
  for (i32 rank = 0; input.host_of != nullptr && rank < kMaxRanks; ++rank) {
    if (!dead.has(rank) || whole.has(rank)) continue;
    RankSet mates;
    for (i32 mate = 0; mate < kMaxRanks; ++mate)
      if (members.has(mate) && input.host_of[mate] == input.host_of[rank]) mates.add(mate);
    if (mates.size() < 2 || !mates.without(dead).empty() || num_named == kMaxRanges) continue;
    whole = whole | mates;
    hosts += (num_named++ > 0 ? ", " : "") + std::to_string(input.host_of[rank]);
  }
  const std::string text = name_ranks(dead) + " evicted: proven dead";
  if (num_named == 0) return text;
  return text + (whole == dead ? ", all of host" : ", among them all of host") + (num_named > 1 ? "s " : " ") + hosts;
}

// The fewest ranks, or one host that explains as much as they do.
struct Choice {
  RankSet ranks;
  bool is_host = false;
};

Choice choose(const VerdictInput& input, const RankSet& alive, const Accusations& live, const Cover& cover) {
  const i32 fewest = cover.chosen.size();
  if (fewest < 2) return {cover.chosen, false};
  const RankSet host =
      cut_off_host({alive, live.neighbours, live.num_edges, input.host_of, cover.exact() ? 2 * fewest : fewest});
  return host.empty() ? Choice{cover.chosen, false} : Choice{host, true};
}

Clause explain_host(const VerdictInput& input, const RankSet& host) {
  return {"is on host " + std::to_string(input.host_of[host.lowest()]) +
              ", which is cut off: every accusation crosses its border, and all its members are part of one",
          host};
}

}  // namespace

std::string same_members_reason() { return "accusation withdrawn: same members"; }

Verdict verdict(const VerdictInput& input) {
  const i32 num_ranks = std::clamp(input.num_ranks, 0, kMaxRanks);
  const RankSet members = input.members & RankSet::first(num_ranks);
  const RankSet dead = members & input.proven_dead;
  const RankSet alive = members.without(dead);
  const Accusations live = live_accusations(input, num_ranks, alive);
  const Cover cover = smallest_cover(live.neighbours, live.weights());

  const Choice choice = choose(input, alive, live, cover);

  Verdict out;
  out.evicted = dead | choice.ranks;
  out.next = members.without(out.evicted);
  out.exact = cover.exact() && choice.ranks.size() == cover.chosen.size();
  out.reason = same_members_reason();
  if (out.evicted.empty()) return out;
  const std::vector<Clause> clauses =
      choice.is_host ? std::vector<Clause>{explain_host(input, choice.ranks)} : explain(input, live, cover, out.next);
  out.reason = name_reason(clauses, name_dead(input, members, dead), choice.ranks, choice.is_host || cover.exact(),
                           !out.next.empty());
  return out;
}

}  // namespace fa2a
