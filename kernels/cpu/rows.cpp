// The row loops: one template for each, made for each payload type and instruction set.
#include "kernels/cpu/rows.hpp"

#include <string.h>

#include "host/copy.hpp"
#include "kernels/cpu/numbers.hpp"
#include "protocol/layout.hpp"

namespace fa2a {

namespace {

#ifndef FA2A_CHUNKS
#define FA2A_CHUNKS 2
#endif
// So many chunks of the sum stay in registers while all rows of a token add to it. With the whole row as the
// accumulator, each choice carries 28 KiB of float32 (hidden 7168) through the caches once more.
constexpr i32 kNumChunks = FA2A_CHUNKS;

// `num_chunks` is a constant wherever this is inlined.
template <class Element, i32 num_chunks>
FA2A_PART_OF_LOOP void sum_chunks(typename Element::Bits* out, const u8* const* rows, const float* weights,
                                  i32 num_rows, i32 first, float factor) {
  constexpr i32 kItemsOfLine = kLine / sizeof(typename Element::Bits);
  Floats low[num_chunks], high[num_chunks];
  for (i32 c = 0; c < num_chunks; ++c) low[c] = high[c] = Floats{};
  for (i32 row = 0; row < num_rows; ++row) {
    const auto* at = reinterpret_cast<const typename Element::Bits*>(rows[row]) + first;
    const float weight = weights[row];
    for (i32 line = 0; line < num_chunks * kChunk; line += kItemsOfLine) read_ahead(at + line);
    for (i32 c = 0; c < num_chunks; ++c) {
      Floats a, b;
      Row<Element>::load(at + c * kChunk, a, b);
      low[c] = low[c] + weight * a;
      high[c] = high[c] + weight * b;
    }
  }
  for (i32 c = 0; c < num_chunks; ++c) {
    if (factor != 1.0f) {
      low[c] = low[c] * factor;
      high[c] = high[c] * factor;
    }
    Row<Element>::store(out + first + c * kChunk, low[c], high[c]);
  }
}

// The last elements of a row, fewer than a chunk.
template <class Element>
FA2A_PART_OF_LOOP void sum_last(typename Element::Bits* out, const u8* const* rows, const float* weights, i32 num_rows,
                                i32 first, size_t num_bytes, float factor) {
  using Bits = typename Element::Bits;
  Floats low = {}, high = {};
  Bits part[kChunk] = {};
  for (i32 row = 0; row < num_rows; ++row) {
    memcpy(part, reinterpret_cast<const Bits*>(rows[row]) + first, num_bytes);
    Floats a, b;
    Row<Element>::load(part, a, b);
    low = low + weights[row] * a;
    high = high + weights[row] * b;
  }
  if (factor != 1.0f) {
    low = low * factor;
    high = high * factor;
  }
  Row<Element>::store(part, low, high);
  memcpy(out + first, part, num_bytes);
}

template <class Element>
FA2A_PART_OF_LOOP void sum_rows(u8* out, const u8* const* rows, const float* weights, i32 num_rows, i32 hidden,
                                float factor) {
  auto* bits = reinterpret_cast<typename Element::Bits*>(out);
  i32 first = 0;
  for (; first + kNumChunks * kChunk <= hidden; first += kNumChunks * kChunk)
    sum_chunks<Element, kNumChunks>(bits, rows, weights, num_rows, first, factor);
  for (; first + kChunk <= hidden; first += kChunk)
    sum_chunks<Element, 1>(bits, rows, weights, num_rows, first, factor);
  if (first == hidden) return;
  const size_t num_bytes = sizeof(typename Element::Bits) * static_cast<size_t>(hidden - first);
  sum_last<Element>(bits, rows, weights, num_rows, first, num_bytes, factor);
}

// The loops of the casts, eight elements a time; the last ones go through a full vector of their own.
template <class Element>
FA2A_PART_OF_LOOP void load_some(const typename Element::Bits* at, i32 count, Floats& out) {
  typename Element::Bits part[kLanes] = {};
  memcpy(part, at, sizeof part[0] * static_cast<size_t>(count));
  load_lanes(Element(), part, out);
}

template <class Element>
FA2A_PART_OF_LOOP void store_some(typename Element::Bits* at, i32 count, const Floats& value) {
  typename Element::Bits part[kLanes];
  store_lanes(Element(), part, value);
  memcpy(at, part, sizeof part[0] * static_cast<size_t>(count));
}

// Between two rows of different types.
template <class From, class To>
FA2A_PART_OF_LOOP void cast_row(u8* to, const u8* from, i32 hidden) {
  const auto* in = reinterpret_cast<const typename From::Bits*>(from);
  auto* out = reinterpret_cast<typename To::Bits*>(to);
  for (i32 first = 0; first < hidden; first += kLanes) {
    const i32 count = hidden - first;
    Floats value;
    if (count >= kLanes) {
      load_lanes(From(), in + first, value);
      store_lanes(To(), out + first, value);
    } else {
      load_some<From>(in + first, count, value);
      store_some<To>(out + first, count, value);
    }
  }
}

// Every loop by name, since a template cannot be compiled for several instruction sets.
#define FA2A_SUM_LOOP(Element)                                                                                      \
  FA2A_FOR_EACH_ISA void weighted_sum_##Element(u8* out, const u8* const* rows, const float* weights, i32 num_rows, \
                                                i32 hidden, float factor) {                                         \
    sum_rows<Element>(out, rows, weights, num_rows, hidden, factor);                                                \
  }
#define FA2A_CAST_LOOP(From, To)                                                  \
  FA2A_FOR_EACH_ISA void cast_##From##_##To(u8* to, const u8* from, i32 hidden) { \
    cast_row<From, To>(to, from, hidden);                                         \
  }

