// One launch of a kernel on the twin: its blocks, warps and threads on fibres of one thread, in an order drawn by seed.
#pragma once

#include <exception>
#include <functional>
#include <memory>
#include <vector>

#include "kernels/cuda/twin/fibre.hpp"
#include "kernels/cuda/twin/weak.hpp"

namespace fa2a {
namespace twin {

struct GridShape {
  i32 num_blocks = 1;
  i32 num_threads = 64;  // whole warps
};

// What a launch asks of the host once every fibre waits.
class Idle {
 public:
  virtual ~Idle() = default;
  virtual void wait() = 0;
};

class Grid {
 public:
  struct Where {
    i32 block;
    i32 thread;
  };
  struct Options {
    u64 seed = 1;
    bool weak = false;  // stores into windows are held back until they are published
  };

  Grid() : Grid(Options()) {}
  explicit Grid(const Options& options) : options_(options), random_(options.seed | 1) {}

  // Runs `kernel` on every thread to its end. False: some threads wait at a barrier that the others never reach.
  bool run(const GridShape& shape, Idle& idle, const std::function<void()>& kernel);

  // What follows is asked by the fibre that runs.
  const GridShape& shape() const { return shape_; }
  const Where& me() const { return fibres_[static_cast<size_t>(running_)].where; }
  void sync_block();
  // Gives my value to the 31 others of my warp, and waits for theirs; good until the next exchange but one.
  const u32* exchange(u32 value);
  void pause();
  void fence_device();
  void put(void* to, const void* from, u64 num_bytes);
  void release();
  void* shared(u64 num_bytes);

 private:
  struct Thread {
    Fibre fibre;
    Where where;
    bool ended;
  };
  struct Block {
    i32 num_living;
    std::vector<i32> at_barrier;
    std::unique_ptr<u8[]> shared;
  };
  struct Warp {
    u32 values[2][32];
    u32 turn;
    std::vector<i32> at_exchange;
  };

  static void enter();
  void begin(const GridShape& shape);
  void switch_away();
  void end_thread();
  void open_barrier(Block& block, i32 block_idx);
  void settle();
  u64 next_random();

  Options options_;
  u64 random_;
  GridShape shape_;
  const std::function<void()>* kernel_ = nullptr;
  Fibre scheduler_;
  std::unique_ptr<u8[]> stacks_;
  std::vector<Thread> fibres_;
  std::vector<Block> blocks_;
  std::vector<Warp> warps_;
  std::vector<i32> ready_, paused_;
  i32 running_ = 0;
  HeldStores held_;
  std::exception_ptr thrown_;
};

// Whose fibre runs on this thread of the operating system.
Grid& grid();

}  // namespace twin
}  // namespace fa2a
