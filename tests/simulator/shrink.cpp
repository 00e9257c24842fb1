// One pass after the other over everything that can be taken out, until nothing more can.
#include "tests/simulator/shrink.hpp"

#include <algorithm>
#include <functional>
#include <utility>

namespace fa2a::sim {
namespace {

using Calm = std::pair<std::string, std::function<void(Schedule&)>>;

const std::vector<Calm>& calms() {
  static const std::vector<Calm> all = {{"one_open", [](Schedule& s) { s.two_open = false; }},
                                        {"no_streams", [](Schedule& s) { s.num_chunk_tokens = s.num_tokens; }},
                                        {"prompt_stores", [](Schedule& s) { s.delays = {0, false}; }},
                                        {"ordered_stores", [](Schedule& s) { s.delays.reorders = false; }},
                                        {"same_clocks", [](Schedule& s) { s.clock_skew_ns = 0; }},
                                        {"no_hiccups", [](Schedule& s) { s.pace.most_hiccup_ns = 0; }},
                                        {"no_compute", [](Schedule& s) { s.most_compute_ns = 0; }},
                                        {"prompt_exits", [](Schedule& s) { s.exit_seen_ns = 0; }},
                                        {"coarse_turns", [](Schedule& s) { s.pace.most_accesses = 1000; }},
                                        {"one_token", [](Schedule& s) { s.num_tokens = s.num_chunk_tokens = 1; }},
                                        {"3_rounds", [](Schedule& s) { s.num_rounds = std::min(s.num_rounds, 3); }},
                                        {"4_rounds", [](Schedule& s) { s.num_rounds = std::min(s.num_rounds, 4); }},
                                        {"5_rounds", [](Schedule& s) { s.num_rounds = std::min(s.num_rounds, 5); }}};
  return all;
}

}  // namespace

const std::vector<std::string>& calm_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> out;
    for (const Calm& calm : calms()) out.push_back(calm.first);
    return out;
  }();
  return names;
}

// A fault stays where it is and never happens, so that the others keep their numbers.
bool apply(const Cuts& cuts, Schedule& schedule) {
  for (i32 fault : cuts.faults) {
    if (fault < 0 || fault >= static_cast<i32>(schedule.faults.size())) return false;
    schedule.faults[static_cast<size_t>(fault)].after = fault;
  }
  for (const std::string& name : cuts.calm) {
    const auto found =
        std::find_if(calms().begin(), calms().end(), [&](const Calm& calm) { return calm.first == name; });
    if (found == calms().end()) return false;
    found->second(schedule);
  }
  return true;
}

std::string options_of(const Cuts& cuts) {
  std::string text;
  for (i32 fault : cuts.faults) text += " --drop " + std::to_string(fault);
  for (const std::string& name : cuts.calm) text += " --calm " + name;
  return text;
}

Cuts shrink(const Schedule& whole, const std::function<bool(const Schedule&)>& fails) {
  Cuts cuts;
  auto still_fails = [&](const Cuts& tried) {
    Schedule schedule = whole;
    apply(tried, schedule);
    return fails(schedule);
  };
  for (bool again = true; again;) {
    again = false;
    auto take = [&](const Cuts& tried) {
      if (!still_fails(tried)) return;
      cuts = tried;
      again = true;
    };
    for (i32 fault = 0; fault < static_cast<i32>(whole.faults.size()); ++fault) {
      if (std::count(cuts.faults.begin(), cuts.faults.end(), fault) > 0) continue;
      Cuts tried = cuts;
      tried.faults.push_back(fault);
      take(tried);
    }
    for (const std::string& name : calm_names()) {
      if (std::count(cuts.calm.begin(), cuts.calm.end(), name) > 0) continue;
      Cuts tried = cuts;
      tried.calm.push_back(name);
      take(tried);
    }
  }
  return cuts;
}

}  // namespace fa2a::sim
