// Moving and summing one row, by all threads of a block.
#pragma once

#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/rank.cuh"

namespace fa2a {
namespace device {

constexpr i32 kMaxTopk = 32;  // choices of a token; a warp has as many lanes

FA2A_DEVICE bool are_whole(const void* a, const void* b, u64 num_bytes, u64 unit) {
  return ((reinterpret_cast<u64>(a) | reinterpret_cast<u64>(b) | num_bytes) & (unit - 1)) == 0;
}

// Copies `num_bytes` to each of `num_places` rows of peers' windows, reading each byte once. All rows begin on a line
// of their window, at the same distance from it.
FA2A_DEVICE void put_row(u8* const* places, i32 num_places, const u8* from, u64 num_bytes) {
  if (num_places == 0) return;
  const u64 first = static_cast<u64>(thread_idx()), stride = static_cast<u64>(num_threads());
  if (are_whole(places[0], from, num_bytes, sizeof(Vector16))) {
    for (u64 at = first * sizeof(Vector16); at < num_bytes; at += stride * sizeof(Vector16)) {
      const Vector16 value = *reinterpret_cast<const Vector16*>(from + at);
      for (i32 i = 0; i < num_places; ++i) put(places[i] + at, value);
    }
  } else if (are_whole(places[0], from, num_bytes, sizeof(u32))) {
    for (u64 at = first * sizeof(u32); at < num_bytes; at += stride * sizeof(u32))
      for (i32 i = 0; i < num_places; ++i) put(places[i] + at, *reinterpret_cast<const u32*>(from + at));
  } else {
    for (u64 at = first; at < num_bytes; at += stride)
      for (i32 i = 0; i < num_places; ++i) put(places[i] + at, from[at]);
  }
}

// The same within this rank's own memory, by `stride` threads of which this is number `first`.
FA2A_DEVICE void copy_row(u8* to, const u8* from, u64 num_bytes, i32 first, i32 stride) {
  const u64 begin = static_cast<u64>(first), step = static_cast<u64>(stride);
  if (are_whole(to, from, num_bytes, sizeof(Vector16))) {
    for (u64 at = begin * sizeof(Vector16); at < num_bytes; at += step * sizeof(Vector16))
      *reinterpret_cast<Vector16*>(to + at) = *reinterpret_cast<const Vector16*>(from + at);
  } else if (are_whole(to, from, num_bytes, sizeof(u32))) {
    for (u64 at = begin * sizeof(u32); at < num_bytes; at += step * sizeof(u32))
      *reinterpret_cast<u32*>(to + at) = *reinterpret_cast<const u32*>(from + at);
  } else {
    for (u64 at = begin; at < num_bytes; at += step) to[at] = from[at];
  }
}

// Rows to be summed, in the order in which they are: shared by a block.
struct RowList {
  const u8* rows[kMaxTopk];
  float weights[kMaxTopk];
  i32 count;
  float factor;  // applied to the sum only when it is not 1
  u32 is_zero;   // the sum is +0 and no row is read
};

struct StoreHere {
  static FA2A_DEVICE void store(u8* to, const Vector16& value) { *reinterpret_cast<Vector16*>(to) = value; }
};
struct StoreToPeer {
  static FA2A_DEVICE void store(u8* to, const Vector16& value) { put(to, value); }
};

// out = round((((0 + w0 * row0) + w1 * row1) + ...) * factor). Multiply and add are rounded separately, so that a GPU,
// a CPU and torch agree bit for bit.
template <class Store, class Element>
FA2A_DEVICE void sum_rows_of(Element, u8* out, const RowList& list, u64 num_bytes) {
  using Bits = typename Element::Bits;
  constexpr i32 kCount = sizeof(Vector16) / sizeof(Bits);
  const u64 stride = static_cast<u64>(num_threads()) * sizeof(Vector16);
  for (u64 at = static_cast<u64>(thread_idx()) * sizeof(Vector16); at < num_bytes; at += stride) {
    union Lanes {
      Vector16 vector;
      Bits bits[kCount];
    };
    float sum[kCount];
    for (i32 i = 0; i < kCount; ++i) sum[i] = 0.0f;
    const i32 count = list.is_zero != 0 ? 0 : list.count;
    for (i32 row = 0; row < count; ++row) {
      Lanes in;
      in.vector = *reinterpret_cast<const Vector16*>(list.rows[row] + at);
      const float weight = list.weights[row];
      for (i32 i = 0; i < kCount; ++i) sum[i] = add(sum[i], multiply(weight, Element::widen(in.bits[i])));
    }
    Lanes rounded;
    const bool scaled = list.factor != 1.0f && list.is_zero == 0;
    for (i32 i = 0; i < kCount; ++i) rounded.bits[i] = Element::narrow(scaled ? multiply(sum[i], list.factor) : sum[i]);
    Store::store(out + at, rounded.vector);
  }
}

template <class Store>
FA2A_DEVICE void sum_rows(const DeviceRank& r, u8* out, const RowList& list) {
  const auto num_bytes = static_cast<u64>(r.shape.hidden_bytes);
  with_element(r.dtype, [&](auto element) { sum_rows_of<Store>(element, out, list, num_bytes); });
}

}  // namespace device
}  // namespace fa2a
