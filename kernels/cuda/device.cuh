// What the kernels ask of a chip, once: by PTX on a GPU, or by the twin that runs the very same sources on a host.
//
// Both give the same functions in fa2a::device:
//   thread_idx num_threads block_idx num_blocks lane warp num_warps      who I am
//   sync_block sync_warp ballot shuffle shuffle_up shuffle_xor           threads of one block, of one warp
//   fence_device atomic_add atomic_or atomic_min compare_and_swap        blocks of one kernel
//   put                                                                  a store into a peer's window
//   put_signal put_taken put_progress                                    words that peers poll
//   pause clock_ns                                                       a wait's rest, and its clock
//   block_shared<T>                                                      the shared memory of my block
//   multiply add divide float_of bits_of count_bits                      arithmetic, each step rounded by itself
//   point planted                                                        faults and planted bugs of the test build
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#include "kernels/cuda/ptx.cuh"
#else
#include "kernels/cuda/twin/device.hpp"
#endif

namespace fa2a {
namespace device {

constexpr i32 kWarpLanes = 32;

FA2A_DEVICE u32 lanes_below() { return (1u << lane()) - 1u; }

// Inclusive sum over the lanes of a warp; all lanes call it.
FA2A_DEVICE i32 warp_prefix(i32 value) {
  for (i32 distance = 1; distance < kWarpLanes; distance *= 2) {
    const i32 before = shuffle_up(value, distance);
    if (lane() >= distance) value += before;
  }
  return value;
}

}  // namespace device
}  // namespace fa2a
