// The test build's faults and guard switches. In a production build there is nothing here to bind.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <thread>

#include "bindings/endpoint.hpp"
#include "host/clock.hpp"
#include "kernels/cuda/plants.hpp"

namespace py = pybind11;

namespace fa2a {

#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS

namespace {

Action action_of(const std::string& name) {
  if (name == "kill") return Action::kill;
  if (name == "stop") return Action::stop;
  if (name == "sleep_us") return Action::sleep;
  if (name == "crash") return Action::crash;
  throw py::value_error("action must be kill, stop, sleep_us or crash, not " + name);
}

void arm(Endpoint& endpoint, u32 point, u64 round, const std::string& action, i64 value, i32 skip) {
  if (point >= static_cast<u32>(Point::count)) throw py::value_error("point is no index into phases()");
  for (Armed& slot : endpoint.wire().faults.armed) {
    if (slot.action != Action::none) continue;
    slot = {static_cast<Point>(point), round, action_of(action), value, skip};
    return;
  }
  throw py::value_error("at most " + std::to_string(Faults::kNumArmed) + " faults can be armed on a rank at once");
}

void set_faults(Endpoint& endpoint, const py::dict& fields) {
  Faults& faults = endpoint.wire().faults;
  auto ranks = [&](const char* key, RankSet& set) {
    if (!fields.contains(key)) return;
    set = RankSet();
    for (i32 rank : fields[key].cast<std::vector<i32>>()) set.add(rank);
  };
  ranks("cut", faults.cut);
  ranks("unheard", faults.unheard);
  ranks("drop_signals", faults.drop_signals);
  ranks("drop_taken", faults.drop_taken);
  if (fields.contains("seed")) faults.seed = fields["seed"].cast<u64>();
  if (fields.contains("slow_row_ns")) faults.slow_row_ns = fields["slow_row_ns"].cast<i64>();
  if (fields.contains("late_signal_ns")) faults.late_signal_ns = fields["late_signal_ns"].cast<i64>();
  if (fields.contains("ignore_consent")) faults.ignore_consent = fields["ignore_consent"].cast<bool>();
  if (fields.contains("lies")) faults.lies = fields["lies"].cast<u32>();
  if (fields.contains("lies_from_round")) faults.lies_from_round = fields["lies_from_round"].cast<u64>();
}

// Host and kernel race for one promise; returns how often a kernel went on with a round that the promise says it had
// not started. The two fences are all that keeps this at zero.
i64 promise_litmus(i32 num_races) {
  RankState state;
  std::atomic<i32> turn{0}, done{0};
  std::atomic<bool> went_on{false};
  i64 num_broken = 0;
  std::thread kernel([&] {
    for (i32 race = 1; race <= num_races; ++race) {
      while (turn.load(std::memory_order_acquire) != race) {
      }
      went_on.store(start_round(state, 0), std::memory_order_relaxed);
      done.store(race, std::memory_order_release);
    }
  });
  for (i32 race = 1; race <= num_races; ++race) {
    state.started = 0;
    state.round_limit = kNoLimit;
    turn.store(race, std::memory_order_release);
    for (i32 spin = race % 64; spin > 0; --spin) __asm__ volatile("");
    const Promise promise = give_promise(state, 0, 0);
    while (done.load(std::memory_order_acquire) != race) {
    }
    if (went_on.load(std::memory_order_relaxed) && promised_round(promise) < 1) ++num_broken;
  }
  kernel.join();
  return num_broken;
}

}  // namespace

void bind_faults(py::module_& m, py::class_<Endpoint, std::shared_ptr<Endpoint>>& endpoint) {
  m.attr("has_hooks") = true;
  m.def("promise_litmus", &promise_litmus, py::call_guard<py::gil_scoped_release>());
  m.def("set_guards_off", [](u64 bits) { guards_off = bits; });
  m.def("guards_off", [] { return guards_off; });  // for kernels that are not of this library
  m.def("set_planted_bugs", [](u64 bits) { planted_bugs = bits; });
  m.attr("planted_bug_names") = std::vector<std::string>{
#define FA2A_PLANT_TEXT(name) #name,
      FA2A_PLANTS(FA2A_PLANT_TEXT)
#undef FA2A_PLANT_TEXT
  };
  endpoint.def("arm", &arm)
      .def("set_faults", &set_faults)
      .def(
          "reach",
          [](Endpoint& e, u32 point, u64 round) {
            if (point >= static_cast<u32>(Point::count)) throw py::value_error("point is no index into phases()");
            return e.reach(static_cast<Point>(point), round);
          },
          py::call_guard<py::gil_scoped_release>())
      .def("cut_ranks",
           [](Endpoint& e) {
             std::vector<i32> out;
             for (i32 rank = 0; rank < e.config().shape.num_ranks; ++rank)
               if (e.wire().faults.cut.has(rank)) out.push_back(rank);
             return out;
           })
      .def("num_faults", [](Endpoint& e) { return e.wire().faults.num_faults.load(); })
      .def("pause_pulse", [](Endpoint& e, i64 ms) { e.wire().faults.pulse_pause_ns.store(ms * kNsPerMs); })
      .def("set_partition_incarnation",
           [](Endpoint& e, i32 partition, u64 value) {
             const u64 at = e.context().at.header;
             reinterpret_cast<PartitionHeader*>(e.fabric().inbound(partition) + at)->incarnation = value;
           })
      .def("crash", [](Endpoint& e) { e.pulse().vanish(); }, py::call_guard<py::gil_scoped_release>());
}

#else

void bind_faults(py::module_& m, py::class_<Endpoint, std::shared_ptr<Endpoint>>&) { m.attr("has_hooks") = false; }

#endif

}  // namespace fa2a
