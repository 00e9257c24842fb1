// The kernels' chip on a GPU: CUDA's own names and PTX. Not run on a GPU yet; compiled for every target by the tests.
#pragma once

#include "kernels/cuda/plants.hpp"
#include "protocol/memory.hpp"
#include "protocol/phases.hpp"

#define FA2A_DEVICE __device__ __forceinline__
// Block sizes are chosen below this; the compiler then knows how many registers a thread may take.
#define FA2A_KERNEL extern "C" __global__ void __launch_bounds__(fa2a::device::kMaxThreads, 1)

namespace fa2a {
namespace device {

constexpr i32 kMaxThreads = 512;
constexpr i32 kNumLooks = 64;
constexpr u32 kAllLanes = 0xffffffffu;

struct alignas(16) Vector16 {
  u32 words[4];
};

FA2A_DEVICE i32 thread_idx() { return static_cast<i32>(threadIdx.x); }
FA2A_DEVICE i32 num_threads() { return static_cast<i32>(blockDim.x); }
FA2A_DEVICE i32 block_idx() { return static_cast<i32>(blockIdx.x); }
FA2A_DEVICE i32 num_blocks() { return static_cast<i32>(gridDim.x); }
FA2A_DEVICE i32 lane() { return static_cast<i32>(threadIdx.x % 32); }
FA2A_DEVICE i32 warp() { return static_cast<i32>(threadIdx.x / 32); }
FA2A_DEVICE i32 num_warps() { return static_cast<i32>(blockDim.x / 32); }

FA2A_DEVICE void sync_block() { __syncthreads(); }
FA2A_DEVICE void sync_warp() { __syncwarp(kAllLanes); }
FA2A_DEVICE u32 ballot(bool holds) { return __ballot_sync(kAllLanes, holds); }
FA2A_DEVICE i32 shuffle(i32 value, i32 from_lane) { return __shfl_sync(kAllLanes, value, from_lane); }
FA2A_DEVICE i32 shuffle_up(i32 value, i32 distance) {
  return __shfl_up_sync(kAllLanes, value, static_cast<u32>(distance));
}
FA2A_DEVICE u32 shuffle_xor(u32 value, i32 lanes) { return __shfl_xor_sync(kAllLanes, value, lanes); }

// Orders what this thread has seen and stored before what any thread of this GPU does after it has seen what follows.
FA2A_DEVICE void fence_device() { __threadfence(); }
FA2A_DEVICE u32 atomic_add(u32* word, u32 amount) { return atomicAdd(word, amount); }
FA2A_DEVICE u32 atomic_or(u32* word, u32 bits) { return atomicOr(word, bits); }
FA2A_DEVICE u32 atomic_min(u32* word, u32 value) { return atomicMin(word, value); }
FA2A_DEVICE u64 compare_and_swap(u64* word, u64 expected, u64 value) { return atomicCAS(word, expected, value); }

FA2A_DEVICE void put(void* to, const Vector16& value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(value.words[0]), "r"(value.words[1]),
               "r"(value.words[2]), "r"(value.words[3])
               : "memory");
}
FA2A_DEVICE void put(void* to, u32 value) { *static_cast<u32*>(to) = value; }
FA2A_DEVICE void put(void* to, u8 value) { *static_cast<u8*>(to) = value; }

// A release at system scope publishes what this thread stored and what it has seen published to it (PTX: cumulativity).
FA2A_DEVICE void put_signal(void*, i32, u64* word, u64 value, bool) { store_release(word, value); }
FA2A_DEVICE void put_taken(void*, i32, u64* word, u64 value) { store_release(word, value); }
FA2A_DEVICE void put_progress(void*, i32, u64* word, u64 value) { store_release(word, value); }

FA2A_DEVICE void pause() { asm volatile("nanosleep.u32 64;" ::: "memory"); }
// Nanoseconds of the wall, the same on all multiprocessors; a cycle counter would need a frequency that nobody knows.
FA2A_DEVICE i64 clock_ns() {
  i64 now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

template <class T>
FA2A_DEVICE T& block_shared() {
  __shared__ T storage;
  return storage;
}

FA2A_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
FA2A_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
FA2A_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
FA2A_DEVICE float float_of(u32 bits) { return __uint_as_float(bits); }
FA2A_DEVICE u32 bits_of(float value) { return __float_as_uint(value); }

FA2A_DEVICE i32 count_bits(u32 bits) { return __popc(bits); }

FA2A_DEVICE void point(void*, Point, u64) {}
FA2A_DEVICE bool ignores_consent(void*) { return false; }

}  // namespace device
}  // namespace fa2a
