// The loops that make a row fp8: find the largest of a block, scale, round.
#include "kernels/cpu/quantize.hpp"

#include <string.h>

#include "kernels/cpu/numbers.hpp"

namespace fa2a {

namespace {

constexpr float kSmallestAmax = 1e-4f;
constexpr u32 kFloatNan = 0x7fc00000u;
constexpr u8 kUe8m0Nan = 0xff;

FA2A_PART_OF_LOOP float float_of(u32 bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Magnitudes compare as integers, NaN above infinity above the rest: one reduction finds the largest and what is not
// finite. max() on floats would lose a NaN or not, by the order of its operands.
FA2A_PART_OF_LOOP void take_largest(const u16* at, Shorts& largest) {
  Shorts value;
  memcpy(&value, at, sizeof value);
  value = value & static_cast<short>(0x7fff);
  largest = value > largest ? value : largest;
}

template <class Element>
FA2A_PART_OF_LOOP float largest_of(const u16* x, bool& is_finite) {
  Shorts largest = {};
  for (i32 first = 0; first < kQuantizedBlock; first += kChunk) take_largest(x + first, largest);
  short one = 0;
  for (i32 i = 0; i < kChunk; ++i) one = largest[i] > one ? largest[i] : one;
  is_finite = one < Element::kInfinity;
  Floats wide;
  Element::widen(Words{} + static_cast<u32>(one), wide);
  return wide[0];
}

template <class Element>
FA2A_PART_OF_LOOP float largest_of(const float* x, bool& is_finite) {
  Ints largest = {};
  for (i32 first = 0; first < kQuantizedBlock; first += kLanes) {
    Ints value;
    memcpy(&value, x + first, sizeof value);
    value = value & kFloatMagnitude;
    largest = value > largest ? value : largest;
  }
  i32 one = 0;
  for (i32 i = 0; i < kLanes; ++i) one = largest[i] > one ? largest[i] : one;
  is_finite = one < kFloatInfinity;
  return float_of(static_cast<u32>(one));
}

// The exponent of the smallest power of two that is not below `scale`, a positive normal number.
FA2A_PART_OF_LOOP u32 exponent_above(float scale) {
  u32 bits;
  memcpy(&bits, &scale, sizeof bits);
  return (bits >> 23) + ((bits & 0x7fffffu) != 0 ? 1u : 0u);
}

// Stores the scale and returns what the block is multiplied by.
FA2A_PART_OF_LOOP float store_scale(bool is_ue8m0, float amax, u8* scale_at) {
  float scale = (amax > kSmallestAmax ? amax : kSmallestAmax) / kE4m3Max;
  if (is_ue8m0) {
    const u32 exponent = exponent_above(scale);
    *scale_at = static_cast<u8>(exponent);
    scale = float_of(exponent << 23);
  } else {
    memcpy(scale_at, &scale, sizeof scale);
  }
  return 1.0f / scale;
}

FA2A_PART_OF_LOOP void store_nan(bool is_ue8m0, u8* q, u8* scale_at) {
  memset(q, kE4m3Nan, kQuantizedBlock);
  if (is_ue8m0)
    *scale_at = kUe8m0Nan;
  else
    memcpy(scale_at, &kFloatNan, sizeof kFloatNan);
}

template <class Element>
FA2A_PART_OF_LOOP void quantize_block(bool is_ue8m0, u8* q, u8* scale_at, const typename Element::Bits* x) {
  bool is_finite;
  const float amax = largest_of<Element>(x, is_finite);
  if (!is_finite) return store_nan(is_ue8m0, q, scale_at);
  const float inverse = store_scale(is_ue8m0, amax, scale_at);
  for (i32 first = 0; first < kQuantizedBlock; first += kChunk) {
    Floats a, b;
    Words low, high;
    Row<Element>::load(x + first, a, b);
    to_e4m3_in_range(a * inverse, low);
    to_e4m3_in_range(b * inverse, high);
    Row<Element>::store_bytes(q + first, low, high);
  }
}

template <class Element>
FA2A_PART_OF_LOOP void quantize_blocks(ScaleFormat format, u8* q, u8* scales, const u8* x, i32 hidden) {
  using Bits = typename Element::Bits;
  const auto* bits = reinterpret_cast<const Bits*>(x);
  const bool is_ue8m0 = format == ScaleFormat::ue8m0;
  const i32 stride = is_ue8m0 ? 1 : 4;
  i32 first = 0;
  for (; first + kQuantizedBlock <= hidden; first += kQuantizedBlock, scales += stride)
    quantize_block<Element>(is_ue8m0, q + first, scales, bits + first);
  if (first == hidden) return;
  // A shorter block: zeros behind it change neither its largest nor what is kept of it.
  Bits padded[kQuantizedBlock] = {};
  u8 rounded[kQuantizedBlock];
  const auto count = static_cast<size_t>(hidden - first);
  memcpy(padded, bits + first, sizeof(Bits) * count);
  quantize_block<Element>(is_ue8m0, rounded, scales, padded);
  memcpy(q + first, rounded, count);
}

#define FA2A_QUANTIZE_LOOP(Element)                                                                           \
  FA2A_FOR_EACH_ISA void quantize_##Element(ScaleFormat format, u8* q, u8* scales, const u8* x, i32 hidden) { \
    quantize_blocks<Element>(format, q, scales, x, hidden);                                                   \
  }

FA2A_QUANTIZE_LOOP(Bfloat16)
FA2A_QUANTIZE_LOOP(Float16)
FA2A_QUANTIZE_LOOP(Float32)

FA2A_FOR_EACH_ISA void cast_floats(u8* q, const float* x, i32 hidden) {
  for (i32 first = 0; first < hidden; first += kChunk) {
    const i32 count = hidden - first < kChunk ? hidden - first : kChunk;
    float in[kChunk] = {};
    u8 out[kChunk];
    memcpy(in, x + first, sizeof(float) * static_cast<size_t>(count));
    Floats a, b;
    Words low, high;
    Row<Float32>::load(in, a, b);
    to_e4m3(a, low);
    to_e4m3(b, high);
    Row<Float32>::store_bytes(out, low, high);
    memcpy(q + first, out, static_cast<size_t>(count));
  }
}

}  // namespace

void quantize_row(DType dtype, ScaleFormat format, u8* q, u8* scales, const u8* x, i32 hidden) {
  if (format == ScaleFormat::ue8m0) {  // the padding of the last word
    const u64 num_bytes = scale_bytes(format, hidden), num_used = static_cast<u64>(num_scales(hidden));
    memset(scales + num_used, 0, num_bytes - num_used);
  }
  switch (dtype) {
    case DType::bfloat16:
      return quantize_Bfloat16(format, q, scales, x, hidden);
    case DType::float16:
      return quantize_Float16(format, q, scales, x, hidden);
    case DType::float32:
      return quantize_Float32(format, q, scales, x, hidden);
  }
}

void cast_row_to_e4m3(u8* q, const float* x, i32 hidden) { cast_floats(q, x, hidden); }

}  // namespace fa2a
