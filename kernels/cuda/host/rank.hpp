// One rank whose kernels run on a GPU or on its twin: the calls of kernels/cpu/context.hpp by other means.
#pragma once

#include <memory>
#include <vector>

#include "kernels/cpu/context.hpp"
#include "kernels/cuda/host/gpu.hpp"

namespace fa2a {
namespace cuda {

// Where kernels find the partitions of this rank's window, and its own in the windows of others: device addresses.
struct WindowAddresses {
  std::vector<u8*> inbound;   // by partition
  std::vector<u8*> outbound;  // by owner
};

class Rank {
 public:
  // Reads shape and settings from `context`, and keeps its bookkeeping of rounds and counters up to date.
  Rank(Context& context, std::unique_ptr<Gpu> gpu, const WindowAddresses& windows);
  ~Rank();

  // Each waits until its kernels are done, and answers as the CPU's would.
  DispatchResult dispatch_send(const DispatchArgs& args);
  DispatchResult dispatch_receive(const ReceiveArgs& args);
  CombineResult combine_send(const CombineArgs& args);
  CombineResult combine_receive(const ReduceArgs& args);
  CombineResult abandon(u64 round);

  // The same halves as a stream or a captured graph has them: launched, and nothing waited for. `handle` is device
  // memory of the caller's, the same for all halves of a round, and has the answer; a half that finds its round not at
  // its step does nothing.
  void launch_dispatch_send(const DispatchArgs& args, device::DeviceHandle* handle);
  void launch_dispatch_receive(const ReceiveArgs& args, device::DeviceHandle* handle);
  void launch_combine_send(const CombineArgs& args, device::DeviceHandle* handle);
  void launch_combine_receive(const ReduceArgs& args, i32 num_tokens, device::DeviceHandle* handle);

  // From any thread, at any time: how often a waiting kernel shows that this rank lives.
  void set_tick(i64 tick_ns) { gpu_->upload(&rank_->tick_ns, &tick_ns, sizeof tick_ns); }
  // Of a newcomer, which learns its own partition after it was set up.
  void set_outbound(i32 owner, u8* partition);
  void upload(void* to, const void* from, u64 num_bytes) { gpu_->upload(to, from, num_bytes); }
  // Takes over what the host has changed since, and what kernels have. Between launches.
  void tell_settings();
  void refresh();
  // Whose rows a round received, for those who ask.
  void list_received(u64 round);
  // Waits for everything this process has on the device.
  void finish_all() { gpu_->finish_all(); }

  bool is_stuck() const { return gpu_->is_stuck(); }

 private:
  void launch(device::Kernel kernel, i32 num_blocks, const void* arguments, device::DeviceHandle* handle);
  template <class Wait, class Move>
  void launch_stream(u64 round, device::Step under_way, device::Kernel wait, const Wait& waits, device::Kernel move,
                     const Move& moves);
  u8* copy_of(const void* host, u64 num_bytes);
  void tell_outbound();
  device::DeviceHandle* handle_of(u64 round) const { return handles_ + round % kNumParities; }
  device::DeviceHandle finished(const device::DeviceHandle* handle);
  CombineResult gather(u64 round, const ReduceArgs* args);

  Context& c_;
  std::unique_ptr<Gpu> gpu_;
  WindowAddresses windows_;
  device::DeviceRank copy_{};                // of what lies on the device, addresses there included
  device::DeviceRank* rank_ = nullptr;       // there
  device::DeviceHandle* handles_ = nullptr;  // one a lane, and one for a round that may not begin
  u8* outbound_ = nullptr;                   // there; the table of addresses
  u8* sink_ = nullptr;                       // stands in for the windows of peers to whom everything is lost
  RankSet sunk_;
};

}  // namespace cuda
}  // namespace fa2a
