// The host's side of the kernels: memory, addresses, and launches in order.
#include "kernels/cuda/host/rank.hpp"

namespace fa2a {
namespace cuda {

using device::DeviceHandle;
using device::DeviceRank;
using device::DeviceRound;
using device::Kernel;
using device::Step;

namespace {

Stage stage_of(const DeviceRound& round) {
  switch (static_cast<Step>(round.step)) {
    case Step::closed:
      return Stage::closed;
    case Step::routed:
    case Step::sent:
    case Step::collected:
      return Stage::sent;
    case Step::received:
      return Stage::received;
    case Step::answered:
    case Step::gathered:
      return Stage::answered;
  }
  return Stage::closed;
}

}  // namespace

Rank::Rank(Context& context, std::unique_ptr<Gpu> gpu, const WindowAddresses& windows)
    : c_(context), gpu_(std::move(gpu)), windows_(windows) {
  DeviceRank& r = copy_;
  r.shape = c_.shape;
  r.at = c_.at;
  r.rank = c_.rank;
  r.dtype = c_.dtype;
  r.packed = c_.packed;
  r.renormalize = c_.renormalize;
  r.weights_at_expert = c_.weights_at_expert;
  r.format = c_.format;
  r.num_local_experts = c_.num_local_experts;
  r.tick_ns = c_.tick_ns;
  r.state = static_cast<RankState*>(gpu_->share(c_.state, sizeof(RankState)));
  r.page = static_cast<ControlPage*>(gpu_->share(&c_.fabric->page(c_.rank), control_page_bytes()));
  r.host = c_.wire;
  r.expert_rank = reinterpret_cast<i32*>(copy_of(c_.expert_rank.data(), sizeof(i32) * c_.expert_rank.size()));
  r.expert_local = reinterpret_cast<i32*>(copy_of(c_.expert_local.data(), sizeof(i32) * c_.expert_local.size()));
  r.inbound = reinterpret_cast<u8**>(copy_of(windows_.inbound.data(), sizeof(u8*) * windows_.inbound.size()));
  outbound_ = copy_of(windows_.outbound.data(), sizeof(u8*) * windows_.outbound.size());
  r.outbound = reinterpret_cast<u8**>(outbound_);
  r.next_round = c_.next_round;
  r.next_collective = c_.next_collective;
  device::place_rank(r, gpu_->allocate(device::place_rank(r, nullptr)));
  rank_ = reinterpret_cast<DeviceRank*>(copy_of(&r, sizeof r));
  handles_ = reinterpret_cast<DeviceHandle*>(gpu_->allocate(sizeof(DeviceHandle) * (kNumParities + 1)));
}

Rank::~Rank() = default;

u8* Rank::copy_of(const void* host, u64 num_bytes) {
  u8* there = gpu_->allocate(num_bytes);
  gpu_->upload(there, host, num_bytes);
  return there;
}

void Rank::launch(Kernel kernel, i32 num_blocks, const void* arguments, DeviceHandle* handle) {
  gpu_->launch({kernel, num_blocks, rank_, arguments, handle});
}

// Nothing of it changes between two launches that a graph holds; what does, the kernels find in device memory.
void Rank::tell_settings() {
  // Of a newcomer, told after it was set up; otherwise kernels move it on.
  if (copy_.next_round != c_.next_round)
    gpu_->upload(&rank_->next_round, &(copy_.next_round = c_.next_round), sizeof(u64));
  if (copy_.next_collective != c_.next_collective)
    gpu_->upload(&rank_->next_collective, &(copy_.next_collective = c_.next_collective), sizeof(u64));
#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS
  if (sunk_ == c_.wire->faults.cut) return;
  sunk_ = c_.wire->faults.cut;
  if (sink_ == nullptr) sink_ = gpu_->allocate(c_.at.num_bytes);
  tell_outbound();
#endif
}

void Rank::set_outbound(i32 owner, u8* partition) {
  windows_.outbound[static_cast<size_t>(owner)] = partition;
  tell_outbound();
}

void Rank::tell_outbound() {
  std::vector<u8*> outbound = windows_.outbound;
  for (i32 dst = 0; dst < c_.shape.num_ranks; ++dst)
    if (sunk_.has(dst)) outbound[static_cast<size_t>(dst)] = sink_;
  gpu_->upload(outbound_, outbound.data(), sizeof(u8*) * outbound.size());
}

// Brings the host's bookkeeping up to date, which answers questions about rounds.
void Rank::refresh() {
  gpu_->download(&copy_, rank_, sizeof copy_);
  for (u32 parity = 0; parity < kNumParities; ++parity) {
    const DeviceRound& from = copy_.rounds[parity];
    OpenRound& to = c_.rounds[parity];
    to.stage = stage_of(from);
    to.round = from.round;
    to.epoch = from.epoch;
    to.active = from.active;
    to.taken = from.taken;
    to.partitions.assign(from.partitions, from.partitions + c_.shape.num_ranks);
    to.num_tokens = from.num_tokens;
  }
  c_.next_round = copy_.next_round;
  c_.stats.num_rounds = copy_.stats.num_rounds;
  c_.stats.num_rejected = copy_.stats.num_rejected;
  c_.stats.num_rechecks = copy_.stats.num_rechecks;
  store_relaxed(&c_.stats.num_lost, copy_.stats.num_lost);
  store_relaxed(&c_.stats.num_unroutable, copy_.stats.num_unroutable);
  std::vector<SourceStats> sources(c_.sources.size());
  gpu_->download(sources.data(), copy_.sources, sizeof(SourceStats) * sources.size());
  for (size_t peer = 0; peer < sources.size(); ++peer) {
    store_relaxed(&c_.sources[peer].wait_ns, sources[peer].wait_ns);
    store_relaxed(&c_.sources[peer].late_ns, sources[peer].late_ns);
    store_relaxed(&c_.sources[peer].max_late_ns, sources[peer].max_late_ns);
    store_relaxed(&c_.sources[peer].num_rows, sources[peer].num_rows);
    store_relaxed(&c_.sources[peer].num_bytes, sources[peer].num_bytes);
    store_relaxed(&c_.sources[peer].num_failures, sources[peer].num_failures);
  }
}

void Rank::list_received(u64 round) {
  refresh();
  const DeviceRound& from = copy_.rounds[round % kNumParities];
  OpenRound& to = c_.rounds[round % kNumParities];
  std::vector<i32> num_choices(static_cast<size_t>(c_.shape.num_ranks));
  gpu_->download(num_choices.data(), from.num_choices_from, sizeof(i32) * num_choices.size());
  to.received.clear();
  to.received_from.assign(1, 0);
  for (i32 src = 0; src < c_.shape.num_ranks; ++src) {
    const size_t before = to.received.size();
    const i32 count = from.taken.has(src) ? num_choices[static_cast<size_t>(src)] : 0;
    to.received.resize(before + static_cast<size_t>(count));
    if (count > 0)
      gpu_->download(to.received.data() + before, from.received + static_cast<i64>(src) * copy_.received_stride(),
                     sizeof(Received) * static_cast<u64>(count));
    to.received_from.push_back(static_cast<i32>(to.received.size()));
  }
}

void Rank::launch_dispatch_send(const DispatchArgs& args, DeviceHandle* handle) {
  const device::RouteArgs route{args.topk_idx, args.idx_is_64_bit, args.topk_weights, args.num_tokens};
  const device::SendArgs send{args.x, args.scales};
  launch(Kernel::dispatch_route, 1, &route, handle);
  if (!copy_.is_streaming()) return launch(Kernel::dispatch_send, gpu_->num_blocks(), &send, handle);
  launch(Kernel::stream_open_rows, 1, &send, handle);
  launch(Kernel::stream_send_rows, gpu_->num_blocks(), &send, handle);
}

void Rank::launch_dispatch_receive(const ReceiveArgs& args, DeviceHandle* handle) {
  const device::ReceivedTensors out{args.recv_x, args.recv_scales, args.recv_weights, args.num_tokens_per_expert,
                                    args.offsets};
  launch(Kernel::dispatch_collect, 1, &out, handle);
  launch(Kernel::dispatch_expand, gpu_->num_blocks(), &out, handle);
}

void Rank::launch_combine_send(const CombineArgs& args, DeviceHandle* handle) {
  const device::AnswerArgs answer{args.y, args.abandon};
  if (copy_.is_streaming()) {
    launch(Kernel::stream_open_answers, 1, &answer, handle);
    return launch(Kernel::stream_send_answers, gpu_->num_blocks(), &answer, handle);
  }
  launch(Kernel::combine_answer, args.abandon ? 1 : gpu_->num_blocks(), &answer, handle);
}

void Rank::launch_combine_receive(const ReduceArgs& args, i32 num_tokens, DeviceHandle* handle) {
  const device::GatherArgs gather{/*abandon=*/false};
  const device::ReduceTensors to{args.out, args.codes, args.lost, num_tokens, args.topk_weights};
  launch(Kernel::combine_gather, 1, &gather, handle);
  launch(Kernel::combine_reduce, gpu_->num_blocks(), &to, handle);
}

// A stream's receiving half has as many launches as it takes. They go out several pairs at a time, because to look
// costs a trip to the device and back; those that find the half at its end do nothing.
template <class Wait, class Move>
void Rank::launch_stream(u64 round, Step under_way, Kernel wait, const Wait& waits, Kernel move, const Move& moves) {
  constexpr i32 kNumAhead = 4;
  DeviceHandle* const handle = handle_of(round);
  DeviceHandle seen;
  u64 step = 0;
  do {
    for (i32 i = 0; i < kNumAhead; ++i) {
      launch(wait, 1, &waits, handle);
      launch(move, gpu_->num_blocks(), &moves, handle);
    }
    gpu_->finish();
    gpu_->download(&step, &rank_->rounds[round % kNumParities].step, sizeof step);
    gpu_->download(&seen, handle, sizeof seen);
  } while (step == static_cast<u64>(under_way) && seen.ended == Status::ok && !gpu_->is_stuck());
}

// What a handle holds once everything that was launched with it is done.
DeviceHandle Rank::finished(const DeviceHandle* handle) {
  gpu_->finish();
  refresh();
  DeviceHandle result;
  gpu_->download(&result, handle, sizeof result);
  return result;
}

DispatchResult Rank::dispatch_send(const DispatchArgs& args) {
  tell_settings();
  // Not the lane's handle: a third round would overwrite that of the one which is open there.
  DeviceHandle* fresh = handles_ + kNumParities;
  launch_dispatch_send(args, fresh);
  const DeviceHandle handle = finished(fresh);
  if (handle.status == Status::ok) gpu_->upload(handle_of(handle.round), &handle, sizeof handle);
  return {handle.status, handle.round, 0, handle.token, handle.choice, handle.value};
}

DispatchResult Rank::dispatch_receive(const ReceiveArgs& args) {
  DispatchResult result;
  result.round = args.round;
  const OpenRound& open = c_.rounds[args.round % kNumParities];
  if (open.round != args.round || open.stage != Stage::sent) {
    result.status = Status::bad_handle;
    return result;
  }
  tell_settings();
  if (copy_.is_streaming()) {
    const device::ReceivedTensors out{args.recv_x, args.recv_scales, args.recv_weights, args.num_tokens_per_expert,
                                      args.offsets};
    launch_stream(args.round, Step::collected, Kernel::stream_collect, out, Kernel::stream_expand, out);
  } else {
    launch_dispatch_receive(args, handle_of(args.round));
  }
  result.status = finished(handle_of(args.round)).ended;
  if (result.status == Status::ok) result.num_received = copy_.rounds[args.round % kNumParities].num_received;
  return result;
}

CombineResult Rank::combine_send(const CombineArgs& args) {
  const OpenRound& open = c_.rounds[args.round % kNumParities];
  if (open.round != args.round || open.stage == Stage::closed || open.stage == Stage::answered)
    return {Status::bad_handle, 0};
  if (open.stage == Stage::sent && !args.abandon) return {Status::not_received, 0};
  tell_settings();
  launch_combine_send(args, handle_of(args.round));
  finished(handle_of(args.round));
  return {};
}

CombineResult Rank::gather(u64 round, const ReduceArgs* args) {
  tell_settings();
  if (copy_.is_streaming()) {
    const device::GatherArgs gather{/*abandon=*/args == nullptr};
    device::ReduceTensors to{};
    if (args != nullptr) to = {args->out, args->codes, args->lost, 0, args->topk_weights};
    launch_stream(round, Step::gathered, Kernel::stream_gather, gather, Kernel::stream_reduce, to);
  } else if (args != nullptr) {
    launch_combine_receive(*args, c_.rounds[round % kNumParities].num_tokens, handle_of(round));
  } else {
    const device::GatherArgs gather{/*abandon=*/true};
    launch(Kernel::combine_gather, 1, &gather, handle_of(round));
  }
  const DeviceHandle handle = finished(handle_of(round));
  return {handle.ended, static_cast<i64>(copy_.rounds[round % kNumParities].num_lost)};
}

CombineResult Rank::combine_receive(const ReduceArgs& args) {
  const OpenRound& open = c_.rounds[args.round % kNumParities];
  if (open.round != args.round || open.stage != Stage::answered) return {Status::bad_handle, 0};
  return gather(args.round, &args);
}

CombineResult Rank::abandon(u64 round) {
  const OpenRound& open = c_.rounds[round % kNumParities];
  if (open.stage == Stage::closed || open.round != round) return {Status::bad_handle, 0};
  if (open.stage != Stage::answered) {
    const CombineResult sent = combine_send({nullptr, round, /*abandon=*/true});
    if (sent.status != Status::ok) return sent;
  }
  return gather(round, nullptr);
}

}  // namespace cuda
}  // namespace fa2a
