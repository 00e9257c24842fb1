// The GPU that the twin is: its memory is this host's, and a launch runs the kernel's sources to their end.
#pragma once

#include <memory>
#include <vector>

#include "kernels/cuda/host/gpu.hpp"
#include "kernels/cuda/twin/grid.hpp"

namespace fa2a {
namespace twin {

struct TwinOptions {
  i32 num_blocks = 2;  // of the kernels that may have several
  i32 num_threads = 64;
  u64 seed = 1;       // of the order in which threads run
  bool weak = false;  // hold stores back until they are published
};

// Runs one launch on the fibres of `grid`. False: some threads never reach a barrier where the others wait.
bool run(Grid& grid, i32 num_threads, const cuda::Launch& launch);

class TwinGpu : public cuda::Gpu {
 public:
  explicit TwinGpu(const TwinOptions& options) : options_(options), grid_({options.seed, options.weak}) {}

  u8* allocate(u64 num_bytes) override;
  void* share(void* host, u64) override { return host; }
  void upload(void* to, const void* from, u64 num_bytes) override;
  void download(void* to, const void* from, u64 num_bytes) override;
  void launch(const cuda::Launch& launch) override;
  void finish() override {}
  void finish_all() override {}
  i32 num_blocks() const override { return options_.num_blocks; }
  bool is_stuck() const override { return is_stuck_; }

 private:
  TwinOptions options_;
  Grid grid_;
  std::vector<std::unique_ptr<u8[]>> memory_;
  bool is_stuck_ = false;
};

}  // namespace twin
}  // namespace fa2a
