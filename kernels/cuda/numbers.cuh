// Number formats, one element at a time and by bits: the same results as the CPU's vectors, on a GPU and on its twin.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/verbs.hpp"

namespace fa2a {
namespace device {

constexpr u32 kInfinityBits = 0x7f800000u;
constexpr u32 kMagnitudeBits = 0x7fffffffu;

struct Bfloat16 {
  using Bits = u16;
  static FA2A_DEVICE float widen(u16 half) { return float_of(static_cast<u32>(half) << 16); }
  static FA2A_DEVICE u16 narrow(float value) {
    const u32 bits = bits_of(value);
    // Rounded like a number, a NaN could carry into the sign or become an infinity.
    if ((bits & kMagnitudeBits) > kInfinityBits) return 0x7fc0;
    return static_cast<u16>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
};

struct Float16 {
  using Bits = u16;
  static FA2A_DEVICE float widen(u16 half) {
    const u32 magnitude = half & 0x7fffu, sign = static_cast<u32>(half & 0x8000u) << 16;
    const u32 moved = magnitude << 13;
    if (magnitude >= 0x7c00u) return float_of(moved | kInfinityBits | sign);
    if (magnitude >= 0x0400u) return float_of((moved + (112u << 23)) | sign);
    // A denormal m * 2^-24: 2^-14 (1 + m / 1024) less 2^-14 is exact and meets no denormal float32.
    return float_of(bits_of(add(float_of(moved + (113u << 23)), -0x1p-14f)) | sign);
  }
  static FA2A_DEVICE u16 narrow(float value) {
    const u32 bits = bits_of(value), magnitude = bits & kMagnitudeBits;
    const u32 sign = bits >> 16 & 0x8000u;
    if (magnitude > kInfinityBits) return static_cast<u16>(0x7e00u | sign);
    if (magnitude >= 143u << 23) return static_cast<u16>(0x7c00u | sign);
    // 0.5 has units of 2^-24 in its last place: the addition rounds a denormal, to even, by itself.
    if (magnitude < 113u << 23)
      return static_cast<u16>((bits_of(add(float_of(magnitude), 0.5f)) - (126u << 23)) | sign);
    return static_cast<u16>(((magnitude - (112u << 23) + 0xfffu + (bits >> 13 & 1u)) >> 13) | sign);
  }
};

struct Float32 {
  using Bits = float;
  static FA2A_DEVICE float widen(float value) { return value; }
  static FA2A_DEVICE float narrow(float value) { return value; }
};

// e4m3: for |value| <= 464, half way to the number after 448, which is not there.
FA2A_DEVICE u8 to_e4m3_in_range(float value) {
  const u32 bits = bits_of(value), magnitude = bits & kMagnitudeBits, sign = bits >> 24 & 0x80u;
  // 2^14 has units of 2^-9 in its last place, as have the denormals of e4m3.
  if (magnitude < 121u << 23)
    return static_cast<u8>((bits_of(add(float_of(magnitude), 0x1p14f)) - (141u << 23)) | sign);
  return static_cast<u8>(((magnitude - (120u << 23) + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) | sign);
}

// `work(Element())` with the type of the rows' elements.
template <class Work>
FA2A_DEVICE void with_element(DType dtype, Work work) {
#if defined(FA2A_DTYPE)  // compiled for one type
  dtype = static_cast<DType>(FA2A_DTYPE);
#endif
  if (dtype == DType::bfloat16)
    work(Bfloat16());
  else if (dtype == DType::float16)
    work(Float16());
  else
    work(Float32());
}

}  // namespace device
}  // namespace fa2a
