// Arithmetic on one row: weighted sums in float32, multiply and add rounded separately, and the rounding to the payload
// type.
#pragma once

#include "kernels/cpu/context.hpp"

namespace fa2a {

// sum[i] = sum[i] + weight * row[i]. No fused multiply-add: a GPU, torch and this must agree bit for bit.
void add_scaled_row(DType dtype, float* sum, const u8* row, float weight, i32 hidden);
void scale_row(float* sum, float factor, i32 hidden);
// Round to nearest even.
void store_row(DType dtype, u8* row, const float* sum, i32 hidden);

}  // namespace fa2a
