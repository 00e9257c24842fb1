// The number formats of a row, bit by bit and eight at a time: bfloat16, float16 and fp8 e4m3, to and from float32.
//
// Vectors by the compiler's own types: what g++ makes of the same scalar loops is scalar as soon as a value is selected
// between three. Not _Float16 and not F16C: the plain x86-64 version would call a library function per element, and two
// versions of one loop could differ. Vectors go by reference, since how they are passed depends on the machine.
#pragma once

#include <string.h>

#include "kernels/cpu/isa.hpp"
#include "protocol/compiler.hpp"

namespace fa2a {

using Floats = float __attribute__((vector_size(32)));
using Words = u32 __attribute__((vector_size(32)));
using Ints = i32 __attribute__((vector_size(32)));
using Shorts = short __attribute__((vector_size(32)));  // twice as many
using Halves = u16 __attribute__((vector_size(16)));    // as many as Floats
using Bytes = u8 __attribute__((vector_size(8)));

constexpr i32 kLanes = 8;
// So many elements of a row are two vectors of Floats.
constexpr i32 kChunk = 2 * kLanes;

constexpr i32 kFloatInfinity = 0x7f800000;
constexpr i32 kFloatMagnitude = 0x7fffffff;
// The bits of 2^n.
constexpr i32 power_of_two(i32 n) { return (127 + n) << 23; }

// --- from and to the low 16 bits of each lane; what stands above them is ignored, and zero in a result

struct Bfloat16 {
  using Bits = u16;
  static constexpr short kInfinity = 0x7f80;

  static FA2A_PART_OF_LOOP void widen(const Words& half, Floats& out) { out = reinterpret_cast<Floats>(half << 16); }
  static FA2A_PART_OF_LOOP void narrow(const Floats& value, Words& half) {
    const Words bits = reinterpret_cast<Words>(value);
    const Words rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    // Rounded like a number, a NaN could carry into the sign or become an infinity.
    const Ints is_nan = (reinterpret_cast<Ints>(bits) & kFloatMagnitude) > kFloatInfinity;
    half = is_nan ? Words{} + 0x7fc0u : rounded;
  }
};

struct Float16 {
  using Bits = u16;
  static constexpr short kInfinity = 0x7c00;

