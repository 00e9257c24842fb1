// The verdict as Python sees it: lists of ranks and pairs in, lists and a sentence out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "membership/verdict.hpp"

namespace fa2a {
namespace {

namespace py = pybind11;

i32 checked_rank(i32 rank, i32 num_ranks, const char* argument) {
  if (rank >= 0 && rank < num_ranks) return rank;
  throw py::value_error(std::string(argument) + " holds rank " + std::to_string(rank) +
                        "; pass ranks from 0 to num_ranks - 1 = " + std::to_string(num_ranks - 1));
}

RankSet to_set(const std::vector<i32>& ranks, i32 num_ranks, const char* argument) {
  RankSet out;
  for (i32 rank : ranks) out.add(checked_rank(rank, num_ranks, argument));
  return out;
}

std::vector<i32> to_list(const RankSet& ranks) {
  std::vector<i32> out;
  for (i32 rank = 0; rank < kMaxRanks; ++rank)
    if (ranks.has(rank)) out.push_back(rank);
  return out;
}

std::tuple<std::vector<i32>, std::vector<i32>, bool, std::string> verdict_of_lists(
    i32 num_ranks, const std::vector<i32>& members, const std::vector<i32>& proven_dead,
    const std::vector<std::pair<i32, i32>>& accusations, const std::vector<u32>& past_edges,
    const std::vector<i32>& hosts, const std::vector<i32>& silent) {
  if (num_ranks < 1 || num_ranks > kMaxRanks)
    throw py::value_error("num_ranks is " + std::to_string(num_ranks) + "; pass 1 to " + std::to_string(kMaxRanks));
  if (past_edges.size() != static_cast<size_t>(num_ranks))
    throw py::value_error("past_edges has " + std::to_string(past_edges.size()) +
                          " entries; pass one per rank, num_ranks = " + std::to_string(num_ranks));
  if (!hosts.empty() && hosts.size() != static_cast<size_t>(num_ranks))
    throw py::value_error("hosts has " + std::to_string(hosts.size()) +
                          " entries; pass one per rank, num_ranks = " + std::to_string(num_ranks) + ", or none");
  std::vector<RankSet> accused_by(num_ranks);
  for (const auto& [accuser, accused] : accusations)
    accused_by[checked_rank(accuser, num_ranks, "accusations")].add(checked_rank(accused, num_ranks, "accusations"));

  VerdictInput input;
  input.num_ranks = num_ranks;
  input.members = to_set(members, num_ranks, "members");
  input.proven_dead = to_set(proven_dead, num_ranks, "proven_dead");
  input.accused_by = accused_by.data();
  input.past_edges = past_edges.data();
  input.host_of = hosts.empty() ? nullptr : hosts.data();
  input.silent = to_set(silent, num_ranks, "silent");
  Verdict found;
  {
    py::gil_scoped_release unlocked;
    found = verdict(input);
  }
  return {to_list(found.next), to_list(found.evicted), found.exact, found.reason};
}

}  // namespace

void bind_verdict(py::module_& m) {
  m.def("verdict", &verdict_of_lists, py::arg("num_ranks"), py::arg("members"), py::arg("proven_dead"),
        py::arg("accusations"), py::arg("past_edges"), py::arg("hosts") = std::vector<i32>(),
        py::arg("silent") = std::vector<i32>(),
        "Who stays: (next, evicted, exact, reason). accusations are (accuser, accused) pairs; past_edges[r] counts the "
        "accusations rank r was part of in earlier epochs; hosts[r] is the host of rank r (empty: one rank a host); "
        "silent ranks have not beaten since they were accused.");
}

}  // namespace fa2a
