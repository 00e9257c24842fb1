// What Python asks of a rank on a GPU beyond the verbs: streams, and launches that nobody waits for.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "bindings/address.hpp"
#include "bindings/endpoint.hpp"
#include "host/clock.hpp"
#include "kernels/cuda/host/driver_gpu.hpp"
#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS
#include "kernels/cuda/twin/driver.hpp"
#endif

namespace py = pybind11;

namespace fa2a {

namespace {

using device::DeviceHandle;

cuda::Rank& rank_of(Endpoint& endpoint) {
  if (endpoint.cuda() == nullptr)
    throw py::value_error("this rank has no kernels on a GPU; construct it with backend=\"cuda\"");
  return *endpoint.cuda();
}

void launch_dispatch_send(Endpoint& e, Address x, Address scales, Address topk_idx, bool idx_is_64_bit,
                          Address topk_weights, i32 num_tokens, Address handle) {
  rank_of(e).launch_dispatch_send({pointer<const u8>(x), pointer<const u8>(scales), pointer<const void>(topk_idx),
                                   idx_is_64_bit, pointer<const float>(topk_weights), num_tokens},
                                  pointer<DeviceHandle>(handle));
}

void launch_dispatch_receive(Endpoint& e, Address recv_x, Address recv_scales, Address recv_weights, Address counts,
                             Address offsets, Address handle) {
  rank_of(e).launch_dispatch_receive({0, pointer<u8>(recv_x), pointer<u8>(recv_scales), pointer<float>(recv_weights),
                                      pointer<i32>(counts), pointer<i32>(offsets)},
                                     pointer<DeviceHandle>(handle));
}

void launch_combine_send(Endpoint& e, Address y, Address handle) {
  rank_of(e).launch_combine_send({pointer<const u8>(y), 0, /*abandon=*/false}, pointer<DeviceHandle>(handle));
}

void launch_combine_receive(Endpoint& e, Address out, Address codes, Address lost, Address topk_weights, i32 num_tokens,
                            Address handle) {
  rank_of(e).launch_combine_receive(
      {0, pointer<u8>(out), pointer<u8>(codes), pointer<u8>(lost), pointer<const float>(topk_weights)}, num_tokens,
      pointer<DeviceHandle>(handle));
}

// Of the device with that number, or of the machine: why windows there cannot be handed over, "" if they can.
std::string why_no_windows(i32 device, bool across_hosts) {
  std::string why;
  const cuda::Driver* driver = find_driver(why);
  if (driver == nullptr) return why;
  return cuda::why_no_handles(*driver, device, across_hosts ? cuda::kFabric : cuda::kFileDescriptor);
}

#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS
// Where partitions lie in the device's memory: of this rank's window, and this rank's in the windows of others.
py::tuple window_addresses(Endpoint& e) {
  std::vector<Address> inbound, outbound;
  for (i32 partition = 0; partition < num_partitions(e.config().shape); ++partition)
    inbound.push_back(e.windows()->inbound(partition));
  for (i32 owner = 0; owner < e.config().shape.num_ranks; ++owner) outbound.push_back(e.windows()->outbound(owner));
  return py::make_tuple(inbound, outbound);
}

// Does the door of `owner` hand over that partition of its window in time?
bool ask_door(Endpoint& e, i32 owner, i32 partition, i64 timeout_ms) {
  const i32 file = Door::ask(e.fabric().page(owner).incarnation, partition, timeout_ms * kNsPerMs);
  if (file >= 0) ::close(file);
  return file >= 0;
}
#endif

}  // namespace

void bind_cuda(py::module_& m, py::class_<Endpoint, std::shared_ptr<Endpoint>>& endpoint) {
  m.attr("device_rank_bytes") = sizeof(device::DeviceRank);
  m.def("set_stream", &cuda::set_stream);
  m.def("why_no_windows", &why_no_windows, py::arg("device"), py::arg("across_hosts"));
  // The launches return before their kernels run; without a GPU, with the twin, after.
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  endpoint.def("refresh", &Endpoint::refresh, Unlocked())
      .def("launch_dispatch_send", &launch_dispatch_send, Unlocked())
      .def("launch_dispatch_receive", &launch_dispatch_receive, Unlocked())
      .def("launch_combine_send", &launch_combine_send, Unlocked())
      .def("launch_combine_receive", &launch_combine_receive, Unlocked());
#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS
  m.def("begin_twin_capture", &twin::begin_capture);
  m.def("end_twin_capture", &twin::end_capture);
  m.def("replay_twin", &twin::replay, Unlocked());
  m.def("hold_twin_launches", &twin::hold_launches);
  m.def("slow_twin_driver", &twin::slow_down, py::arg("access_ms") = 0, py::arg("export_ms") = 0,
        py::arg("finish_ms") = 0);
  endpoint.def("window_addresses", &window_addresses)
      .def("ask_door", &ask_door, py::arg("owner"), py::arg("partition"), py::arg("timeout_ms"), Unlocked());
#endif
}

}  // namespace fa2a
