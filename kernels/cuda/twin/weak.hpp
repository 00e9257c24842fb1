// Stores that nobody has published yet, held back and let go in any order, as a GPU may and x86 never does.
#pragma once

#include <vector>

#include "protocol/compiler.hpp"

namespace fa2a {
namespace twin {

// Who would be bound to see a held store: at first its own thread only. A barrier widens that to its block, a fence to
// the whole grid; a release of somebody it has reached sends it out. (PTX's causality order, no more than what the
// kernels lean on.)
class HeldStores {
 public:
  void hold(i32 block, i32 thread, void* to, const void* from, u64 num_bytes);
  void barrier(i32 block);
  void fence(i32 block, i32 thread);
  void release(i32 block, i32 thread, u64 random);
  void let_go_one(u64 random);
  void let_go_all(u64 random);
  bool empty() const { return held_.empty(); }

 private:
  enum class Reach : u8 { thread, block, grid };
  struct Held {
    u8* to;
    u8 bytes[16];
    u8 num_bytes;
    Reach reach;
    i32 block;
    i32 thread;
  };
  void let_go(u64 idx);
  bool reaches(const Held& held, i32 block, i32 thread) const;

  std::vector<Held> held_;
};

}  // namespace twin
}  // namespace fa2a
