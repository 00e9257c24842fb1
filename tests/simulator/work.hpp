// The tokens of a life in a round, and what must become of them: every row says whose it is, in which round and way.
#pragma once

#include <string.h>

#include <vector>

#include "kernels/cpu/context.hpp"
#include "tests/simulator/schedule.hpp"

namespace fa2a::sim {

constexpr i32 kHidden = 4, kNumTopk = 2, kNumLocal = 2;

// Small whole numbers, which float32 holds exactly in whatever order they are added up.
inline float sent_value(i32 life, u64 round, i32 token, i32 h) {
  return static_cast<float>(((life * 32 + static_cast<i32>(round % 32)) * 8 + token) * 4 + h + 1);
}
// What an expert of a life makes of it: of the other sign, so that a row on its way out is never taken for one on its
// way back.
inline float returned_value(float sent, i32 life, i32 local_expert) {
  return -(sent * 64.0f + static_cast<float>(life * kNumLocal + local_expert));
}

struct Batch {
  i32 num_tokens = 0;
  std::vector<float> x, weights, out;
  std::vector<i64> experts;
  std::vector<u8> codes;

  Batch() = default;
  Batch(const Schedule& schedule, i32 life, u64 round) {
    Dice dice(schedule.seed * 1000003 + static_cast<u64>(life) * 1009 + round);
    num_tokens = static_cast<i32>(dice.below(static_cast<u64>(schedule.num_tokens) + 1));
    const auto num_experts = static_cast<u64>(schedule.num_ranks * kNumLocal);
    for (i32 token = 0; token < num_tokens; ++token) {
      for (i32 h = 0; h < kHidden; ++h) x.push_back(sent_value(life, round, token, h));
      const u64 first = dice.below(num_experts);
      const u64 second = (first + 1 + dice.below(num_experts - 1)) % num_experts;
      experts.push_back(dice.one_in(12) ? -1 : static_cast<i64>(first));
      experts.push_back(static_cast<i64>(second));
      weights.push_back(0.3f);
      weights.push_back(0.1f + 0.2f * static_cast<float>(token));
    }
    out.resize(static_cast<size_t>(num_tokens) * kHidden);
    codes.resize(static_cast<size_t>(num_tokens) * kNumTopk);
  }

  i32 rank_of(size_t choice) const { return experts[choice] < 0 ? -1 : static_cast<i32>(experts[choice]) / kNumLocal; }

  // The output is the sum of the delivered choices, in their order, to the last bit. `holders`: the life of each rank
  // in the round's view.
  bool sums_are_exact(i32 life, u64 round, const std::vector<i32>& holders) const {
    for (i32 token = 0; token < num_tokens; ++token) {
      for (i32 h = 0; h < kHidden; ++h) {
        float sum = 0.0f;
        for (i32 k = 0; k < kNumTopk; ++k) {
          const auto choice = static_cast<size_t>(token * kNumTopk + k);
          if (codes[choice] != static_cast<u8>(Outcome::delivered)) continue;
          const auto expert = static_cast<i32>(experts[choice]);
          const float value = returned_value(sent_value(life, round, token, h),
                                             holders[static_cast<size_t>(rank_of(choice))], expert % kNumLocal);
          const float term = weights[choice] * value;
          sum = sum + term;
        }
        if (memcmp(&sum, &out[static_cast<size_t>(token * kHidden + h)], sizeof sum) != 0) return false;
      }
    }
    return true;
  }
};

}  // namespace fa2a::sim
