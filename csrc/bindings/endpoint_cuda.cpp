// A rank on a GPU: its driver, its window there, and how peers come by it.
#include <unistd.h>

#include <algorithm>
#include <stdexcept>

#include "bindings/endpoint.hpp"
#include "host/clock.hpp"
#include "host/death_word.hpp"
#include "kernels/cuda/host/driver_gpu.hpp"
#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS
#include <stdlib.h>

#include "kernels/cuda/twin/driver.hpp"
#endif

namespace fa2a {

namespace {

constexpr i32 kNumThreads = 512;  // what the kernels are compiled for
constexpr i32 kNumTwinThreads = 64;

bool is_twin(const cuda::Driver& driver) {
#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS
  return &driver == &twin::driver();
#else
  return (void)driver, false;
#endif
}

}  // namespace

const cuda::Driver* find_driver(std::string& why) {
#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS
  if (getenv("FAULT_A2A_TWIN_DRIVER") != nullptr) return &twin::driver();
#endif
  return cuda::load_driver(why);
}

void Endpoint::create_device() {
  std::string why;
  const cuda::Driver* driver = find_driver(why);
  if (driver == nullptr) throw std::runtime_error("backend: \"cuda\" cannot run here: " + why);
  const i32 num_threads = is_twin(*driver) ? kNumTwinThreads : kNumThreads;
  gpu_ = std::make_unique<cuda::DriverGpu>(*driver, config_.device, config_.cubins, config_.num_sms, num_threads);
  // The ranks of a group are on one host, so far.
  cuda::require_handles(*driver, config_.device, cuda::kFileDescriptor);
  windows_ = std::make_unique<cuda::Windows>(
      *driver, config_.device, cuda::kFileDescriptor,
      cuda::Windows::Layout{config_.rank, config_.shape.num_ranks, num_partitions(config_.shape),
                            partition_layout(config_.shape).num_bytes});
}

void Endpoint::open_door(u64 incarnation) {
  door_ = std::make_unique<Door>(incarnation, [this](i32 partition) {
    std::lock_guard<std::mutex> lock(windows_lock_);
    const bool is_one = partition >= 0 && partition < num_partitions(config_.shape);
    return is_one ? windows_->export_partition(partition) : -1;
  });
}

// My partition in the window of `owner`, by whatever life of it my mapping of its page shows.
// Without the lock that my door takes: to map a window may take as long as a visitor has patience.
bool Endpoint::take_window(i32 owner, i32 partition, const cuda::Quiescent& quiescent, i64 patience_ns) noexcept {
  const i32 file = Door::ask(fabric_->page(owner).incarnation, partition, patience_ns);
  if (file < 0) return false;
  try {
    windows_->plug(owner, file, quiescent);
    ::close(file);
    return true;
  } catch (const std::runtime_error&) {  // no memory for a mapping: as if the owner had not been there
    ::close(file);
    return false;
  }
}

// All founders come to all doors at once, so each is asked once, with all the time that there is: to ask again and
// again with less patience than a door takes for an answer would never be answered. A door that ends answers at once.
void Endpoint::open_founders_windows(i64 deadline_ns) {
  std::lock_guard<std::mutex> calls(calls_);
  const cuda::Quiescent quiescent(calls, [this] { finish_kernels(); });
  for (i32 owner = 0; owner < config_.num_founders; ++owner) {
    if (owner == config_.rank) continue;
    const i64 patience_ns = std::max(deadline_ns - now_ns(), kDoorPatienceNs);
    if (!take_window(owner, config_.rank, quiescent, patience_ns))
      throw std::runtime_error("rank " + std::to_string(owner) + " did not hand over its window; it may have ended");
  }
}

// Fresh memory where a partition of my window is, beyond the reach of whoever stored into the old one.
bool Endpoint::renew_window(i32 writer, const cuda::Quiescent& quiescent) {
  if (!guarded(guard_fresh_partition)) return true;
  try {
    std::lock_guard<std::mutex> lock(windows_lock_);
    windows_->renew(writer, quiescent);
    return true;
  } catch (const std::runtime_error&) {
    return false;
  }
}

// Whose windows are mapped here though they are out for good: the newest view leaves them out, no round is left to run
// under one in which they are members, and they are not on their way in.
RankSet Endpoint::gone_peers() const {
  // Before the view: a hold for somebody ends, if it lets that one in, with the view that it is in.
  if (!windows_ || pulse_->hold_state() != HoldState::none) return RankSet();
  const View& view = newest_view(state_->ring);
  RankSet gone = windows_->plugged().without(view.active);
  if (gone.empty() || load_acquire(&state_->started) < view.first_round) return RankSet();
  if (gone.has(prepared_rank_) && may_come_in(view)) gone.remove(prepared_rank_);
  return gone;
}

// Room was made for a newcomer, which was never in and has not gone. One that is merely late must not begin anew.
bool Endpoint::may_come_in(const View& view) const {
  const ControlPage& page = fabric_->page(prepared_rank_);
  if (page.incarnation != prepared_for_ || view.incarnations[prepared_rank_] == prepared_for_) return false;
  const auto life = static_cast<Life>(__atomic_load_n(&page.life, __ATOMIC_ACQUIRE));
  return !owner_died(&page.death_word) && (life == Life::joining || life == Life::running);
}

// So that their hosts can return. What cannot be let go stays as it was, and is looked at again at the next step start:
// who lives on must not fail over one that is dead.
void Endpoint::let_go(const RankSet& owners, const cuda::Quiescent& quiescent) noexcept {
  for (i32 owner = 0; owner < config_.shape.num_ranks; ++owner) {
    if (!owners.has(owner)) continue;
    // The same life may knock again.
    if (owner == prepared_rank_) prepared_for_ = 0;
    try {
      windows_->unplug(owner, quiescent);
    } catch (const std::runtime_error&) {
    }
  }
}

// The words of a partition as prepare_partition left them in the fabric's, whose rows nobody ever touches but to
// poison.
void Endpoint::fill_device(i32 partition) {
  const PartitionLayout at = partition_layout(config_.shape);
  cuda_->upload(inbound(partition), fabric_->inbound(partition), config_.poison ? at.num_bytes : at.claims[0]);
}

void Endpoint::refresh() {
  std::lock_guard<std::mutex> lock(calls_);
  if (cuda_ && !closed_) cuda_->refresh();
}

}  // namespace fa2a
