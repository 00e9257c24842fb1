// The life of a rank: create, open, serve, close.
#include "bindings/endpoint.hpp"

#include <string.h>

#include <algorithm>
#include <random>
#include <stdexcept>

#include "host/clock.hpp"
#include "host/doorbell.hpp"
#include "host/process.hpp"

namespace fa2a {

namespace {

u64 new_incarnation() {
  std::random_device source;
  const u64 value = static_cast<u64>(source()) << 32 | source();
  return value | 1;  // never 0, which is what an empty page holds
}

}  // namespace

Endpoint::Endpoint(const EndpointConfig& config, std::shared_ptr<LocalGroup> group, const std::string& token)
    : config_(config), group_(std::move(group)), token_(token), state_(std::make_unique<RankState>()) {}

Endpoint::~Endpoint() { close(); }

void Endpoint::create() {
  if (group_) {
    fabric_ = make_local_fabric(group_, config_.rank);
  } else {
    auto shared = make_shared_fabric(config_.shape, token_, config_.rank, config_.num_founders);
    shared_ = shared.get();
    fabric_ = std::move(shared);
  }
  const PartitionLayout at = partition_layout(config_.shape);
  for (i32 writer = 0; config_.poison && writer < num_partitions(config_.shape); ++writer)
    memset(fabric_->inbound(writer), 0xff, at.num_bytes);
  if (config_.machine == Machine::cuda) create_device();
  ControlPage& page = shared_ != nullptr ? shared_->own_page() : fabric_->page(config_.rank);
  fill_page(page, Life::constructing);
  if (config_.machine == Machine::cuda) open_door(page.incarnation);
}

void Endpoint::fill_page(ControlPage& page, Life life) {
  page.shape_hash = shape_hash(config_.shape);
  page.incarnation = new_incarnation();
  page.rank = static_cast<u32>(config_.rank);
  page.pid = static_cast<u32>(process_id());
  page.process_namespace = process_namespace();
  for (SentWords& sent : page.sent) forget_sent(sent, {config_.first_round, 0});
  __atomic_store_n(&page.life, static_cast<u32>(life), __ATOMIC_RELEASE);
  store_release(&page.magic, kControlMagic);
}

// What an earlier round could have left behind: whole-looking signals, of an epoch before, with as many rows as fit.
void Endpoint::leave_stale_signals(u8* partition) const {
  const PartitionLayout at = partition_layout(config_.shape);
  for (u32 verb = 0; verb < kNumVerbs; ++verb) {
    for (u32 parity = 0; parity < kNumParities; ++parity) {
      Signal stale = unpack(fresh_word(config_.first_round, parity));
      stale.declined = false;
      stale.epoch = config_.first_epoch - 1;
      stale.count = static_cast<u64>(verb == 0 ? at.num_dispatch_rows : at.num_combine_rows);
      for (u64 offset : at.signal[verb][parity]) store_release(Context::word(partition, offset), pack(stale));
    }
  }
}

Decision Endpoint::first_decision() const {
  Decision first;
  first.view.epoch = config_.first_epoch;
  first.view.first_round = config_.first_round;
  first.view.active = RankSet::first(config_.num_founders);
  for (i32 rank = 0; rank < config_.shape.num_ranks; ++rank) {
    first.view.incarnations[rank] = fabric_->page(rank).incarnation;
    first.view.partitions[rank] = static_cast<u16>(rank);
  }
  strncpy(first.reason, "the group was constructed", sizeof first.reason - 1);
  return first;
}

void Endpoint::open_peers(i64 timeout_ms) {
  const i64 deadline_ns = now_ns() + timeout_ms * kNsPerMs;
  if (shared_ != nullptr) shared_->open_peers();
  for (i32 peer = 0; peer < config_.num_founders; ++peer) {
    const ControlPage& page = fabric_->page(peer);
    if (load_acquire(&page.magic) == kControlMagic && page.shape_hash == shape_hash(config_.shape)) continue;
    throw std::runtime_error("rank " + std::to_string(peer) +
                             " was built with another Config or version; give all ranks the same one");
  }
  if (config_.machine == Machine::cuda) open_founders_windows(deadline_ns);
  const Decision first = first_decision();
  for (i32 writer = 0; writer < num_partitions(config_.shape); ++writer) {
    const u64 incarnation = writer < config_.num_founders ? first.view.incarnations[writer] : 0;
    prepare_partition(fabric_->inbound(writer), config_.shape, config_.rank, writer, incarnation,
                      {config_.first_round, 0});
    if (config_.poison) leave_stale_signals(fabric_->inbound(writer));
  }
  state_->started = config_.first_round;
  context_.next_round = config_.first_round;
  state_->ring.views[0] = first.view;
  set_up_context();
  start_pulse(first, /*joining=*/false);
}

void Endpoint::set_up_context() {
  for (i32 rank = 0; rank < kMaxRanks; ++rank) {
    // Until the group serves, only exits count: compilation and first touch are slow and nobody's fault.
    state_->silence_ns[rank] = state_->stall_ns[rank] = static_cast<u64>(1) << 62;
  }
  wire_ = std::make_unique<Wire>(*fabric_);
  context_.shape = config_.shape;
  context_.at = partition_layout(config_.shape);
  context_.rank = config_.rank;
  context_.dtype = config_.dtype;
  context_.packed = config_.packed;
  context_.renormalize = config_.renormalize;
  context_.weights_at_expert = config_.weights_at_expert;
  context_.format = config_.format;
  context_.expert_rank = config_.expert_rank;
  context_.expert_local = config_.expert_local;
  context_.num_local_experts = config_.num_local_experts;
  context_.state = state_.get();
  context_.fabric = fabric_.get();
  context_.wire = wire_.get();
  context_.rounds_on_gpu = config_.machine == Machine::cuda;
  context_.stalls.assign(static_cast<size_t>(config_.shape.num_ranks), StallWatch{});
  context_.sources.assign(static_cast<size_t>(config_.shape.num_ranks), SourceStats());
  set_up_kernels();
}

void Endpoint::set_up_kernels() {
  if (config_.machine == Machine::cpu) return;
  if (config_.machine == Machine::cuda_host) gpu_ = std::make_unique<twin::TwinGpu>(config_.twin);
  cuda::WindowAddresses addresses;
  for (i32 partition = 0; partition < num_partitions(config_.shape); ++partition)
    addresses.inbound.push_back(inbound(partition));
  for (i32 owner = 0; owner < config_.shape.num_ranks; ++owner) addresses.outbound.push_back(outbound(owner));
  cuda_ = std::make_unique<cuda::Rank>(context_, std::move(gpu_), addresses);
  for (i32 partition = 0; windows_ && partition < num_partitions(config_.shape); ++partition) fill_device(partition);
}

// Where kernels find a partition of this rank's window, and its own in the window of another.
u8* Endpoint::inbound(i32 partition) const {
  return windows_ ? reinterpret_cast<u8*>(windows_->inbound(partition)) : fabric_->inbound(partition);
}

u8* Endpoint::outbound(i32 owner) const {
  return windows_ ? reinterpret_cast<u8*>(windows_->outbound(owner)) : fabric_->outbound(owner);
}

// Whatever this process has on the device. Kernels of a CPU are done when their calls are.
void Endpoint::finish_kernels() {
  if (cuda_) return cuda_->finish_all();
  if (gpu_) gpu_->finish_all();
}

void Endpoint::start_pulse(const Decision& first, bool joining) {
  PulseOptions options;
  options.agreement.rank = config_.rank;
  options.agreement.num_ranks = config_.shape.num_ranks;
  options.agreement.num_partitions = num_partitions(config_.shape);
  options.agreement.settle_ns = config_.settle_ms * kNsPerMs;
  options.agreement.patience_ns = std::min(config_.stall_ms, config_.agreement_timeout_ms) * kNsPerMs / 2;
  options.agreement.timeout_ns = config_.agreement_timeout_ms * kNsPerMs;
  options.agreement.host_of = config_.host_of;
  options.agreement.by_windows = config_.agree_by_windows;
  options.beat_ns = config_.beat_ms * kNsPerMs;
  options.link_ns = config_.link_ms * kNsPerMs;
  options.join_hold_ns = config_.join_hold_ms * kNsPerMs;
  options.between_processes = fabric_->between_processes();
  options.doors = this;
  options.joining = joining;
  options.kernels_have_own_clock = config_.machine == Machine::cuda;
#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS
  wire_->faults.rank = config_.rank;
  options.unreadable = &wire_->faults.cut;
  options.unheard = &wire_->faults.unheard;
  options.pause_ns = &wire_->faults.pulse_pause_ns;
#endif
  std::vector<ControlPage*> pages;
  for (i32 rank = 0; rank < config_.shape.num_ranks; ++rank) pages.push_back(&fabric_->page(rank));
  pulse_ = std::make_unique<Pulse>(std::move(pages), *state_, options, first);
  pulse_->start();
}

void Endpoint::serve() {
  if (shared_ != nullptr) shared_->forget_names();
  for (i32 rank = 0; rank < kMaxRanks; ++rank) {
    store_relaxed(&state_->silence_ns[rank], static_cast<u64>(config_.silence_ms * kNsPerMs));
    store_relaxed(&state_->stall_ns[rank], static_cast<u64>(config_.stall_ms * kNsPerMs));
  }
  update_tick();
  if (cuda_) cuda_->tell_settings();
  __atomic_store_n(&fabric_->page(config_.rank).life, static_cast<u32>(Life::running), __ATOMIC_RELEASE);
}

void Endpoint::set_timeouts(i32 rank, i64 silence_ms, i64 stall_ms) {
  if (silence_ms > 0) store_relaxed(&state_->silence_ns[rank], static_cast<u64>(silence_ms * kNsPerMs));
  if (stall_ms > 0) store_relaxed(&state_->stall_ns[rank], static_cast<u64>(stall_ms * kNsPerMs));
  update_tick();
}

// Several ticks fit into the shortest stall timeout that I know of; a peer's own table may be shorter, so there is a
// ceiling. And four into my own link timeout, for my watcher.
void Endpoint::update_tick() {
  i64 shortest = std::min(400 * kNsPerMs, 2 * config_.link_ms * kNsPerMs);
  for (i32 rank = 0; rank < config_.shape.num_ranks; ++rank)
    shortest = std::min(shortest, static_cast<i64>(load_relaxed(&state_->stall_ns[rank])));
  context_.tick_ns = std::max(shortest / 8, kNsPerMs);
  if (cuda_) cuda_->set_tick(context_.tick_ns);
}

// One kernel at a time. What ended this rank answers before any work is begun.
template <class Result, class Call>
Result Endpoint::call(Call work) {
  std::lock_guard<std::mutex> lock(calls_);
  Result result;
  result.status = closed_ ? Status::closed : released_status(*state_);
  if (result.status == Status::evicted || result.status == Status::closed) return result;
#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS
  try {
    result = work();
    if (cuda_ && cuda_->is_stuck()) throw std::logic_error("a kernel has a barrier that not all of its threads reach");
    return result;
  } catch (const Crashed&) {
    crash();
    result.status = Status::closed;
    return result;
  }
#else
  return work();
#endif
}

DispatchResult Endpoint::dispatch_send(const DispatchArgs& args) {
  return call<DispatchResult>([&] { return cuda_ ? cuda_->dispatch_send(args) : fa2a::dispatch_send(context_, args); });
}

DispatchResult Endpoint::dispatch_receive(const ReceiveArgs& args) {
  return call<DispatchResult>(
      [&] { return cuda_ ? cuda_->dispatch_receive(args) : fa2a::dispatch_receive(context_, args); });
}

CombineResult Endpoint::combine_send(const CombineArgs& args) {
  return call<CombineResult>([&] { return cuda_ ? cuda_->combine_send(args) : fa2a::combine_send(context_, args); });
}

CombineResult Endpoint::combine_receive(const ReduceArgs& args) {
  return call<CombineResult>(
      [&] { return cuda_ ? cuda_->combine_receive(args) : fa2a::combine_receive(context_, args); });
}

CombineResult Endpoint::abandon(u64 round) {
  return call<CombineResult>([&] { return cuda_ ? cuda_->abandon(round) : fa2a::abandon(context_, round); });
}

CollectiveResult Endpoint::gather_all(const CollectiveArgs& args) {
  return call<CollectiveResult>([&] {
    const CollectiveResult result = fa2a::gather_all(context_, args);
    if (cuda_) cuda_->tell_settings();  // a kernel that waits asks whether this rank still owes a collective
    return result;
  });
}

void Endpoint::crash() {
  crashed_ = closed_ = true;
  pulse_->vanish();
}

#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS
bool Endpoint::reach(Point point, u64 round) {
  try {
    wire_->at(point, round);
  } catch (const Crashed&) {
    crash();
  }
  return crashed_;
}
#endif

i32 Endpoint::open_tokens(u64 round) const {
  const OpenRound& open = context_.rounds[round % kNumParities];
  return open.stage != Stage::closed && open.round == round ? open.num_tokens : -1;
}

const OpenRound* Endpoint::received_of(u64 round) {
  std::lock_guard<std::mutex> lock(calls_);
  if (cuda_) cuda_->list_received(round);
  const OpenRound& open = context_.rounds[round % kNumParities];
  return open.stage != Stage::closed && open.round == round ? &open : nullptr;
}

// Never collective. A call in progress ends within one wake-up, because every wait looks at the release word.
void Endpoint::close() {
  if (state_) {
    fetch_or(&state_->release, release_closing);
    if (fabric_ && pulse_) ring_doorbell(fabric_->page(config_.rank));
  }
  std::lock_guard<std::mutex> calls(calls_);
  if (closed_) return;
  closed_ = true;
  if (!pulse_) return;
  finish_kernels();  // launched, and waited for by nobody; every wait in there ends now
  if (cuda_) cuda_->refresh();
  // Peers wait for an answer to every round that was opened.
  for (OpenRound& open : context_.rounds)
    if (open.stage != Stage::closed) cuda_ ? cuda_->abandon(open.round) : fa2a::abandon(context_, open.round);
  pulse_->leave();
  // What a graph replays from now on sends nothing, and this object may live on: nobody's memory with it.
  if (windows_) let_go(windows_->plugged(), cuda::Quiescent(calls, [this] { finish_kernels(); }));
}

}  // namespace fa2a
