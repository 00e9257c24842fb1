// Lives that begin while a group runs: a newcomer on its way in, and what members do for it at their step starts.
#include <algorithm>
#include <iterator>
#include <optional>
#include <stdexcept>

#include "bindings/endpoint.hpp"
#include "host/clock.hpp"
#include "host/doorbell.hpp"
#include "kernels/cpu/machine.hpp"
#include "membership/two_copies.hpp"

namespace fa2a {

// -- of a newcomer ----------------------------------------------------------------------------------------------------

void Endpoint::create_newcomer() {
  auto fabric = make_newcomer_fabric(config_.shape, config_.rank);
  newcomer_ = fabric.get();
  fabric_ = std::move(fabric);
  ControlPage& page = fabric_->page(config_.rank);
  page.window_fd = static_cast<u32>(newcomer_->window_fd());
  if (config_.machine == Machine::cuda) create_device();
  fill_page(page, Life::constructing);
  if (config_.machine == Machine::cuda) open_door(page.incarnation);
  knocked_at_.assign(static_cast<size_t>(config_.shape.num_ranks), 0);
  reached_.assign(static_cast<size_t>(config_.shape.num_ranks), 0);
}

bool Endpoint::open_member(i32 rank, i32 pid, i32 fd, u64 incarnation) {
  if (!fabric_->open_page(rank, pid, fd)) return false;
  const ControlPage& page = fabric_->page(rank);
  if (load_acquire(&page.magic) != kControlMagic || page.rank != static_cast<u32>(rank)) return false;
  if (page.shape_hash != shape_hash(config_.shape))
    throw std::runtime_error("rank " + std::to_string(rank) +
                             " was built with another Config or version; give all ranks the same one");
  return page.incarnation == incarnation;
}

// Partitions of members, as the view has them: nobody stores here before a view names me, and that one begins with
// `first_round`.
void Endpoint::fill_window(const View& members, u64 first_round, u64 first_collective) noexcept {
  const Beginning first{first_round, first_collective};
  const i32 me = config_.rank;
  const i32 mine = partition_for_newcomer(members, me, num_partitions(config_.shape));
  for (i32 rank = 0; rank < config_.shape.num_ranks; ++rank) {
    if (!members.active.has(rank)) continue;
    prepare_partition(fabric_->inbound(members.partitions[rank]), config_.shape, me, rank, members.incarnations[rank],
                      first);
    if (windows_) fill_device(members.partitions[rank]);
  }
  newcomer_->take_partition(mine);
  prepare_partition(fabric_->inbound(mine), config_.shape, me, me, fabric_->page(me).incarnation, first);
  if (windows_) fill_device(mine);
  if (cuda_) cuda_->set_outbound(me, inbound(mine));
  for (SentWords& sent : fabric_->page(me).sent) forget_sent(sent, first);
  context_.next_collective = first_collective;
}

// Has the owner put a partition of its window aside for this life, and is it mapped here?
bool Endpoint::reach(i32 owner, i32 partition) {
  const auto at = static_cast<size_t>(owner);
  const ControlPage& page = fabric_->page(owner);
  const u64 me = fabric_->page(config_.rank).incarnation;
  Offer offer;
  u64 version = 0;
  const bool is_mine = read_newest(page.offer, offer, version) && offer.incarnation == me &&
                       offer.partition == static_cast<u64>(partition);
  if (!is_mine) return reached_[at] = 0, false;
  // By its version, not by its partition: one that was put aside, taken back and put aside again is other memory.
  const u64 key = page.incarnation ^ version;
  if (reached_[at] == key) return true;
  if (!fabric_->open_outbound(owner, static_cast<i32>(page.pid), static_cast<i32>(offer.fd), 0)) return false;
  // The number may be another file's by now; only what was put aside for me says so.
  const auto* header = reinterpret_cast<const PartitionHeader*>(fabric_->outbound(owner) + context_.at.header);
  if (header->magic != kPartitionMagic || header->incarnation != me || header->owner != owner) return false;
  if (windows_) {
    std::lock_guard<std::mutex> calls(calls_);
    if (!take_window(owner, partition, cuda::Quiescent(calls, [this] { finish_kernels(); }), kDoorPatienceNs))
      return false;
  }
  // The first word of mine there: by it the owner knows that it is this memory that I have mapped, and not what it put
  // aside for me before.
  store_release(Context::word(fabric_->outbound(owner), context_.at.progress), pack_progress(0, Phase::idle, 1));
  reached_[at] = key;
  return true;
}

// One step of what the thread that constructs the buffer does until this rank is in; never blocks.
JoinProgress Endpoint::go_on_joining() {
  const i32 me = config_.rank;
  if (!pulse_) {
    const Decision* newest = nullptr;
    Decision copy, best;
    u64 version = 0;
    for (i32 rank = 0; rank < config_.shape.num_ranks; ++rank) {
      if (rank == me || !read_newest(fabric_->page(rank).decision, copy, version)) continue;
      if (newest != nullptr && copy.view.epoch <= best.view.epoch) continue;
      best = copy;
      newest = &best;
    }
    // A life before mine that is still in: its end has to be agreed upon first.
    if (newest == nullptr || best.view.active.has(me)) return {JoinStage::no_members, 0, 0};
    best.view.incarnations[me] = fabric_->page(me).incarnation;
    state_->ring.views[0] = best.view;
    set_up_context();
    __atomic_store_n(&fabric_->page(me).life, static_cast<u32>(Life::joining), __ATOMIC_RELEASE);
    start_pulse(best, /*joining=*/true);
  }
  if ((load_acquire(&state_->release) & release_evicted) != 0) return {JoinStage::out, 0, 0};
  if (!pulse_->joining()) return {JoinStage::in, 0, 0};
  const View view = pulse_->current().view;
  const i32 mine = partition_for_newcomer(view, me, num_partitions(config_.shape));
  bool all = true;
  for (i32 rank = 0; rank < config_.shape.num_ranks; ++rank) {
    if (!view.active.has(rank)) continue;
    ControlPage& page = fabric_->page(rank);
    if (page.incarnation != view.incarnations[rank]) return {JoinStage::member_unknown, rank, view.incarnations[rank]};
    u64& knocked_at = knocked_at_[static_cast<size_t>(rank)];
    if (knocked_at != page.incarnation) {
      const u64 file = static_cast<u64>(fabric_->page_fd()) + 1;
      store_release(&page.knocks[me],
                    knock_field::Process::pack(static_cast<u64>(process_id())) | knock_field::FilePlusOne::pack(file));
      knocked_at = page.incarnation;
      ring_pulse(page);
    }
    all &= reach(rank, mine);
  }
  if (all) pulse_->reached_all(view.epoch);
  return {JoinStage::waits, 0, 0};
}

void Endpoint::serve_as_newcomer() {
  context_.next_round = state_->started;
  serve();
}

// -- of a member ------------------------------------------------------------------------------------------------------

// On the pulse's thread.
bool Endpoint::open_page(i32 rank, i32 pid, i32 fd) noexcept {
  if (!fabric_->open_page(rank, pid, fd)) return false;
  const ControlPage& page = fabric_->page(rank);
  return load_acquire(&page.magic) == kControlMagic && page.shape_hash == shape_hash(config_.shape) &&
         page.rank == static_cast<u32>(rank);
}

void Endpoint::fill_for(const Newcomer& newcomer) {
  const Beginning first{context_.next_round, context_.next_collective};
  prepare_partition(fabric_->inbound(prepared_partition_), config_.shape, config_.rank, newcomer.rank,
                    newcomer.incarnation, first);
  if (windows_) fill_device(prepared_partition_);
  // What was sent to the life before was not sent to this one.
  forget_sent(fabric_->page(config_.rank).sent[newcomer.rank], first);
}

// No round is open: whatever still stores into the old memory is not of a round that anybody here will read, and what
// this rank stores for that rank from now on goes to the newcomer. So no round may be left to run under the view
// before, in which the former life is a member and still gets its words: they would land in the newcomer's window.
bool Endpoint::prepare_for(const Newcomer& newcomer, const cuda::Quiescent& quiescent) {
  if (context_.next_round < newcomer.members.first_round && guarded(guard_old_rounds_first)) return false;
  const i32 partition = partition_for_newcomer(newcomer.members, newcomer.rank, num_partitions(config_.shape));
  if (prepared_for_ == newcomer.incarnation && prepared_partition_ == partition) return true;
  const u64 mine = newcomer.members.partitions[config_.rank];
  if (!fabric_->open_outbound(newcomer.rank, newcomer.pid, newcomer.window_fd, mine * context_.at.num_bytes))
    return false;
  if (windows_ && !take_window(newcomer.rank, static_cast<i32>(mine), quiescent, kDoorPatienceNs)) return false;
  if (windows_ && !renew_window(partition, quiescent)) return false;
  const i32 fd = fabric_->renew_inbound(partition);
  if (fd < 0) return false;
  prepared_for_ = newcomer.incarnation;
  prepared_rank_ = newcomer.rank;
  prepared_partition_ = partition;
  fill_for(newcomer);
  publish(fabric_->page(config_.rank).offer,
          Offer{newcomer.incarnation, static_cast<u64>(partition), static_cast<u64>(fd)});
  ring_pulse(fabric_->page(newcomer.rank));
  return true;
}

// Does the newcomer store into what is put aside for it now? It may have said that it reaches everybody, and then
// another newcomer's turn came, and its own again, with other memory. Fresh memory is zero until its writer stores.
bool Endpoint::is_reached() const {
  const u64 progress = load_acquire(Context::word(fabric_->inbound(prepared_partition_), context_.at.progress));
  return progress != 0 || !guarded(guard_mapped_place);
}

// Ends when the pulse says so, when somebody is past this step start and so will not come to it, or when it lasts too
// long. Whoever goes past rings with its first signal.
Status Endpoint::wait_out_hold() {
  const u64 round = context_.next_round;
  const i64 deadline = now_ns() + config_.join_hold_ms * kNsPerMs;
  // Not this round: by its progress a rank shows whether it is past.
  CpuMachine machine(context_, round - 1);
  const bool is_leaving = load_relaxed(&fabric_->page(config_.rank).wants_to_leave) != 0;
  const Waited waited = wait_for(machine, *state_, kNobody, [&] {
    const HoldState state = pulse_->hold_state();
    if (state == HoldState::none) return Reading::present;
    if (state == HoldState::committed || !guarded(guard_hold_bound)) return Reading::absent;
    const RankSet& active = newest_view(state_->ring).active;
    bool is_passed = false;
    for (i32 rank = 0; rank < config_.shape.num_ranks; ++rank)
      is_passed |= rank != config_.rank && active.has(rank) &&
                   has_passed(load_acquire(&fabric_->page(rank).progress), round, context_.next_collective);
    const bool is_over = now_ns() >= deadline;
    if (is_passed || is_over) pulse_->end_hold(is_over && !is_passed && !is_leaving);
    return Reading::absent;
  });
  if (waited != Waited::released) return Status::ok;
  pulse_->end_hold(/*timed_out=*/false);
  return released_status(*state_);
}

// Of kernels that nobody waits for, and whoever asked for a counter meanwhile has taken over how far they were then: a
// round that is done by now may still stand there as open. Who judged that would refuse the step start after a replay.
bool Endpoint::may_be_open() const {
  const auto is_open = [](const OpenRound& round) { return round.stage != Stage::closed; };
  return cuda_ && std::any_of(std::begin(context_.rounds), std::end(context_.rounds), is_open);
}

Status Endpoint::begin_step(bool& left_out) {
  std::lock_guard<std::mutex> calls(calls_);
  Status status = closed_ ? Status::closed : released_status(*state_);
  // Asked once: what comes up after the wait for the device has its turn at the next step start.
  const bool changes = pulse_->change_waits();
  std::optional<cuda::Quiescent> quiescent;
  if (!closed_ && (changes || !gone_peers().empty() || may_be_open())) {
    quiescent.emplace(calls, [this] { finish_kernels(); });
    if (cuda_) cuda_->refresh();
  }
  for (const OpenRound& open : context_.rounds)
    if (status == Status::ok && (open.stage != Stage::closed || context_.collective.is_open))
      status = Status::open_round;
  const bool is_leaving = load_relaxed(&fabric_->page(config_.rank).wants_to_leave) != 0;
  left_out = is_leaving && status == Status::evicted;
  if (status != Status::ok) return left_out ? Status::ok : status;
  if (windows_ && quiescent) let_go(gone_peers(), *quiescent);
  bool holds = pulse_->hold_state() != HoldState::none;  // committed, and quorum was lost over it
  if (!holds && changes) {
    const std::optional<Newcomer> newcomer = pulse_->newcomer();
    const bool is_prepared = newcomer && prepare_for(*newcomer, *quiescent);
    const StepChange change = pulse_->ready_change();
    const bool is_join = change.kind == ChangeKind::join;
    const bool is_for_newcomer = is_prepared && change.incarnation == prepared_for_ && is_reached();
    if (is_join && is_for_newcomer) fill_for(*newcomer);
    if (change.kind == ChangeKind::leave || is_for_newcomer)
      holds = pulse_->hold({0, context_.next_round, context_.next_collective, change});
  }
  if (holds) status = wait_out_hold();
  left_out = is_leaving && (status == Status::evicted || (load_acquire(&state_->release) & release_evicted) != 0);
  return left_out ? Status::ok : status;
}

}  // namespace fa2a
