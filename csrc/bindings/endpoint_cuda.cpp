// A rank on a GPU: its driver, its window there, and how peers come by it.
#include <unistd.h>

#include <stdexcept>

#include "bindings/endpoint.hpp"
#include "host/clock.hpp"
#include "kernels/cuda/host/driver_gpu.hpp"
#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS
#include <stdlib.h>

#include "kernels/cuda/twin/driver.hpp"
#endif

namespace fa2a {

namespace {

constexpr i32 kNumThreads = 512;  // what the kernels are compiled for
constexpr i32 kNumTwinThreads = 64;
constexpr i64 kPatienceNs = 200 * kNsPerMs;  // with a peer whose window is asked for

const cuda::Driver* find_driver(std::string& why) {
#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS
  if (getenv("FAULT_A2A_TWIN_DRIVER") != nullptr) return &twin::driver();
#endif
  return cuda::load_driver(why);
}

bool is_twin(const cuda::Driver& driver) {
#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS
  return &driver == &twin::driver();
#else
  return (void)driver, false;
#endif
}

}  // namespace

void Endpoint::create_device() {
  std::string why;
  const cuda::Driver* driver = find_driver(why);
  if (driver == nullptr) throw std::runtime_error("backend: \"cuda\" cannot run here: " + why);
  const i32 num_threads = is_twin(*driver) ? kNumTwinThreads : kNumThreads;
  gpu_ = std::make_unique<cuda::DriverGpu>(*driver, config_.device, config_.cubins, config_.num_sms, num_threads);
  const cuda::HandleType type = cuda::probe_handles(*driver, config_.device, /*across_nodes=*/false);
  windows_ = std::make_unique<cuda::Windows>(
      *driver, config_.device, type,
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

// My partition in the window of `owner`, by whatever life of it my mapping of its page shows. No kernel of mine runs.
bool Endpoint::take_window(i32 owner, i32 partition) noexcept {
  const i32 file = Door::ask(fabric_->page(owner).incarnation, partition, kPatienceNs);
  if (file < 0) return false;
  try {
    std::lock_guard<std::mutex> lock(windows_lock_);
    windows_->plug(owner, file, cuda::Quiescent());
    ::close(file);
    return true;
  } catch (const std::runtime_error&) {  // no memory for a mapping: as if the owner had not been there
    ::close(file);
    return false;
  }
}

void Endpoint::open_founders_windows() {
  for (i32 owner = 0; owner < config_.num_founders; ++owner)
    if (owner != config_.rank && !take_window(owner, config_.rank))
      throw std::runtime_error("rank " + std::to_string(owner) + " did not hand over its window; it may have ended");
}

// Fresh memory where a partition of my window is, beyond the reach of whoever stored into the old one.
bool Endpoint::renew_window(i32 writer) {
  if (!guarded(guard_fresh_partition)) return true;
  try {
    std::lock_guard<std::mutex> lock(windows_lock_);
    windows_->renew(writer, cuda::Quiescent());
    return true;
  } catch (const std::runtime_error&) {
    return false;
  }
}

// The words of a partition as prepare_partition left them in the fabric's, whose rows nobody ever touches.
void Endpoint::fill_device(i32 partition) noexcept {
  auto* there = reinterpret_cast<u8*>(windows_->inbound(partition));
  cuda_->upload(there, fabric_->inbound(partition), partition_layout(config_.shape).claims[0]);
}

void Endpoint::set_up_device() {
  cuda::WindowAddresses addresses;
  const PartitionLayout at = partition_layout(config_.shape);
  for (i32 partition = 0; partition < num_partitions(config_.shape); ++partition) {
    addresses.inbound.push_back(reinterpret_cast<u8*>(windows_->inbound(partition)));
    gpu_->upload(addresses.inbound.back(), fabric_->inbound(partition), config_.poison ? at.num_bytes : at.claims[0]);
  }
  for (i32 owner = 0; owner < config_.shape.num_ranks; ++owner)
    addresses.outbound.push_back(reinterpret_cast<u8*>(windows_->outbound(owner)));
  cuda_ = std::make_unique<cuda::Rank>(context_, std::move(gpu_), addresses);
}

void Endpoint::refresh() {
  std::lock_guard<std::mutex> lock(calls_);
  if (cuda_ && !closed_) cuda_->refresh();
}

}  // namespace fa2a