  static FA2A_PART_OF_LOOP void widen(const Words& half, Floats& out) {
    const Ints magnitude = reinterpret_cast<Ints>(half & 0x7fffu);
    const Ints moved = magnitude << 13;
    // A denormal m * 2^-24: 2^-14 (1 + m / 1024) less 2^-14 is exact, and meets no denormal float32, which some
    // machines take a hundred cycles for and torch.set_flush_denormal() turns into zero.
    const Floats small = reinterpret_cast<Floats>(moved + power_of_two(-14)) - 0x1p-14f;
    const Ints normal = moved + (112 << 23);
    const Ints finite = magnitude < 0x0400 ? reinterpret_cast<Ints>(small) : normal;
    const Ints bits = magnitude >= static_cast<i32>(kInfinity) ? moved | kFloatInfinity : finite;
    out = reinterpret_cast<Floats>(reinterpret_cast<Words>(bits) | (half & 0x8000u) << 16);
  }
  static FA2A_PART_OF_LOOP void narrow(const Floats& value, Words& half) {
    const Words bits = reinterpret_cast<Words>(value);
    const Ints magnitude = reinterpret_cast<Ints>(bits) & kFloatMagnitude;
    // Carries into the exponent, and from 65520 on into infinity, as it should. NaN and what is larger still wraps
    // around and is not selected.
    const Words carried = reinterpret_cast<Words>(magnitude) - (112u << 23) + 0xfffu + (bits >> 13 & 1u);
    // 0.5 has units of 2^-24 in its last place: the addition rounds a denormal, to even, by itself.
    const Ints small = reinterpret_cast<Ints>(reinterpret_cast<Floats>(magnitude) + 0.5f) - power_of_two(-1);
    const Ints finite = magnitude < power_of_two(-14) ? small : reinterpret_cast<Ints>(carried >> 13);
    const Ints special = magnitude > kFloatInfinity ? Ints{} + 0x7e00 : Ints{} + 0x7c00;
    const Ints rounded = magnitude >= power_of_two(16) ? special : finite;
    half = reinterpret_cast<Words>(rounded) | (bits >> 16 & 0x8000u);
  }
};

struct Float32 {
  using Bits = float;
};

// --- eight elements as they stand in a row

template <class Element>
FA2A_PART_OF_LOOP void load_lanes(Element, const u16* at, Floats& out) {
  Halves half;
  memcpy(&half, at, sizeof half);
  Element::widen(__builtin_convertvector(half, Words), out);
}
template <class Element>
FA2A_PART_OF_LOOP void store_lanes(Element, u16* at, const Floats& value) {
  Words wide;
  Element::narrow(value, wide);
  const Halves half = __builtin_convertvector(wide, Halves);
  memcpy(at, &half, sizeof half);
}
FA2A_PART_OF_LOOP void load_lanes(Float32, const float* at, Floats& out) { memcpy(&out, at, sizeof out); }
FA2A_PART_OF_LOOP void store_lanes(Float32, float* at, const Floats& value) { memcpy(at, &value, sizeof value); }

// --- one chunk of a row. A 16-bit type gives its even elements and its odd ones, which takes no shuffle; float32 the
// first half and the second. Whatever is done to all elements alike does not mind.

template <class Element>
struct Row {
  static FA2A_PART_OF_LOOP void load(const u16* at, Floats& even, Floats& odd) {
    Words pairs;
    memcpy(&pairs, at, sizeof pairs);
    Element::widen(pairs, even);
    Element::widen(pairs >> 16, odd);
  }
  static FA2A_PART_OF_LOOP void store(u16* at, const Floats& even, const Floats& odd) {
    Words low, high;
    Element::narrow(even, low);
    Element::narrow(odd, high);
    const Words pairs = low | high << 16;
    memcpy(at, &pairs, sizeof pairs);
  }
  // One byte an element, each from the low byte of a lane.
  static FA2A_PART_OF_LOOP void store_bytes(u8* at, const Words& even, const Words& odd) {
    const Halves pairs = __builtin_convertvector(even | odd << 8, Halves);
    memcpy(at, &pairs, sizeof pairs);
  }
};

template <>
struct Row<Float32> {
  static FA2A_PART_OF_LOOP void load(const float* at, Floats& first, Floats& second) {
    memcpy(&first, at, sizeof first);
    memcpy(&second, at + kLanes, sizeof second);
  }
  static FA2A_PART_OF_LOOP void store(float* at, const Floats& first, const Floats& second) {
    memcpy(at, &first, sizeof first);
    memcpy(at + kLanes, &second, sizeof second);
  }
  static FA2A_PART_OF_LOOP void store_bytes(u8* at, const Words& first, const Words& second) {
    const Bytes low = __builtin_convertvector(first, Bytes), high = __builtin_convertvector(second, Bytes);
    memcpy(at, &low, sizeof low);
    memcpy(at + kLanes, &high, sizeof high);
  }
};

// --- e4m3 ("fn"): sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinity; 448 (0x7e) is the largest, 0x7f
// NaN

constexpr float kE4m3Max = 448.0f;
constexpr u8 kE4m3Nan = 0x7f;

// For |value| <= 464, half way to the number after 448, which is not there. One byte in each lane.
FA2A_PART_OF_LOOP void to_e4m3_in_range(const Floats& value, Words& out) {
  const Words bits = reinterpret_cast<Words>(value);
  const Ints magnitude = reinterpret_cast<Ints>(bits) & kFloatMagnitude;
  const Ints normal = (magnitude - (120 << 23) + 0x7ffff + (magnitude >> 20 & 1)) >> 20;
  // 2^14 has units of 2^-9 in its last place, as have the denormals of e4m3.
  const Ints small = reinterpret_cast<Ints>(reinterpret_cast<Floats>(magnitude) + 0x1p14f) - power_of_two(14);
  const Ints rounded = magnitude < power_of_two(-6) ? small : normal;
  out = reinterpret_cast<Words>(rounded) | (bits >> 24 & 0x80u);
}

// Any value: what is too large, infinity included, becomes 448 of its sign, and a NaN a NaN, as torch 2.13 casts.
FA2A_PART_OF_LOOP void to_e4m3(const Floats& value, Words& out) {
  const Ints magnitude = reinterpret_cast<Ints>(value) & kFloatMagnitude;
  const Ints sign = reinterpret_cast<Ints>(value) & ~kFloatMagnitude;
  constexpr i32 largest = 0x43e00000;  // the bits of 448
  const Ints bounded = (magnitude < largest ? magnitude : Ints{} + largest) | sign;
  Words rounded;
  to_e4m3_in_range(reinterpret_cast<Floats>(bounded), rounded);
  const Ints is_nan = magnitude > kFloatInfinity;
  out = rounded | (reinterpret_cast<Words>(is_nan) & static_cast<u32>(kE4m3Nan));
}

}  // namespace fa2a
