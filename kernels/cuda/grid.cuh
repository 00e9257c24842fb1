// Blocks of one kernel that share a job. Nobody waits for another block: the one that happens to finish last goes on
// alone, so nothing is assumed about which blocks run at the same time.
#pragma once

#include "kernels/cuda/rank.cuh"

namespace fa2a {
namespace device {

// Every thread of every block, once, when its part is stored. True in all threads of the one block that is last: then
// everything that any block stored is ordered before what this one does.
FA2A_DEVICE bool is_last_block(DeviceRound& round, u32& shared_is_last) {
  if (!planted(Plant::no_barrier)) sync_block();  // all threads of this block have stored
  if (thread_idx() == 0) {
    if (!planted(Plant::no_fence)) fence_device();
    const u32 before = atomic_add(&round.num_arrived, 1);
    shared_is_last = before + 1 == static_cast<u32>(num_blocks()) ? 1 : 0;
    if (shared_is_last != 0) {
      fence_device();
      round.num_arrived = 0;  // for the kernel after this one
    }
  }
  sync_block();
  return shared_is_last != 0;
}

}  // namespace device
}  // namespace fa2a
