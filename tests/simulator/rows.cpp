// The arithmetic of rows as the kernels call it, float32 only, in steps between which other ranks go on.
#include "kernels/cpu/rows.hpp"

#include <string.h>

#include "tests/simulator/scheduler.hpp"

namespace fa2a {

// The kernels' own loops read a row at one go; here a row can change while it is read, as on a real machine.
void weighted_sum(DType, u8* out, const u8* const* rows, const float* weights, i32 num_rows, i32 hidden, float, bool) {
  auto* sum = reinterpret_cast<float*>(out);
  for (i32 h = 0; h < hidden; ++h) sum[h] = 0.0f;
  for (i32 row = 0; row < num_rows; ++row) {
    for (i32 h = 0; h < hidden; ++h) {
      float value;
      if (h % 2 == 0) sim::scheduler->touch();
      memcpy(&value, rows[row] + sizeof value * static_cast<u64>(h), sizeof value);
      const float term = weights[row] * value;
      sum[h] = sum[h] + term;
    }
  }
}

}  // namespace fa2a
