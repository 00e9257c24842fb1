// The protocol's pure pieces, for tests and tools: the signal word, the guards' names, the phases' names.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "protocol/guards.hpp"
#include "protocol/phases.hpp"
#include "protocol/signal.hpp"

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
