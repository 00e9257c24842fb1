// What kernels outside the core need to speak its protocol: where each word of a rank lies, what its bits mean, and how
// to ring a peer. Nothing here executes a round.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <stddef.h>

#include "bindings/endpoint.hpp"
#include "host/doorbell.hpp"

namespace py = pybind11;

namespace fa2a {

namespace {

std::uintptr_t address(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

template <class Field>
py::tuple field() {
  return py::make_tuple(Field::shift, Field::bits);
}

py::dict fields_of_words() {
  py::dict out;
  out["round"] = field<signal_field::Round>();
  out["epoch"] = field<signal_field::Epoch>();
  out["count"] = field<signal_field::Count>();
  out["chunk"] = field<signal_field::Chunk>();
  out["attempt"] = field<signal_field::Attempt>();
  out["last"] = field<signal_field::Last>();
  out["declined"] = field<signal_field::Declined>();
  out["phase"] = field<progress_field::Phase>();
  out["tick"] = field<progress_field::Tick>();
  return out;
}

// Bytes from the beginning of the rank's own words, of a view in their ring, of a control page, of a row header.
py::dict offsets_of_words() {
  py::dict out;
  out["started"] = offsetof(RankState, started);
  out["round_limit"] = offsetof(RankState, round_limit);
  out["suspects"] = offsetof(RankState, suspects);
  out["release"] = offsetof(RankState, release);
  out["newest"] = offsetof(RankState, ring) + offsetof(ViewRing, newest);
  out["views"] = offsetof(RankState, ring) + offsetof(ViewRing, views);
  out["waiting_since_ns"] = offsetof(RankState, waiting_in_round) + offsetof(Waiting, since_ns);
  out["waiting_peer"] = offsetof(RankState, waiting_in_round) + offsetof(Waiting, peer);
  out["waiting_word"] = offsetof(RankState, waiting_in_round) + offsetof(Waiting, word);
  out["stall_ns"] = offsetof(RankState, stall_ns);
  out["view_stride"] = sizeof(View);
  out["view_epoch"] = offsetof(View, epoch);
  out["view_first_round"] = offsetof(View, first_round);
  out["view_active"] = offsetof(View, active);
  out["view_incarnations"] = offsetof(View, incarnations);
  out["view_partitions"] = offsetof(View, partitions);
  out["page_progress"] = offsetof(ControlPage, progress);
  out["page_sent"] = offsetof(ControlPage, sent);
  out["sent_stride"] = sizeof(SentWords);
  out["incarnation"] = offsetof(PartitionHeader, incarnation);
  out["header_token"] = offsetof(RowHeader, src_token);
  out["header_num_choices"] = offsetof(RowHeader, num_choices);
  out["header_choices"] = sizeof(RowHeader);
  out["choice_stride"] = sizeof(RowChoice);
  out["choice_expert"] = offsetof(RowChoice, local_expert);
  out["choice_k"] = offsetof(RowChoice, choice);
  out["choice_weight"] = offsetof(RowChoice, weight);
  return out;
}

py::dict numbers_of_words() {
  py::dict out;
  out["max_ranks"] = kMaxRanks;
  out["num_views"] = kNumViews;
  out["num_parities"] = kNumParities;
  out["release_evicted"] = static_cast<u64>(release_evicted);
  out["release_closing"] = static_cast<u64>(release_closing);
  out["phase_gate"] = static_cast<u32>(Phase::gate);
  out["phase_dispatch_send"] = static_cast<u32>(Phase::dispatch_send);
  out["phase_dispatch_wait"] = static_cast<u32>(Phase::dispatch_wait);
  out["phase_caller"] = static_cast<u32>(Phase::caller);
  out["phase_combine_send"] = static_cast<u32>(Phase::combine_send);
  out["phase_combine_wait"] = static_cast<u32>(Phase::combine_wait);
  out["phase_closed"] = static_cast<u32>(Phase::closed);
  out["kind_dispatch_signal"] = static_cast<u32>(WordKind::dispatch_signal);
  out["kind_combine_signal"] = static_cast<u32>(WordKind::combine_signal);
  out["kind_dispatch_taken"] = static_cast<u32>(WordKind::dispatch_taken);
  out["kind_combine_taken"] = static_cast<u32>(WordKind::combine_taken);
  out["outcome_none"] = static_cast<u32>(Outcome::none);
  out["outcome_delivered"] = static_cast<u32>(Outcome::delivered);
  out["outcome_lost"] = static_cast<u32>(Outcome::lost);
  out["outcome_unroutable"] = static_cast<u32>(Outcome::unroutable);
  return out;
}

// Where this rank's words, windows and page lie in this process. They stay there until its endpoint is gone.
py::dict addresses(Endpoint& endpoint) {
  const Fabric& fabric = endpoint.fabric();
  std::vector<std::uintptr_t> inbound, outbound;
  for (i32 partition = 0; partition < num_partitions(endpoint.config().shape); ++partition)
    inbound.push_back(address(fabric.inbound(partition)));
  for (i32 owner = 0; owner < fabric.num_ranks(); ++owner) outbound.push_back(address(fabric.outbound(owner)));
  py::dict out;
  out["state"] = address(&endpoint.state());
  out["page"] = address(&fabric.page(endpoint.config().rank));
  out["inbound"] = inbound;
  out["outbound"] = outbound;
  return out;
}

// How a rank whose kernels poll in slices rests between two of them. In this order: listen, look at the words, sleep;
// a ring between look and sleep would be lost in any other.
class Rest {
 public:
  explicit Rest(std::shared_ptr<Endpoint> endpoint)
      : endpoint_(std::move(endpoint)), waiter_(endpoint_->fabric().page(endpoint_->config().rank)) {}
  u32 listen() const { return waiter_.listen(); }
  void sleep(u32 heard) const { waiter_.sleep(heard, endpoint_->context().tick_ns); }

 private:
  std::shared_ptr<Endpoint> endpoint_;
  DoorbellWaiter waiter_;
};

void ring(Endpoint& endpoint) {
  for (i32 rank = 0; rank < endpoint.fabric().num_ranks(); ++rank) ring_doorbell(endpoint.fabric().page(rank));
}

}  // namespace

const char* name_of(Status status);

void bind_addresses(py::module_& m, py::class_<Endpoint, std::shared_ptr<Endpoint>>& endpoint) {
  m.def("word_fields", &fields_of_words);
  m.def("word_offsets", &offsets_of_words);
  m.def("word_numbers", &numbers_of_words);
  py::class_<Rest>(m, "Rest")
      .def(py::init<std::shared_ptr<Endpoint>>())
      .def("listen", &Rest::listen)
      .def("sleep", &Rest::sleep, py::call_guard<py::gil_scoped_release>());
  endpoint.def("addresses", &addresses)
      .def("ring", &ring)
      .def("tick_ns", [](Endpoint& e) { return e.context().tick_ns; })
      .def("status", [](Endpoint& e) { return name_of(e.closed() ? Status::closed : released_status(e.state())); })
      // What the core's own waits, those of collectives, take for this rank's next round.
      .def("set_next_round", [](Endpoint& e, u64 round) { e.context().next_round = round; })
      // Ends every wait of this rank; whoever runs its kernels then answers open rounds, and closes it.
      .def("end_waits", [](Endpoint& e) {
        fetch_or(&e.state().release, release_closing);
        ring_doorbell(e.fabric().page(e.config().rank));
      });
}

}  // namespace fa2a
