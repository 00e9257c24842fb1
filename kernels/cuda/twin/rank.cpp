// The host's side of the kernels, as it is on a GPU: memory, addresses, and launches in order.
#include "kernels/cuda/twin/rank.hpp"

#include "kernels/cuda/combine.cu"
#include "kernels/cuda/dispatch.cu"
#include "kernels/cuda/expand.cu"
#include "kernels/cuda/reduce.cu"
#include "kernels/cuda/twin/grid.hpp"
#include "kernels/cuda/twin/idle.hpp"

namespace fa2a {
namespace twin {

using device::DeviceHandle;
using device::DeviceRound;
using device::Step;

struct TwinRank::Device {
  device::DeviceRank rank{};
  DeviceHandle handles[kNumParities]{};
  std::vector<u8> memory;
  std::vector<u8*> inbound, outbound;
  std::vector<u8> sink;  // stands in for the windows of peers to whom everything is lost
  Grid grid;

  explicit Device(const Grid::Options& options) : grid(options) {}
};

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

TwinRank::TwinRank(Context& context, const TwinOptions& options)
    : c_(context), options_(options), device_(new Device({options.seed, options.weak})) {
  device::DeviceRank& r = device_->rank;
  r.shape = c_.shape;
  r.at = c_.at;
  r.rank = c_.rank;
  r.dtype = c_.dtype;
  r.packed = c_.packed;
  r.renormalize = c_.renormalize;
  r.weights_at_expert = c_.weights_at_expert;
  r.format = c_.format;
  r.num_local_experts = c_.num_local_experts;
  r.state = c_.state;
  r.page = &c_.fabric->page(c_.rank);
  r.host = c_.wire;
  r.expert_rank = c_.expert_rank.data();
  r.expert_local = c_.expert_local.data();
  r.next_round = c_.next_round;
  device_->memory.assign(device::place_rank(r, nullptr) + sizeof(device::Vector16), 0);
  // Cursors place from a multiple of 16 on.
  u8* memory = device_->memory.data();
  memory += (16 - reinterpret_cast<u64>(memory) % 16) % 16;
  device::place_rank(r, memory);
  for (i32 partition = 0; partition < num_partitions(c_.shape); ++partition)
    device_->inbound.push_back(c_.fabric->inbound(partition));
  device_->outbound.assign(static_cast<size_t>(c_.shape.num_ranks), nullptr);
  r.inbound = device_->inbound.data();
  r.outbound = device_->outbound.data();
}

TwinRank::~TwinRank() = default;

template <class Kernel>
void TwinRank::launch(i32 num_blocks, Kernel kernel) {
  DoorbellIdle idle(c_.fabric->page(c_.rank), c_.tick_ns);
  const GridShape shape{num_blocks, options_.num_threads};
  if (!device_->grid.run(shape, idle, kernel)) is_stuck_ = true;
}

// What the host may have changed between two calls.
void TwinRank::before_call() {
  device_->rank.tick_ns = c_.tick_ns;
  device_->rank.next_round = c_.next_round;  // of a newcomer, told after it was set up
  device_->rank.next_collective = c_.next_collective;
  device_->rank.progress_tick = c_.progress_tick;
  for (i32 dst = 0; dst < c_.shape.num_ranks; ++dst) {
    u8* to = c_.fabric->outbound(dst);
#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS
    if (c_.wire->faults.cut.has(dst)) {
      device_->sink.resize(c_.at.num_bytes + kPage);
      to = device_->sink.data() + (kPage - reinterpret_cast<u64>(device_->sink.data()) % kPage) % kPage;
    }
#endif
    device_->outbound[static_cast<size_t>(dst)] = to;
  }
}

// Brings the host's bookkeeping up to date, which answers questions about rounds.
void TwinRank::after_call(u64 round) {
  const DeviceRound& from = device_->rank.rounds[round % kNumParities];
  OpenRound& to = c_.rounds[round % kNumParities];
  to.stage = stage_of(from);
  to.round = from.round;
  to.epoch = from.epoch;
  to.active = from.active;
  to.taken = from.taken;
  to.partitions.assign(from.partitions, from.partitions + c_.shape.num_ranks);
  to.num_tokens = from.num_tokens;
  c_.progress_tick = device_->rank.progress_tick;
  c_.next_round = device_->rank.next_round;
  c_.stats = device_->rank.stats;
  for (size_t peer = 0; peer < c_.sources.size(); ++peer) {
    const SourceStats& stats = device_->rank.sources[peer];
    store_relaxed(&c_.sources[peer].wait_ns, stats.wait_ns);
    store_relaxed(&c_.sources[peer].late_ns, stats.late_ns);
    store_relaxed(&c_.sources[peer].max_late_ns, stats.max_late_ns);
    store_relaxed(&c_.sources[peer].num_rows, stats.num_rows);
    store_relaxed(&c_.sources[peer].num_bytes, stats.num_bytes);
    store_relaxed(&c_.sources[peer].num_failures, stats.num_failures);
  }
}

void TwinRank::list_received(u64 round) {
  const device::DeviceRank& r = device_->rank;
  const DeviceRound& from = r.rounds[round % kNumParities];
  OpenRound& to = c_.rounds[round % kNumParities];
  to.received.clear();
  to.received_from.assign(1, 0);
  for (i32 src = 0; src < c_.shape.num_ranks; ++src) {
    const Received* first = from.received + static_cast<i64>(src) * r.received_stride();
    if (from.taken.has(src)) to.received.insert(to.received.end(), first, first + from.num_choices_from[src]);
    to.received_from.push_back(static_cast<i32>(to.received.size()));
  }
}

DispatchResult TwinRank::dispatch_send(const DispatchArgs& args) {
  before_call();
  DeviceHandle handle{};
  const device::RouteArgs route{args.topk_idx, args.idx_is_64_bit, args.topk_weights, args.num_tokens};
  launch(1, [&] { device::dispatch_route(&device_->rank, route, &handle); });
  const DispatchResult result{handle.status, handle.round, 0, handle.token, handle.choice, handle.value};
  if (handle.status != Status::ok) return result;
  device_->handles[handle.round % kNumParities] = handle;
  const device::SendArgs send{args.x, args.scales};
  launch(options_.num_blocks, [&] { device::dispatch_send(&device_->rank, send, &handle); });
  after_call(handle.round);
  return result;
}

DispatchResult TwinRank::dispatch_receive(const ReceiveArgs& args) {
  DispatchResult result;
  result.round = args.round;
  const OpenRound& open = c_.rounds[args.round % kNumParities];
  if (open.round != args.round || open.stage != Stage::sent) {
    result.status = Status::bad_handle;
    return result;
  }
  before_call();
  DeviceHandle& handle = device_->handles[args.round % kNumParities];
  const device::ReceivedTensors out{args.recv_x, args.recv_scales, args.recv_weights, args.num_tokens_per_expert,
                                    args.offsets};
  launch(1, [&] { device::dispatch_collect(&device_->rank, out, &handle); });
  launch(options_.num_blocks, [&] { device::dispatch_expand(&device_->rank, out, &handle); });
  result.status = handle.ended;
  after_call(args.round);
  if (result.status != Status::ok) return result;
  list_received(args.round);
  result.num_received = device_->rank.rounds[args.round % kNumParities].num_received;
  return result;
}

CombineResult TwinRank::combine_send(const CombineArgs& args) {
  const OpenRound& open = c_.rounds[args.round % kNumParities];
  if (open.round != args.round || open.stage == Stage::closed || open.stage == Stage::answered)
    return {Status::bad_handle, 0};
  if (open.stage == Stage::sent && !args.abandon) return {Status::not_received, 0};
  before_call();
  const DeviceHandle& handle = device_->handles[args.round % kNumParities];
  const device::AnswerArgs answer{args.y, args.abandon};
  launch(args.abandon ? 1 : options_.num_blocks, [&] { device::combine_answer(&device_->rank, answer, &handle); });
  after_call(args.round);
  return {};
}

CombineResult TwinRank::gather(u64 round, const ReduceArgs* args) {
  before_call();
  DeviceHandle& handle = device_->handles[round % kNumParities];
  const device::GatherArgs gathering{args == nullptr, args == nullptr ? nullptr : args->topk_weights};
  launch(1, [&] { device::combine_gather(&device_->rank, gathering, &handle); });
  if (args != nullptr) {
    const device::ReduceTensors to{args->out, args->codes, args->lost, c_.rounds[round % kNumParities].num_tokens};
    launch(options_.num_blocks, [&] { device::combine_reduce(&device_->rank, to, &handle); });
  }
  after_call(round);
  return {handle.ended, static_cast<i64>(device_->rank.rounds[round % kNumParities].num_lost)};
}

CombineResult TwinRank::combine_receive(const ReduceArgs& args) {
  const OpenRound& open = c_.rounds[args.round % kNumParities];
  if (open.round != args.round || open.stage != Stage::answered) return {Status::bad_handle, 0};
  return gather(args.round, &args);
}

CombineResult TwinRank::abandon(u64 round) {
  const OpenRound& open = c_.rounds[round % kNumParities];
  if (open.stage == Stage::closed || open.round != round) return {Status::bad_handle, 0};
  if (open.stage != Stage::answered) {
    const CombineResult sent = combine_send({nullptr, round, /*abandon=*/true});
    if (sent.status != Status::ok) return sent;
  }
  return gather(round, nullptr);
}

}  // namespace twin
}  // namespace fa2a
