// Joins, leaves and step starts as Python sees them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/endpoint.hpp"

namespace py = pybind11;

namespace fa2a {

const char* name_of(Status status);

namespace {

const char* name_of(JoinStage stage) {
  switch (stage) {
    case JoinStage::no_members:
      return "no_members";
    case JoinStage::member_unknown:
      return "member_unknown";
    case JoinStage::waits:
      return "waits";
    case JoinStage::in:
      return "in";
    case JoinStage::out:
      return "out";
  }
  return "?";
}

}  // namespace

void bind_joins(py::class_<Endpoint, std::shared_ptr<Endpoint>>& endpoint) {
  endpoint.def("create_newcomer", &Endpoint::create_newcomer, py::call_guard<py::gil_scoped_release>())
      .def("open_member", &Endpoint::open_member, py::call_guard<py::gil_scoped_release>())
      .def("go_on_joining",
           [](Endpoint& e) {
             JoinProgress progress;
             {
               py::gil_scoped_release release;
               progress = e.go_on_joining();
             }
             return py::make_tuple(name_of(progress.stage), progress.rank, progress.incarnation);
           })
      .def("serve_as_newcomer", &Endpoint::serve_as_newcomer)
      .def("begin_step",
           [](Endpoint& e) {
             bool left_out = false;
             Status status = Status::ok;
             {
               py::gil_scoped_release release;
               status = e.begin_step(left_out);
             }
             return py::make_tuple(fa2a::name_of(status), left_out);
           })
      .def("ask_to_leave", &Endpoint::ask_to_leave)
      .def("incarnation", [](Endpoint& e) { return e.fabric().page(e.config().rank).incarnation; })
      .def("page_fd", &Endpoint::page_fd);
}

}  // namespace fa2a
