// The protocol's pure pieces, for tests and tools: the signal word, the guards' names, the phases' names.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "protocol/guards.hpp"
#include "protocol/phases.hpp"
#include "protocol/signal.hpp"
#include "protocol/stall.hpp"

namespace py = pybind11;

namespace fa2a {

namespace {

u64 pack_signal(u64 round, u64 epoch, u64 count, u64 chunk, u64 attempt, bool last, bool declined) {
  Signal s;
  s.round = round;
  s.epoch = epoch;
  s.count = count;
  s.chunk = chunk;
  s.attempt = attempt;
  s.last = last;
  s.declined = declined;
  return pack(s);
}

py::dict unpack_signal(u64 word) {
  const Signal s = unpack(word);
  py::dict out;
  out["round"] = s.round;
  out["epoch"] = s.epoch;
  out["count"] = s.count;
  out["chunk"] = s.chunk;
  out["attempt"] = s.attempt;
  out["last"] = s.last;
  out["declined"] = s.declined;
  return out;
}

// One look of a waiting rank at a peer, which it last looked at `looked_ns`; `epoch`: of its newest view.
bool look_for_stall(StallWatch& watch, u64 progress, i64 now_ns, i64 looked_ns, i64 timeout_ns, u64 epoch) {
  const auto ring = std::make_unique<ViewRing>();
  ring->views[0].epoch = epoch;
  return has_stalled(watch, progress, now_ns, looked_ns, timeout_ns, *ring);
}

const char* name_of(Reading reading) {
  switch (reading) {
    case Reading::absent:
      return "absent";
    case Reading::present:
      return "present";
    case Reading::declined:
      return "declined";
  }
  return "?";
}

}  // namespace

void bind_protocol(py::module_& m) {
  m.def("pack_signal", &pack_signal, py::arg("round"), py::arg("epoch"), py::arg("count"), py::arg("chunk") = 0,
        py::arg("attempt") = 0, py::arg("last") = true, py::arg("declined") = false);
  m.def("unpack_signal", &unpack_signal);
  m.def(
      "read_signal",
      [](u64 word, u64 round, u64 epoch, u64 chunk) { return name_of(read_signal(word, round, epoch, chunk)); },
      py::arg("word"), py::arg("round"), py::arg("epoch"), py::arg("chunk") = 0);
  m.def("read_taken", [](u64 word, u64 round, u64 chunk) { return name_of(read_taken(word, round, chunk)); });
  m.def("rounds_ahead", &rounds_ahead);
  py::class_<StallWatch>(m, "StallWatch")
      .def(py::init([] { return StallWatch{}; }))
      .def("has_stalled", &look_for_stall, py::kw_only(), py::arg("progress"), py::arg("now_ns"), py::arg("looked_ns"),
           py::arg("timeout_ns"), py::arg("epoch"));
  m.def("slot_is_free", &slot_is_free);
  m.def("fresh_word", &fresh_word);
  m.def("guard_names", [] {
    return std::vector<std::string>{
#define FA2A_GUARD_TEXT(name) #name,
        FA2A_GUARDS(FA2A_GUARD_TEXT)
#undef FA2A_GUARD_TEXT
    };
  });
  m.def("phases", [] {
    return std::vector<std::string>{
#define FA2A_POINT_TEXT(name, text) text,
        FA2A_PHASES(FA2A_POINT_TEXT)
#undef FA2A_POINT_TEXT
    };
  });
}

}  // namespace fa2a
