// Rows as fp8: 1x128 blocks of e4m3 values, each block with a scale of its own, and the plain cast to e4m3.
//
// For each 128 elements of a row (the last block may be shorter), in float32, every operation rounded by itself:
//   amax  = max(|x|)                       at least 1e-4, as DeepEP has it, so that a block of zeros has a finite scale
//   scale = amax / 448                     ue8m0: the next power of two that is not below it
//   q     = e4m3(x * (1 / scale))          one division a block; dividing each element gives other bits
//   x     ~ float32(q) * scale
// No value of a finite block goes beyond 448. A block with an infinity or a NaN becomes NaN as a whole, its scale too:
// saturating would hand on a finite number that nobody computed.
#pragma once

#include "kernels/cpu/context.hpp"

namespace fa2a {

constexpr i32 kQuantizedBlock = 128;

enum class ScaleFormat : u32 {
  float32,  // one float32 a block
  ue8m0,    // one exponent byte a block, biased by 127, 0xff NaN; four in an int32, the first in its lowest byte
};

constexpr i32 num_scales(i32 hidden) { return (hidden + kQuantizedBlock - 1) / kQuantizedBlock; }
// A whole number of 4-byte words in either format; the unused bytes of the last ue8m0 word are zero.
constexpr u64 scale_bytes(ScaleFormat format, i32 hidden) {
  const u64 count = static_cast<u64>(num_scales(hidden));
  return format == ScaleFormat::float32 ? 4 * count : round_up(count, 4);
}

// q: [hidden] e4m3. scales: scale_bytes(format, hidden), aligned to 4 bytes. x: [hidden] of `dtype`; no overlap.
void quantize_row(DType dtype, ScaleFormat format, u8* q, u8* scales, const u8* x, i32 hidden);

// q[i] = e4m3(x[i]) without a scale, the bits that torch 2.13 gives: beyond 448 it saturates, infinity included.
void cast_row_to_e4m3(u8* q, const float* x, i32 hidden);

}  // namespace fa2a
