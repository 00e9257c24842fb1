// The row loops, compiled for several instruction sets and chosen at load time: wheels travel, so nothing is
// -march=native.
#include "kernels/cpu/rows.hpp"

#include <string.h>

// Sanitizers run before the resolver of a multi-versioned function may, so those builds take the plain one.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__) && \
    !defined(__SANITIZE_ADDRESS__)
#define FA2A_FOR_EACH_ISA __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FA2A_FOR_EACH_ISA
#endif

namespace fa2a {

namespace {

inline float widen(u16 half) {
  const u32 bits = static_cast<u32>(half) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline u16 narrow(float value) {
  u32 bits;
  memcpy(&bits, &value, sizeof bits);
  const u32 rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<u16>(is_nan ? 0x7fc0u : rounded >> 16);
}

FA2A_FOR_EACH_ISA void add_bfloat16(float* __restrict sum, const u16* __restrict row, float weight, i32 hidden) {
  for (i32 i = 0; i < hidden; ++i) sum[i] = sum[i] + weight * widen(row[i]);
}

FA2A_FOR_EACH_ISA void add_float32(float* __restrict sum, const float* __restrict row, float weight, i32 hidden) {
  for (i32 i = 0; i < hidden; ++i) sum[i] = sum[i] + weight * row[i];
}

FA2A_FOR_EACH_ISA void store_bfloat16(u16* __restrict row, const float* __restrict sum, i32 hidden) {
  for (i32 i = 0; i < hidden; ++i) row[i] = narrow(sum[i]);
}

}  // namespace

void add_scaled_row(DType dtype, float* sum, const u8* row, float weight, i32 hidden) {
  if (dtype == DType::bfloat16) return add_bfloat16(sum, reinterpret_cast<const u16*>(row), weight, hidden);
  add_float32(sum, reinterpret_cast<const float*>(row), weight, hidden);
}

void scale_row(float* sum, float factor, i32 hidden) {
  for (i32 i = 0; i < hidden; ++i) sum[i] = sum[i] * factor;
}

void store_row(DType dtype, u8* row, const float* sum, i32 hidden) {
  if (dtype == DType::bfloat16) return store_bfloat16(reinterpret_cast<u16*>(row), sum, hidden);
  memcpy(row, sum, sizeof(float) * static_cast<size_t>(hidden));
}

}  // namespace fa2a
