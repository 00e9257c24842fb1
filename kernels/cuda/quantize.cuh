// A row to fp8 e4m3 on its way out, in blocks of 1 x 128, a warp a block; each byte goes to all of the row's places.
#pragma once

#include "kernels/cuda/rows.cuh"

namespace fa2a {
namespace device {

constexpr i32 kQuantizedBlock = 128;
constexpr i32 kLaneElements = kQuantizedBlock / kWarpLanes;
constexpr float kE4m3Max = 448.0f;
constexpr float kSmallestAmax = 1e-4f;
constexpr u32 kFloatNan = 0x7fc00000u;
constexpr u8 kE4m3Nan = 0x7f, kUe8m0Nan = 0xff;

struct Scale {
  u32 bits;       // as it travels: a float32, or one byte of exponent
  float inverse;  // what the block is multiplied by
  bool is_nan;
};

// `largest`: bits of the largest magnitude, so that NaN is above infinity above the rest.
FA2A_DEVICE Scale scale_of(u32 largest, bool is_ue8m0) {
  if (largest >= kInfinityBits) return {is_ue8m0 ? kUe8m0Nan : kFloatNan, 0.0f, true};
  const float amax = float_of(largest);
  const float scale = divide(amax > kSmallestAmax ? amax : kSmallestAmax, kE4m3Max);
  if (!is_ue8m0) return {bits_of(scale), divide(1.0f, scale), false};
  // The smallest power of two that is not below the scale.
  const u32 exponent = (bits_of(scale) >> 23) + ((bits_of(scale) & 0x7fffffu) != 0 ? 1u : 0u);
  return {exponent, divide(1.0f, float_of(exponent << 23)), false};
}

template <class Element>
FA2A_DEVICE void quantize_row_of(Element, const DeviceRank& r, u8* const* places, i32 num_places, const u8* x) {
  using Bits = typename Element::Bits;
  const auto* bits = reinterpret_cast<const Bits*>(x);
  const i32 hidden = r.hidden(), num_blocks = (hidden + kQuantizedBlock - 1) / kQuantizedBlock;
  const bool is_ue8m0 = r.format.quantize == WireFormat::Quantize::ue8m0;
  for (i32 block = warp(); block < num_blocks; block += num_warps()) {
    const i32 first = block * kQuantizedBlock + lane() * kLaneElements;
    const bool is_inside = first < hidden;  // rows are multiples of 8, so a lane is inside or not
    float values[kLaneElements];
    u32 largest = 0;
    for (i32 i = 0; i < kLaneElements; ++i) {
      values[i] = is_inside ? Element::widen(bits[first + i]) : 0.0f;
      const u32 magnitude = bits_of(values[i]) & kMagnitudeBits;
      largest = magnitude > largest ? magnitude : largest;
    }
    for (i32 lanes = kWarpLanes / 2; lanes > 0; lanes /= 2) {
      const u32 other = shuffle_xor(largest, lanes);
      largest = other > largest ? other : largest;
    }
    const Scale scale = scale_of(largest, is_ue8m0);
    u32 packed = 0;
    for (i32 i = 0; i < kLaneElements; ++i) {
      const u8 byte = scale.is_nan ? kE4m3Nan : to_e4m3_in_range(multiply(values[i], scale.inverse));
      packed |= static_cast<u32>(byte) << (8 * i);
    }
    for (i32 place = 0; place < num_places; ++place) {
      if (is_inside) put(places[place] + first, packed);
      if (lane() != 0) continue;
      u8* scales = places[place] + r.format.scales_at;
      if (is_ue8m0)
        put(scales + block, static_cast<u8>(scale.bits));
      else
        put(scales + 4 * block, scale.bits);
    }
  }
  // The padding of the last word of scales.
  for (u64 at = static_cast<u64>(num_blocks + thread_idx()); is_ue8m0 && at < r.format.scale_bytes;
       at += static_cast<u64>(num_threads()))
    for (i32 place = 0; place < num_places; ++place) put(places[place] + r.format.scales_at + at, static_cast<u8>(0));
}

FA2A_DEVICE void quantize_row(const DeviceRank& r, u8* const* places, i32 num_places, const u8* x) {
  with_element(r.dtype, [&](auto element) { quantize_row_of(element, r, places, num_places, x); });
}

}  // namespace device
}  // namespace fa2a
