// Arithmetic on one row: weighted sums in float32, multiply and add rounded separately, and the rounding to the payload
// type.
#pragma once

#include "kernels/cpu/context.hpp"

namespace fa2a {

constexpr u64 item_bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// out = round((((0 + w0 * row0) + w1 * row1) + ...) * factor), element by element, in one pass over every row. No fused
// multiply-add: a GPU, torch and this must agree bit for bit. `factor` is applied only when it is not 1; `zero` gives
// +0 and reads no row. The rows lie anywhere; `out` must not overlap them.
void weighted_sum(DType dtype, u8* out, const u8* const* rows, const float* weights, i32 num_rows, i32 hidden,
                  float factor, bool zero);

// Round to nearest even, as torch casts; a NaN becomes some NaN.
void store_row(DType dtype, u8* row, const float* sum, i32 hidden);
// Exact.
void widen_row(DType dtype, float* out, const u8* row, i32 hidden);

}  // namespace fa2a
