// From a schedule that fails to a smaller one that fails too, as a list of cuts that can be given on the command line.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "tests/simulator/schedule.hpp"

namespace fa2a::sim {

// What was taken out of a schedule. Together with mix and seed it says which schedule it is.
struct Cuts {
  std::vector<i32> faults;  // by index in the whole schedule
  std::vector<std::string> calm;
};

const std::vector<std::string>& calm_names();
// False: there is no such fault, or nothing is called that.
bool apply(const Cuts& cuts, Schedule& schedule);
std::string options_of(const Cuts& cuts);

// `fails` runs a schedule. Takes out one thing after the other for as long as it still fails.
Cuts shrink(const Schedule& whole, const std::function<bool(const Schedule&)>& fails);

}  // namespace fa2a::sim
