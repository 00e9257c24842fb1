// A GPU by CUDA's driver: memory, copies on a stream of its own, launches on the caller's. Not run on a GPU.
#pragma once

#include <string>
#include <vector>

#include "kernels/cuda/host/gpu.hpp"
#include "transport/cuda_driver.hpp"

namespace fa2a {
namespace cuda {

// The stream on which the calling thread's launches go, as a cudaStream_t; the default stream until it is set.
void set_stream(u64 stream);

class DriverGpu : public Gpu {
 public:
  // `cubins` hold all kernels, each in any of them. `num_blocks` 0: as many as the device has multiprocessors.
  DriverGpu(const Driver& driver, int device, const std::vector<std::string>& cubins, i32 num_blocks, i32 num_threads);
  ~DriverGpu() override;

  u8* allocate(u64 num_bytes) override;
  void* share(void* host, u64 num_bytes) override;
  void upload(void* to, const void* from, u64 num_bytes) override;
  void download(void* to, const void* from, u64 num_bytes) override;
  void launch(const Launch& launch) override;
  void finish() override;
  void finish_all() override;
  i32 num_blocks() const override { return num_blocks_; }

 private:
  void find_kernels(const std::vector<std::string>& cubins);
  void done(Result result, const char* call) const { check(driver_, result, call); }
  // On this object's own stream; a capture that is going on elsewhere in the process is none of its business.
  template <class Work>
  void aside(Work work, const char* call);

  const Driver& driver_;
  int device_;
  i32 num_blocks_, num_threads_;
  DeviceContext context_ = nullptr;
  Stream own_ = nullptr;
  Function kernels_[device::kNumKernels] = {};
  std::vector<Address> memory_;
  std::vector<void*> shared_;
};

}  // namespace cuda
}  // namespace fa2a
