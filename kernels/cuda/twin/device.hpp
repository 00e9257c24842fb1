// The kernels' chip on a host: every thread of a block is a fibre, and what they share is kept by twin/grid.
#pragma once

#include <string.h>

#include "host/clock.hpp"
#include "kernels/cuda/plants.hpp"
#include "kernels/cuda/twin/grid.hpp"
#include "protocol/memory.hpp"
#include "transport/wire.hpp"

#define FA2A_DEVICE inline
#define FA2A_KERNEL inline void

namespace fa2a {
namespace device {

constexpr i32 kNumLooks = 0;  // a look is as dear as a switch

struct alignas(16) Vector16 {
  u32 words[4];
};

inline i32 thread_idx() { return twin::grid().me().thread; }
inline i32 num_threads() { return twin::grid().shape().num_threads; }
inline i32 block_idx() { return twin::grid().me().block; }
inline i32 num_blocks() { return twin::grid().shape().num_blocks; }
inline i32 lane() { return thread_idx() % 32; }
inline i32 warp() { return thread_idx() / 32; }
inline i32 num_warps() { return num_threads() / 32; }

inline void sync_block() { twin::grid().sync_block(); }
inline void sync_warp() { twin::grid().exchange(0); }
inline u32 ballot(bool holds) {
  const u32* votes = twin::grid().exchange(holds ? 1 : 0);
  u32 bits = 0;
  for (i32 i = 0; i < 32; ++i) bits |= votes[i] << i;
  return bits;
}
inline i32 shuffle(i32 value, i32 from_lane) {
  return static_cast<i32>(twin::grid().exchange(static_cast<u32>(value))[from_lane]);
}
inline i32 shuffle_up(i32 value, i32 distance) {
  const i32 from = lane() - distance;
  return static_cast<i32>(twin::grid().exchange(static_cast<u32>(value))[from < 0 ? lane() : from]);
}
inline u32 shuffle_xor(u32 value, i32 lanes) { return twin::grid().exchange(value)[lane() ^ lanes]; }

inline void fence_device() { twin::grid().fence_device(); }
// One fibre runs at a time, and it is never interrupted in here.
inline u32 atomic_add(u32* word, u32 amount) {
  const u32 before = *word;
  *word += amount;
  return before;
}
inline u32 atomic_or(u32* word, u32 bits) {
  const u32 before = *word;
  *word |= bits;
  return before;
}
inline u32 atomic_min(u32* word, u32 value) {
  const u32 before = *word;
  if (value < before) *word = value;
  return before;
}
inline u64 compare_and_swap(u64* word, u64 expected, u64 value) {
  const u64 before = *word;
  if (before == expected) *word = value;
  return before;
}

template <class T>
void put(void* to, const T& value) {
  twin::grid().put(to, &value, sizeof value);
}

// Words go by the same wire as those of a CPU rank, which rings the doorbell of a peer that sleeps.
inline Wire& wire_of(void* host) { return *static_cast<Wire*>(host); }
inline void put_signal(void* host, i32 dst, u64* word, u64 value, bool combine) {
  if (!planted(Plant::relaxed_signal)) twin::grid().release();
  wire_of(host).put_signal(dst, word, value, combine);
}
inline void put_taken(void* host, i32 src, u64* word, u64 value) {
  twin::grid().release();
  wire_of(host).put_taken(src, word, value);
}
inline void put_progress(void* host, i32 dst, u64* word, u64 value) { wire_of(host).put_progress(dst, word, value); }

inline void pause() { twin::grid().pause(); }
inline i64 clock_ns() { return now_ns(); }

template <class T>
T& block_shared() {
  return *static_cast<T*>(twin::grid().shared(sizeof(T)));
}

inline float multiply(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float divide(float a, float b) { return a / b; }
inline float float_of(u32 bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline u32 bits_of(float value) {
  u32 bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline i32 count_bits(u32 bits) { return __builtin_popcount(bits); }

inline void point(void* host, Point where, u64 round) { wire_of(host).at(where, round); }
inline bool ignores_consent(void* host) { return wire_of(host).ignores_consent(); }

}  // namespace device
}  // namespace fa2a