FA2A_SUM_LOOP(Bfloat16)
FA2A_SUM_LOOP(Float16)
FA2A_SUM_LOOP(Float32)
FA2A_CAST_LOOP(Bfloat16, Float32)
FA2A_CAST_LOOP(Float16, Float32)
FA2A_CAST_LOOP(Float32, Bfloat16)
FA2A_CAST_LOOP(Float32, Float16)

}  // namespace

void weighted_sum(DType dtype, u8* out, const u8* const* rows, const float* weights, i32 num_rows, i32 hidden,
                  float factor, bool zero) {
  if (zero) {
    memset(out, 0, item_bytes(dtype) * static_cast<size_t>(hidden));
    return;
  }
  switch (dtype) {
    case DType::bfloat16:
      return weighted_sum_Bfloat16(out, rows, weights, num_rows, hidden, factor);
    case DType::float16:
      return weighted_sum_Float16(out, rows, weights, num_rows, hidden, factor);
    case DType::float32:
      return weighted_sum_Float32(out, rows, weights, num_rows, hidden, factor);
  }
}

void store_row(DType dtype, u8* row, const float* sum, i32 hidden) {
  const u8* from = reinterpret_cast<const u8*>(sum);
  switch (dtype) {
    case DType::bfloat16:
      return cast_Float32_Bfloat16(row, from, hidden);
    case DType::float16:
      return cast_Float32_Float16(row, from, hidden);
    case DType::float32:
      memcpy(row, sum, sizeof(float) * static_cast<size_t>(hidden));
  }
}

void widen_row(DType dtype, float* out, const u8* row, i32 hidden) {
  u8* to = reinterpret_cast<u8*>(out);
  switch (dtype) {
    case DType::bfloat16:
      return cast_Bfloat16_Float32(to, row, hidden);
    case DType::float16:
      return cast_Float16_Float32(to, row, hidden);
    case DType::float32:
      memcpy(out, row, sizeof(float) * static_cast<size_t>(hidden));
  }
}

}  // namespace fa2a
