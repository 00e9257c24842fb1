// A host that is cut off from the others is one event, however many of its ranks are accused: which host, if any, is
// it?
#pragma once

#include <vector>

#include "protocol/rank_set.hpp"

namespace fa2a {

struct HostCutInput {
  RankSet alive;                           // members that are not proven dead
  const std::vector<RankSet>& neighbours;  // [num_ranks]; who is at odds with whom, either way
  const std::vector<u64>& num_edges;       // [num_ranks]; accusations, past ones counted
  const i32* host_of;                      // [num_ranks]; nullptr: every rank is on a host of its own
  i32 most_ranks;                          // a larger host is not worth it
};

// The ranks of the host that explains every accusation; empty: none does. A host explains them if
//   - each accusation has exactly one end among its living members: inside the host and inside the rest all is well;
//   - each of these members, at least two, is at odds with somebody: a host-mate that is well says that the host is.
// Of several the one with the fewest living members, then the most accusations, then the highest rank.
RankSet cut_off_host(const HostCutInput& input);

}  // namespace fa2a
