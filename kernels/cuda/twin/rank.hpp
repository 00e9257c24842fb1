// One rank whose kernels are the .cu sources, run by the twin: the calls of kernels/cpu/context.hpp by other means.
#pragma once

#include <memory>
#include <vector>

#include "kernels/cpu/context.hpp"

namespace fa2a {
namespace twin {

struct TwinOptions {
  i32 num_blocks = 2;  // of the kernels that may have several
  i32 num_threads = 64;
  u64 seed = 1;       // of the order in which threads run
  bool weak = false;  // hold stores back until they are published
};

class TwinRank {
 public:
  // Reads shape, addresses and settings from `context`, and keeps its bookkeeping of rounds and counters up to date.
  TwinRank(Context& context, const TwinOptions& options);
  ~TwinRank();

  DispatchResult dispatch_send(const DispatchArgs& args);
  DispatchResult dispatch_receive(const ReceiveArgs& args);
  CombineResult combine_send(const CombineArgs& args);
  CombineResult combine_receive(const ReduceArgs& args);
  CombineResult abandon(u64 round);

  // A kernel's threads met at a barrier that some of them never reach.
  bool is_stuck() const { return is_stuck_; }

 private:
  struct Device;  // what a GPU would hold
  template <class Kernel>
  void launch(i32 num_blocks, Kernel kernel);
  void before_call();
  void after_call(u64 round);
  void list_received(u64 round);
  CombineResult gather(u64 round, const ReduceArgs* args);

  Context& c_;
  TwinOptions options_;
  std::unique_ptr<Device> device_;
  bool is_stuck_ = false;
};

}  // namespace twin
}  // namespace fa2a
