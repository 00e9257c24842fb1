// How the twin rests once all its fibres wait: spin briefly, then sleep on the rank's doorbell as a CPU rank does.
#pragma once

#include <optional>

#include "host/doorbell.hpp"
#include "kernels/cuda/twin/grid.hpp"

namespace fa2a {
namespace twin {

class DoorbellIdle : public Idle {
 public:
  DoorbellIdle(ControlPage& page, i64 timeout_ns) : page_(page), timeout_ns_(timeout_ns) {}

  void wait() override {
    if (num_spins_ < kNumSpins) {
      ++num_spins_;
      return;
    }
    // Listen first, let every fibre look at its word again, then sleep: in the other order a ring is lost.
    if (!waiter_)
      waiter_.emplace(page_);
    else
      waiter_->sleep(heard_, timeout_ns_);
    heard_ = waiter_->listen();
  }

 private:
  static constexpr i32 kNumSpins = 4;

  ControlPage& page_;
  i64 timeout_ns_;
  std::optional<DoorbellWaiter> waiter_;
  i32 num_spins_ = 0;
  u32 heard_ = 0;
};

}  // namespace twin
}  // namespace fa2a
