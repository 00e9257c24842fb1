// Who stays when ranks accuse each other: a pure function of the accusations, the same answer on every rank.
//
// An accusation is an observation ("I cannot get through to rank 4"), not a fact about rank 4: the accuser may be the
// sick one, or only the link between the two is. So the verdict does not ask who was accused but which members can
// still all work with each other, and keeps as many of them as possible.
//
// Why not the AND of everyone's views ("whoever is accused goes"):
//   - one sick rank that accuses all others evicts all others. The accusations then form a star, and evicting its one
//     centre ends them all: the sick rank must lose, however many it accuses;
//   - one broken link makes both its ends accuse, and both go. One eviction ends both accusations, so exactly one of
//     the two goes; accusations cannot tell which of them is to blame, only that keeping both is impossible.
//
// The rule. Members proven dead go, and their accusations with them: what a rank wrote before it died may be the reason
// it died, and is no reason to lose a second rank. Of the others the fewest go that leave no accusation between two
// kept members (a minimum vertex cover of the accusations, whichever way they point). Between choices of the same size:
//   1. the one with more silent ranks goes. Two of four that stand still are accused by the other two, four accusations
//      that the well ones could end by going as well as the silent. This is the one thing about an accused rank that
//      the reader sees for itself. It ranks below the size, so that a rank that accuses everybody does not cost those
//      whose beat happens to be late;
//   2. then the one with more accusations: directed accusations now, plus `past_edges`, summed over its ranks. This is
//      what stops a serial accuser, which breaks with one rank per epoch: after the first it has a past, its next
//      victim has none, and it goes itself. It costs at most one other rank;
//   3. then the one with the higher ranks: of two choices, the one that holds the highest rank in which they differ.
// These rules order all choices totally, so every rank that sees the same input picks the same view.
//
// A host that is cut off is one event, and goes as one. Rank by rank, the fewest that end all accusations across a lost
// path between two hosts are often some of one and some of the other, and the ranks that stay still have the lost path
// between them, for the next epoch and the one after. So if one host explains every accusation (host_cut.hpp has what
// that means), and the fewest ranks are two or more, the host goes instead: as long as its living members are not more
// than twice the fewest (or, where these were not searched, not more than the ranks found).
//
// Never everybody: of a connected set of accusers, all but one is always enough. `next` is empty only when all members
// are proven dead.
#pragma once

#include <string>

#include "protocol/compiler.hpp"
#include "protocol/rank_set.hpp"

namespace fa2a {

struct VerdictInput {
  i32 num_ranks = 0;    // clamped to kMaxRanks
  RankSet members;      // active in the current view
  RankSet proven_dead;  // exit or left, verified
  // [num_ranks]; accused_by[a] holds the ranks that rank a accuses now. Self-accusations count for nothing, nor do rows
  // and bits of ranks that are proven dead or no members.
  const RankSet* accused_by = nullptr;
  const u32* past_edges = nullptr;  // [num_ranks]; accusations each rank was part of in closed epochs
  RankSet silent;                   // accused by one who lives, and seen not to have beaten since
  const i32* host_of = nullptr;     // [num_ranks]; any numbers, equal on one host; nullptr: one rank a host
};

struct Verdict {
  RankSet next;     // members of the next view
  RankSet evicted;  // members that are not in it
  // false: more went for accusations than had to, or it is not known; at most twice the fewest did. A host that went as
  // one, or too tangled to search (vertex_cover.hpp has the bound).
  bool exact;
  std::string reason;  // for the operator; always fits kReasonBytes of a view
};

Verdict verdict(const VerdictInput& input);

// The reason of a view in which nobody left: decided when an accusation is taken back after ranks have held for it.
std::string same_members_reason();

}  // namespace fa2a
