// The Python module: pointers and sizes in, plain tuples and dicts out. No torch header, so one build serves every
// torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/address.hpp"
#include "bindings/endpoint.hpp"
#include "host/clock.hpp"
#include "transport/local.hpp"

namespace py = pybind11;

namespace fa2a {

void bind_verdict(py::module_& m);
void bind_protocol(py::module_& m);
void bind_rows(py::module_& m);
DType dtype_named(const std::string& name);
void bind_joins(py::class_<Endpoint, std::shared_ptr<Endpoint>>& endpoint);
void bind_faults(py::module_& m, py::class_<Endpoint, std::shared_ptr<Endpoint>>& endpoint);
void bind_addresses(py::module_& m, py::class_<Endpoint, std::shared_ptr<Endpoint>>& endpoint);
void bind_cuda(py::module_& m, py::class_<Endpoint, std::shared_ptr<Endpoint>>& endpoint);

const char* name_of(Status status) {
  switch (status) {
    case Status::ok:
      return "ok";
    case Status::bad_expert:
      return "bad_expert";
    case Status::repeated_expert:
      return "repeated_expert";
    case Status::third_round:
      return "third_round";
    case Status::bad_handle:
      return "bad_handle";
    case Status::not_received:
      return "not_received";
    case Status::evicted:
      return "evicted";
    case Status::closed:
      return "closed";
    case Status::quorum_lost:
      return "quorum_lost";
    case Status::open_round:
      return "open_round";
    case Status::other_bytes:
      return "other_bytes";
  }
  return "?";
}

namespace {

std::vector<i32> ranks_of(const RankSet& set, i32 num_ranks) {
  std::vector<i32> out;
  for (i32 rank = 0; rank < num_ranks; ++rank)
    if (set.has(rank)) out.push_back(rank);
  return out;
}

py::dict to_dict(const ViewRecord& record) {
  py::dict out;
  out["epoch"] = record.epoch;
  out["first_round"] = record.first_round;
  out["active"] = record.active;
  out["incarnations"] = record.incarnations;
  out["reason"] = record.reason;
  return out;
}

// What is kept of a view, and what only the next decision needs; when it was installed is not told.
py::dict to_dict(const Decision& decision, i32 num_ranks) {
  py::dict out = to_dict(ViewRecord(decision, num_ranks, 0));
  out["partitions"] = std::vector<u16>(decision.view.partitions, decision.view.partitions + num_ranks);
  out["past_edges"] = std::vector<u32>(decision.past_edges, decision.past_edges + num_ranks);
  return out;
}

// What an arbiter hands back was written by a peer: every length is checked.
Decision from_dict(const py::dict& fields, i32 num_ranks) {
  Decision out;
  out.view.epoch = fields["epoch"].cast<u64>();
  out.view.first_round = fields["first_round"].cast<u64>();
  for (i32 rank : fields["active"].cast<std::vector<i32>>()) {
    if (rank < 0 || rank >= num_ranks) throw py::value_error("decision names rank " + std::to_string(rank));
    out.view.active.add(rank);
  }
  const auto incarnations = fields["incarnations"].cast<std::vector<u64>>();
  const auto partitions = fields["partitions"].cast<std::vector<u16>>();
  const auto past_edges = fields["past_edges"].cast<std::vector<u32>>();
  const auto n = static_cast<size_t>(num_ranks);
  if (incarnations.size() != n || partitions.size() != n || past_edges.size() != n)
    throw py::value_error("decision was made for another number of ranks");
  std::copy(incarnations.begin(), incarnations.end(), out.view.incarnations);
  std::copy(partitions.begin(), partitions.end(), out.view.partitions);
  std::copy(past_edges.begin(), past_edges.end(), out.past_edges);
  const std::string reason = fields["reason"].cast<std::string>();
  reason.copy(out.reason, sizeof out.reason - 1);
  return out;
}

Shape shape_of(const py::dict& fields) {
  Shape shape;
  shape.num_ranks = fields["num_ranks"].cast<i32>();
  shape.num_experts = fields["num_experts"].cast<i32>();
  shape.num_topk = fields["num_topk"].cast<i32>();
  shape.num_max_tokens = fields["num_max_tokens_per_rank"].cast<i32>();
  shape.num_chunk_tokens = fields["num_chunk_tokens"].cast<i32>();
  shape.dispatch_bytes = fields["dispatch_bytes"].cast<i32>();
  shape.max_local_experts = fields["max_local_experts"].cast<i32>();
  shape.hidden_bytes = fields["hidden_bytes"].cast<i32>();
  shape.num_spare_partitions = fields["num_spare_partitions"].cast<i32>();
  shape.reduce_at_expert = fields["reduce_at_expert"].cast<i32>();
  shape.collective_bytes = fields["max_collective_bytes"].cast<i32>();
  return shape;
}

WireFormat::Quantize quantize_named(const std::string& name) {
  if (name == "never") return WireFormat::Quantize::never;
  if (name == "float32") return WireFormat::Quantize::float32;
  if (name == "ue8m0") return WireFormat::Quantize::ue8m0;
  throw py::value_error("quantize must be never, float32 or ue8m0, not " + name);
}

Machine machine_named(const std::string& name) {
  if (name == "cpu") return Machine::cpu;
  if (name == "cuda-host") return Machine::cuda_host;
  if (name == "cuda") return Machine::cuda;
  throw py::value_error("machine must be cpu, cuda-host or cuda, not " + name);
}

EndpointConfig config_of(const py::dict& fields) {
  EndpointConfig config;
  config.shape = shape_of(fields);
  config.rank = fields["rank"].cast<i32>();
  config.dtype = dtype_named(fields["dtype"].cast<std::string>());
  config.packed = fields["packed"].cast<bool>();
  config.renormalize = fields["renormalize"].cast<bool>();
  config.weights_at_expert = fields["weights_at_expert"].cast<bool>();
  config.format.quantize = quantize_named(fields["quantize"].cast<std::string>());
  config.format.payload_bytes = fields["payload_bytes"].cast<u64>();
  config.format.scale_bytes = fields["scale_bytes"].cast<u64>();
  config.format.scales_at = fields["scales_at"].cast<u64>();
  config.expert_rank = fields["expert_rank"].cast<std::vector<i32>>();
  config.expert_local = fields["expert_local"].cast<std::vector<i32>>();
  config.num_local_experts = fields["num_local_experts"].cast<i32>();
  config.beat_ms = fields["beat_ms"].cast<i64>();
  config.silence_ms = fields["silence_ms"].cast<i64>();
  config.stall_ms = fields["stall_ms"].cast<i64>();
  config.link_ms = fields["link_ms"].cast<i64>();
  config.join_hold_ms = fields["join_hold_ms"].cast<i64>();
  config.settle_ms = fields["settle_ms"].cast<i64>();
  config.agreement_timeout_ms = fields["agreement_timeout_ms"].cast<i64>();
  config.agree_by_windows = fields["agree_by_windows"].cast<bool>();
  config.machine = machine_named(fields["machine"].cast<std::string>());
  if (const i32 num_sms = fields["num_sms"].cast<i32>(); num_sms > 0) config.twin.num_blocks = num_sms;
  config.num_sms = fields["num_sms"].cast<i32>();
  if (fields.contains("device")) config.device = fields["device"].cast<i32>();
  if (fields.contains("cubins"))
    for (const py::handle cubin : fields["cubins"]) config.cubins.push_back(cubin.cast<py::bytes>());
  if (fields.contains("twin_threads")) config.twin.num_threads = fields["twin_threads"].cast<i32>();
  if (fields.contains("twin_seed")) config.twin.seed = fields["twin_seed"].cast<u64>();
  if (fields.contains("twin_weak")) config.twin.weak = fields["twin_weak"].cast<bool>();
  config.num_founders = fields.contains("num_founders") ? fields["num_founders"].cast<i32>() : config.shape.num_ranks;
  if (fields.contains("first_round")) config.first_round = fields["first_round"].cast<u64>();
  if (fields.contains("first_epoch")) config.first_epoch = fields["first_epoch"].cast<u64>();
  if (fields.contains("poison")) config.poison = fields["poison"].cast<bool>();
  return config;
}

const char* name_of(Evidence kind) {
  switch (kind) {
    case Evidence::none:
      return "none";
    case Evidence::exit:
      return "exit";
    case Evidence::left:
      return "left";
    case Evidence::silence:
      return "silence";
    case Evidence::stall:
      return "stall";
    case Evidence::link:
      return "link";
  }
  return "?";
}

py::tuple to_tuple(const DispatchResult& result) {
  return py::make_tuple(name_of(result.status), result.round, result.num_received, result.token, result.choice,
                        result.value);
}

// Runs without the GIL: every one of these calls may wait for peers.
template <class Call>
auto unlocked(Call call) {
  py::gil_scoped_release release;
  return call();
}

py::tuple call_dispatch_send(Endpoint& endpoint, std::uintptr_t x, std::uintptr_t scales, std::uintptr_t topk_idx,
                             bool idx_is_64_bit, std::uintptr_t topk_weights, i32 num_tokens) {
  const DispatchArgs args{pointer<const u8>(x), pointer<const u8>(scales),          pointer<const void>(topk_idx),
                          idx_is_64_bit,        pointer<const float>(topk_weights), num_tokens};
  return to_tuple(unlocked([&] { return endpoint.dispatch_send(args); }));
}

py::tuple call_dispatch_receive(Endpoint& endpoint, u64 round, std::uintptr_t recv_x, std::uintptr_t recv_scales,
                                std::uintptr_t recv_weights, std::uintptr_t counts, std::uintptr_t offsets) {
  const ReceiveArgs args{round,
                         pointer<u8>(recv_x),
                         pointer<u8>(recv_scales),
                         pointer<float>(recv_weights),
                         pointer<i32>(counts),
                         pointer<i32>(offsets)};
  return to_tuple(unlocked([&] { return endpoint.dispatch_receive(args); }));
}

const char* call_combine_send(Endpoint& endpoint, std::uintptr_t y, u64 round) {
  const CombineArgs args{pointer<const u8>(y), round, /*abandon=*/false};
  return name_of(unlocked([&] { return endpoint.combine_send(args); }).status);
}

const char* call_combine_receive(Endpoint& endpoint, u64 round, std::uintptr_t out, std::uintptr_t codes,
                                 std::uintptr_t lost, std::uintptr_t topk_weights) {
  const ReduceArgs args{round, pointer<u8>(out), pointer<u8>(codes), pointer<u8>(lost),
                        pointer<const float>(topk_weights)};
  return name_of(unlocked([&] { return endpoint.combine_receive(args); }).status);
}

const char* call_abandon(Endpoint& endpoint, u64 round) {
  return name_of(unlocked([&] { return endpoint.abandon(round); }).status);
}

// (status, epoch of the view, rank that gave another number of bytes or -1)
py::tuple call_gather_all(Endpoint& endpoint, std::uintptr_t mine, u64 num_bytes, std::uintptr_t gathered,
                          std::uintptr_t contributed) {
  const CollectiveArgs args{pointer<const u8>(mine), num_bytes, pointer<u8>(gathered), pointer<u8>(contributed)};
  const CollectiveResult result = unlocked([&] { return endpoint.gather_all(args); });
  return py::make_tuple(name_of(result.status), result.epoch, result.odd_rank);
}

// (row of recv.x, local expert, src_rank, src token, choice) of every row that a round received.
std::vector<std::array<i32, 5>> sources(Endpoint& endpoint, u64 round) {
  std::vector<std::array<i32, 5>> out;
  const OpenRound* found = endpoint.received_of(round);
  if (found == nullptr) return out;
  const OpenRound& open = *found;
  for (i32 src = 0; src < endpoint.config().shape.num_ranks; ++src) {
    if (!open.taken.has(src)) continue;
    const auto first = static_cast<size_t>(open.received_from[static_cast<size_t>(src)]);
    const auto last = static_cast<size_t>(open.received_from[static_cast<size_t>(src) + 1]);
    for (size_t i = first; i < last; ++i) {
      const Received& row = open.received[i];
      out.push_back({row.position, row.local_expert, row.src_rank, row.src_token, row.choice});
    }
  }
  return out;
}

py::dict stats(Endpoint& endpoint) {
  py::dict out;
  out["num_rounds"] = endpoint.context().stats.num_rounds;
  out["num_rejected"] = endpoint.context().stats.num_rejected;
  out["num_rechecks"] = endpoint.context().stats.num_rechecks;
  out["num_lost"] = load_relaxed(&endpoint.context().stats.num_lost);
  out["num_unroutable"] = load_relaxed(&endpoint.context().stats.num_unroutable);
  out["next_round"] = endpoint.context().next_round;
  return out;
}

// One line a rank: wait_ns, late_ns, max_late_ns, num_rows, num_bytes, num_failures.
std::vector<std::array<u64, 6>> source_stats(Endpoint& endpoint) {
  std::vector<std::array<u64, 6>> out;
  for (const SourceStats& one : endpoint.context().sources)
    out.push_back({load_relaxed(&one.wait_ns), load_relaxed(&one.late_ns), load_relaxed(&one.max_late_ns),
                   load_relaxed(&one.num_rows), load_relaxed(&one.num_bytes), load_relaxed(&one.num_failures)});
  return out;
}

// The end of a rank waits for its device, where rounds of other ranks may run whose threads want the GIL to go on: who
// waited with it would stop every rank of the process.
void end_unlocked(Endpoint* endpoint) {
  if (PyGILState_Check() == 0) {
    delete endpoint;
    return;
  }
  py::gil_scoped_release release;
  delete endpoint;
}

void bind_endpoint(py::module_& m) {
  py::class_<LocalGroup, std::shared_ptr<LocalGroup>>(m, "LocalGroup").def(py::init([](const py::dict& shape) {
    return std::make_shared<LocalGroup>(shape_of(shape));
  }));
  py::class_<Endpoint, std::shared_ptr<Endpoint>> endpoint(m, "Endpoint");
  endpoint
      .def(py::init([](const py::dict& config, std::shared_ptr<LocalGroup> group, const std::string& token) {
             return std::shared_ptr<Endpoint>(new Endpoint(config_of(config), std::move(group), token), end_unlocked);
           }),
           py::arg("config"), py::arg("group") = nullptr, py::arg("token") = "")
      .def("create", &Endpoint::create, py::call_guard<py::gil_scoped_release>())
      .def("open_peers", &Endpoint::open_peers, py::arg("timeout_ms") = kConstructMs,
           py::call_guard<py::gil_scoped_release>())
      .def("serve", &Endpoint::serve)
      .def("dispatch_send", &call_dispatch_send)
      .def("dispatch_receive", &call_dispatch_receive)
      .def("combine_send", &call_combine_send)
      .def("combine_receive", &call_combine_receive, py::arg("round"), py::arg("out"), py::arg("codes"),
           py::arg("lost"), py::arg("topk_weights") = 0)
      .def("abandon", &call_abandon)
      .def("gather_all", &call_gather_all)
      .def("sources", &sources)
      .def("stats", &stats)
      .def("source_stats", &source_stats)
      .def("open_tokens", &Endpoint::open_tokens)
      .def("close", &Endpoint::close, py::call_guard<py::gil_scoped_release>())
      .def("crashed", &Endpoint::crashed)
      .def("set_timeouts", &Endpoint::set_timeouts)
      .def("current", [](Endpoint& e) { return to_dict(e.pulse().current(), e.config().shape.num_ranks); })
      .def(
          "views",
          [](Endpoint& e, u64 from_epoch) {
            py::list out;
            for (const ViewRecord& record : e.pulse().views(from_epoch))
              out.append(py::make_tuple(to_dict(record), record.installed_at_ns));
            return out;
          },
          py::arg("from_epoch") = 0)
      .def(
          "evidence",
          [](Endpoint& e, size_t num_known) {
            py::list out;
            for (const EvidenceRecord& record : e.pulse().evidence(num_known))
              out.append(py::make_tuple(record.rank, name_of(record.kind), record.at_ns));
            return out;
          },
          py::arg("num_known") = 0)
      .def("suspects", [](Endpoint& e) { return ranks_of(suspects_of(e.state()), e.config().shape.num_ranks); })
      .def("last_beat_ns", [](Endpoint& e, i32 rank) { return load_acquire(&e.fabric().page(rank).process_beat); })
      .def("fault_at_ns", [](Endpoint& e, i32 rank) { return load_acquire(&e.fabric().page(rank).fault_at_ns); })
      .def("next_proposal",
           [](Endpoint& e, i64 timeout_ms) -> py::object {
             std::optional<Decision> proposal;
             {
               py::gil_scoped_release release;
               proposal = e.pulse().next_proposal(timeout_ms * kNsPerMs);
             }
             if (!proposal) return py::none();
             return to_dict(*proposal, e.config().shape.num_ranks);
           })
      .def("learn",
           [](Endpoint& e, const py::dict& decision) {
             const Decision learned = from_dict(decision, e.config().shape.num_ranks);
             py::gil_scoped_release release;
             e.pulse().learn(learned);
           })
      .def("is_leaving", [](Endpoint& e) { return e.pulse().ending(); })
      .def("proposal_failed", [](Endpoint& e) { e.pulse().proposal_failed(); });
  bind_joins(endpoint);
  bind_faults(m, endpoint);
  bind_addresses(m, endpoint);
  bind_cuda(m, endpoint);
}

}  // namespace

PYBIND11_MODULE(FA2A_MODULE_NAME, m) {
  m.doc() = "fault_a2a's native core";
  m.def("now_ns", &now_ns);
  bind_protocol(m);
  bind_rows(m);
  bind_verdict(m);
  bind_endpoint(m);
  m.def("window_layout", [](const py::dict& fields) {
    const Shape shape = shape_of(fields);
    const PartitionLayout at = partition_layout(shape);
    py::dict out;
    out["partition_bytes"] = at.num_bytes;
    out["num_partitions"] = num_partitions(shape);
    out["window_bytes"] = window_bytes(shape);
    out["control_page_bytes"] = control_page_bytes();
    out["dispatch_stride"] = at.dispatch_stride;
    out["combine_stride"] = at.combine_stride;
    out["header_stride"] = at.header_stride;
    out["num_halves"] = at.num_halves;
    out["num_dispatch_rows"] = at.num_dispatch_rows;
    out["num_combine_rows"] = at.num_combine_rows;
    out["max_choices"] = at.max_choices;
    out["progress"] = at.progress;
    out["header"] = at.header;
    // Of the first chunk: kernels that read these have no streams.
    for (u32 verb = 0; verb < kNumVerbs; ++verb) {
      const std::string name = verb == static_cast<u32>(Verb::dispatch) ? "dispatch" : "combine";
      const auto& signal = at.signal[verb];
      out[py::str(name + "_signal")] = std::vector<u64>{signal[0][0], signal[1][0]};
      out[py::str(name + "_taken")] = std::vector<u64>(at.taken[verb], at.taken[verb] + kNumParities);
    }
    out["claims"] = std::vector<u64>(at.claims, at.claims + kNumParities);
    out["row_headers"] = std::vector<u64>(at.row_headers, at.row_headers + kNumParities);
    out["dispatch_rows"] = std::vector<u64>(at.dispatch_rows, at.dispatch_rows + kNumParities);
    out["combine_rows"] = std::vector<u64>(at.combine_rows, at.combine_rows + kNumParities);
    return out;
  });
}

}  // namespace fa2a
