// Runs schedules by mix and seed; the first that breaks a promise is shrunk, and printed with what replays it.
//
//   simulate --mix MIX [--seed FIRST] [--count N] [--seconds S] [--without GUARD]... [--drop FAULT]... [--calm WHAT]...
//   simulate --list            the mixes, and what can be calmed
//
// One line of JSON when all held; exit 3 after a violation, 2 for options that mean nothing.
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "tests/native/guard_names.hpp"
#include "tests/simulator/shrink.hpp"
#include "tests/simulator/world.hpp"

using namespace fa2a;
using namespace fa2a::sim;

namespace {

struct Options {
  std::string mix;
  u64 seed = 1, count = 1;
  double seconds = 0;
  std::string guards;
  Cuts cuts;
  bool shrinks = true;
};

double wall_s() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

int list() {
  for (const std::string& mix : mix_names()) printf("mix %s\n", mix.c_str());
  for (const std::string& calm : calm_names()) printf("calm %s\n", calm.c_str());
  return 0;
}

Report run_once(const Schedule& schedule) { return World(schedule).run(); }

int complain(const char* what, const std::string& value) {
  fprintf(stderr, "simulate: %s %s; see --list, or the first lines of tests/simulator/main.cpp\n", what, value.c_str());
  return 2;
}

int parse(int num_arguments, char** arguments, Options& out) {
  for (int i = 1; i < num_arguments; i += 2) {
    const std::string name = arguments[i];
    if (i + 1 == num_arguments) return complain("a value is missing after", name);
    const char* value = arguments[i + 1];
    if (name == "--mix") {
      out.mix = value;
    } else if (name == "--seed") {
      out.seed = strtoull(value, nullptr, 10);
    } else if (name == "--count") {
      out.count = strtoull(value, nullptr, 10);
    } else if (name == "--seconds") {
      out.seconds = strtod(value, nullptr);
    } else if (name == "--without") {
      if (!take_out(value)) return complain("no guard is called", value);
      out.guards += std::string(" --without ") + value;
    } else if (name == "--drop") {
      out.cuts.faults.push_back(atoi(value));
    } else if (name == "--calm") {
      out.cuts.calm.push_back(value);
    } else {
      return complain("no option is called", name);
    }
  }
  for (const std::string& mix : mix_names())
    if (mix == out.mix) return 0;
  return complain("no mix is called", out.mix);
}

void tell(const Options& options, u64 seed, const Schedule& schedule, const Report& report) {
  printf("%s%s\n%s", report.wrong.c_str(), report.ranks.c_str(), describe(schedule).c_str());
  printf("replay: simulate --mix %s --seed %llu%s%s\n", options.mix.c_str(), seed, options.guards.c_str(),
         options_of(options.cuts).c_str());
  fflush(stdout);
  if (!options.cuts.faults.empty() || !options.cuts.calm.empty()) return;
  const Cuts cuts = shrink(schedule, [](const Schedule& tried) { return !run_once(tried).wrong.empty(); });
  Schedule small = schedule;
  apply(cuts, small);
  printf("shrunk: simulate --mix %s --seed %llu%s%s\n  %s\n", options.mix.c_str(), seed, options.guards.c_str(),
         options_of(cuts).c_str(), run_once(small).wrong.c_str());
}

}  // namespace

int main(int num_arguments, char** arguments) {
  if (num_arguments == 2 && std::string(arguments[1]) == "--list") return list();
  Options options;
  if (const int status = parse(num_arguments, arguments, options)) return status;
  Report sum;
  u64 num_run = 0;
  const double begun = wall_s();
  for (u64 seed = options.seed; num_run < options.count; ++seed, ++num_run) {
    if (options.seconds > 0 && wall_s() - begun > options.seconds) break;
    Schedule schedule = make_schedule(options.mix, seed);
    if (!apply(options.cuts, schedule)) return complain("nothing to cut:", options_of(options.cuts));
    const Report report = run_once(schedule);
    if (!report.wrong.empty()) return tell(options, seed, schedule, report), 3;
    sum.num_steps += report.num_steps, sum.num_stores += report.num_stores, sum.num_views += report.num_views;
    sum.num_lost += report.num_lost, sum.num_delivered += report.num_delivered, sum.num_faults += report.num_faults;
    sum.num_joined += report.num_joined, sum.num_retired += report.num_retired;
    sum.simulated_ns += report.simulated_ns;
  }
  const double ms = 1e3 * (wall_s() - begun);
  printf(
      "{\"mix\": \"%s\", \"first_seed\": %llu, \"schedules\": %llu, \"steps\": %llu, \"stores\": %llu, \"views\": "
      "%llu, "
      "\"faults\": %llu, \"delivered\": %llu, \"lost\": %llu, \"joined\": %llu, \"retired\": %llu, \"simulated_s\": "
      "%.3f, \"ms\": %.1f}\n",
      options.mix.c_str(), options.seed, num_run, sum.num_steps, sum.num_stores, sum.num_views, sum.num_faults,
      sum.num_delivered, sum.num_lost, sum.num_joined, sum.num_retired, 1e-9 * static_cast<double>(sum.simulated_ns),
      ms);
  return 0;
}
