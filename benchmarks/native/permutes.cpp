// The permutes of the benchmarks' peers in C++: who sends what to whom, rows gathered, rows summed. Never in a wheel.
//
// A peer with torch's permutes pays a call of torch for each of many small steps. This is what somebody would write who
// tunes it: one pass over the routing, and the loops that fault_a2a runs itself (its weighted sum, its copies past the
// cache). C linkage, called through ctypes.
#include <string.h>

#include <vector>

#include "host/copy.hpp"
#include "kernels/cpu/rows.hpp"

namespace {

using fa2a::i32;
using fa2a::i64;
using fa2a::u64;
using fa2a::u8;

}  // namespace

#define FA2A_FOR_CTYPES extern "C" __attribute__((visibility("default")))

// All that one rank must know of a round, from everybody's routing. Counts are of rows unless they say otherwise;
// `benchmarks/native_permutes.py` allocates the arrays, each for the largest round.
struct Plan {
  i64* sent_tokens;      // [tokens * ranks] mine, by destination, then token
  i64* send_counts;      // [ranks]
  i64* recv_counts;      // [ranks]
  i64* choice_counts;    // [ranks] choices of each source that came here
  i64* answer_counts;    // [ranks] choices of mine that each rank answers
  i64* num_per_expert;   // [local experts]
  i64* row_of_place;     // [choices here] expert-major: which received row stands there
  i64* place_of_choice;  // [choices here] by source, token, choice: its expert-major place
  float* weights_here;   // [choices here]
  i64* row_starts;       // [received rows + 1] into the choices here
  i64* answer_of_mine;   // [tokens * topk] which returned row answers a choice of mine
  i64* sum_of_mine;      // [sent rows] by token: which returned sum belongs to it
  i64* sum_starts;       // [tokens + 1] into sum_of_mine
  i64 num_sent;
  i64 num_received;
  i64 num_choices;
};

// gathered: int32 [ranks][2][tokens][topk], expert numbers, then the bits of float32 weights.
FA2A_FOR_CTYPES void fa2a_plan(Plan* plan, const i32* gathered, const i32* rank_of, const i32* local_of, i64 num_ranks,
                               i64 num_tokens, i64 num_topk, i64 num_local, i64 rank) {
  const i64 num_choices_of_rank = num_tokens * num_topk;
  auto clear = [](i64* words, i64 count) { memset(words, 0, sizeof(i64) * static_cast<u64>(count)); };
  clear(plan->send_counts, num_ranks);
  clear(plan->recv_counts, num_ranks);
  clear(plan->choice_counts, num_ranks);
  clear(plan->answer_counts, num_ranks);
  clear(plan->num_per_expert, num_local);

  // Of my own tokens: one row to each rank, one answer for each choice.
  const i32* mine = gathered + 2 * num_choices_of_rank * rank;
  std::vector<i64> last_token(static_cast<size_t>(num_ranks), -1);
  for (i64 i = 0; i < num_choices_of_rank; ++i) {
    const i32 dst = rank_of[mine[i]];
    ++plan->answer_counts[dst];
    plan->send_counts[dst] += last_token[static_cast<size_t>(dst)] != i / num_topk;
    last_token[static_cast<size_t>(dst)] = i / num_topk;
  }
  std::vector<i64> next_row(static_cast<size_t>(num_ranks), 0), next_answer(static_cast<size_t>(num_ranks), 0);
  for (size_t dst = 1; dst < next_row.size(); ++dst) {
    next_row[dst] = next_row[dst - 1] + plan->send_counts[dst - 1];
    next_answer[dst] = next_answer[dst - 1] + plan->answer_counts[dst - 1];
  }
  plan->num_sent = 0;
  for (i64 token = 0; token < num_tokens; ++token) {
    plan->sum_starts[token] = plan->num_sent;
    for (i64 dst = 0; dst < num_ranks; ++dst) {
      bool is_sent = false;
      for (i64 k = 0; k < num_topk; ++k) is_sent |= rank_of[mine[token * num_topk + k]] == dst;
      if (!is_sent) continue;
      const i64 row = next_row[static_cast<size_t>(dst)]++;
      plan->sent_tokens[row] = token;
      plan->sum_of_mine[plan->num_sent++] = row;
    }
    for (i64 k = 0; k < num_topk; ++k) {
      const i64 i = token * num_topk + k;
      plan->answer_of_mine[i] = next_answer[static_cast<size_t>(rank_of[mine[i]])]++;
    }
  }
  plan->sum_starts[num_tokens] = plan->num_sent;

  // Of everybody's tokens: what comes here, and its place in expert-major order.
  std::vector<i64> expert_of;
  std::vector<i64> row_of;
  plan->num_received = plan->num_choices = 0;
  for (i64 src = 0; src < num_ranks; ++src) {
    const i32* experts = gathered + 2 * num_choices_of_rank * src;
    const i32* weights = experts + num_choices_of_rank;
    for (i64 token = 0; token < num_tokens; ++token) {
      bool is_here = false;
      for (i64 i = token * num_topk; i < (token + 1) * num_topk; ++i) {
        const i32 local = local_of[experts[i]];
        if (local < 0) continue;
        if (!is_here) plan->row_starts[plan->num_received] = plan->num_choices;
        is_here = true;
        memcpy(&plan->weights_here[plan->num_choices++], &weights[i], sizeof(float));
        expert_of.push_back(local);
        row_of.push_back(plan->num_received);
        ++plan->num_per_expert[local];
        ++plan->choice_counts[src];
      }
      plan->recv_counts[src] += is_here;
      plan->num_received += is_here;
    }
  }
  plan->row_starts[plan->num_received] = plan->num_choices;
  std::vector<i64> next_place(static_cast<size_t>(num_local), 0);
  for (size_t expert = 1; expert < next_place.size(); ++expert)
    next_place[expert] = next_place[expert - 1] + plan->num_per_expert[expert - 1];
  for (size_t i = 0; i < expert_of.size(); ++i) {
    const i64 place = next_place[static_cast<size_t>(expert_of[i])]++;
    plan->place_of_choice[i] = place;
    plan->row_of_place[place] = row_of[i];
  }
}

