// Holding stores back, and letting them go.
#include "kernels/cuda/twin/weak.hpp"

#include <string.h>

namespace fa2a {
namespace twin {

void HeldStores::hold(i32 block, i32 thread, void* to, const void* from, u64 num_bytes) {
  Held held{static_cast<u8*>(to), {}, static_cast<u8>(num_bytes), Reach::thread, block, thread};
  memcpy(held.bytes, from, num_bytes);
  held_.push_back(held);
}

void HeldStores::barrier(i32 block) {
  for (Held& held : held_)
    if (held.block == block && held.reach == Reach::thread) held.reach = Reach::block;
}

bool HeldStores::reaches(const Held& held, i32 block, i32 thread) const {
  if (held.reach == Reach::grid) return true;
  if (held.block != block) return false;
  return held.reach == Reach::block || held.thread == thread;
}

void HeldStores::fence(i32 block, i32 thread) {
  for (Held& held : held_)
    if (reaches(held, block, thread)) held.reach = Reach::grid;
}

void HeldStores::release(i32 block, i32 thread, u64 random) {
  for (u64 left = held_.size(); left > 0; --left) {
    // From anywhere in the list, so that the order in which they land is nobody's to lean on.
    const u64 idx = (random + left * 7919) % held_.size();
    if (reaches(held_[idx], block, thread)) let_go(idx);
    if (held_.empty()) return;
  }
  for (u64 idx = held_.size(); idx-- > 0;)
    if (reaches(held_[idx], block, thread)) let_go(idx);
}

void HeldStores::let_go_one(u64 random) {
  if (!held_.empty()) let_go(random % held_.size());
}

void HeldStores::let_go_all(u64 random) {
  while (!held_.empty()) let_go_one(random++ * 7919);
}

void HeldStores::let_go(u64 idx) {
  memcpy(held_[idx].to, held_[idx].bytes, held_[idx].num_bytes);
  held_[idx] = held_.back();
  held_.pop_back();
}

}  // namespace twin
}  // namespace fa2a
