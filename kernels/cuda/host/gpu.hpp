// What the host asks of a GPU, once: by CUDA's driver, or by the twin that runs the kernels' sources on this host.
#pragma once

#include "kernels/cuda/rank.cuh"

namespace fa2a {
namespace cuda {

// As `Kernel` numbers them.
constexpr const char* kKernelNames[device::kNumKernels] = {
    "dispatch_route", "dispatch_send",       "dispatch_collect",    "dispatch_expand",  "combine_answer",
    "combine_gather", "combine_reduce",      "stream_open_rows",    "stream_send_rows", "stream_collect",
    "stream_expand",  "stream_open_answers", "stream_send_answers", "stream_gather",    "stream_reduce"};

// One launch. The arguments are those that `kernel` takes, and are read before `launch` returns.
struct Launch {
  device::Kernel kernel;
  i32 num_blocks;
  device::DeviceRank* rank;  // device addresses, as everything that kernels read
  const void* arguments;
  device::DeviceHandle* handle;
};

class Gpu {
 public:
  virtual ~Gpu() = default;

  // Zeroes, which live as long as this object.
  virtual u8* allocate(u64 num_bytes) = 0;
  // The address by which kernels reach so much of the host's memory, from a whole page on. It must outlive this object.
  virtual void* share(void* host, u64 num_bytes) = 0;
  // Both are done when they return, and wait for no kernel.
  virtual void upload(void* to, const void* from, u64 num_bytes) = 0;
  virtual void download(void* to, const void* from, u64 num_bytes) = 0;
  // In the order of the calling thread's stream.
  virtual void launch(const Launch& launch) = 0;
  // Blocks until what was launched on the calling thread's stream is done, or everything.
  virtual void finish() = 0;
  virtual void finish_all() = 0;
  virtual i32 num_blocks() const = 0;  // of kernels that may have any number
  // Threads met at a barrier that some of them never reach; only the twin can tell.
  virtual bool is_stuck() const { return false; }
};

}  // namespace cuda
}  // namespace fa2a