// out[i] = rows[indices[i]]. Past the cache under the same rule as fault_a2a's own rows: by what all ranks write.
FA2A_FOR_CTYPES void fa2a_gather(u8* out, const u8* rows, const i64* indices, i64 count, i64 row_bytes, i64 num_ranks) {
  const auto bytes = static_cast<u64>(row_bytes);
  const bool streamed = static_cast<u64>(count) * bytes * static_cast<u64>(num_ranks) >= fa2a::kStreamedBytes;
  for (i64 i = 0; i < count; ++i) {
    const u8* row = rows + bytes * static_cast<u64>(indices[i]);
    if (streamed)
      fa2a::stream_row(out + bytes * static_cast<u64>(i), row, bytes);
    else
      fa2a::copy_row(out + bytes * static_cast<u64>(i), row, bytes);
  }
  fa2a::finish_copies();
}

// out[i] = the sum over j from starts[i] to starts[i + 1] of weights[j] * rows[indices[j]]; no weights: each is 1.
// float32 inside, rounded once. dtype: 0 bfloat16, 1 float32, 2 float16.
FA2A_FOR_CTYPES void fa2a_sum(u8* out, const u8* rows, const i64* indices, const i64* starts, const float* weights,
                              i64 count, i64 hidden, i64 dtype) {
  const auto type = static_cast<fa2a::DType>(dtype);
  const u64 bytes = static_cast<u64>(hidden) * fa2a::item_bytes(type);
  std::vector<const u8*> parts;
  std::vector<float> ones;
  for (i64 i = 0; i < count; ++i) {
    parts.clear();
    for (i64 j = starts[i]; j < starts[i + 1]; ++j) parts.push_back(rows + bytes * static_cast<u64>(indices[j]));
    if (weights == nullptr) ones.assign(parts.size(), 1.0f);
    fa2a::weighted_sum(type, out + bytes * static_cast<u64>(i), parts.data(),
                       weights == nullptr ? ones.data() : weights + starts[i], static_cast<i32>(parts.size()),
                       static_cast<i32>(hidden), 1.0f, /*zero=*/false);
  }
}
