// Which rank each choice goes to, which row of it carries the token, and which answers it: by one block, the same
// numbers as the CPU counts one after the other.
#pragma once

#include "kernels/cuda/rank.cuh"

namespace fa2a {
namespace device {

constexpr u32 kNothingBad = 0xffffffffu;

FA2A_DEVICE i64 expert_at(const RouteArgs& args, i64 i) {
  return args.idx_is_64_bit ? static_cast<const i64*>(args.topk_idx)[i] : static_cast<const i32*>(args.topk_idx)[i];
}

FA2A_DEVICE Status check_choice(const DeviceRank& r, const RouteArgs& args, i64 i) {
  const i64 expert = expert_at(args, i);
  if (expert < -1 || expert >= r.shape.num_experts) return Status::bad_expert;
  for (i64 before = i - i % r.shape.num_topk; expert >= 0 && before < i; ++before)
    if (expert_at(args, before) == expert) return Status::repeated_expert;
  return Status::ok;
}

// Everything that depends on the values is checked before the round begins: after that, peers count on us. The first
// bad choice is the one that is told.
FA2A_DEVICE void find_bad_choice(const DeviceRank& r, const RouteArgs& args, u32& first_bad) {
  const i64 num_choices = static_cast<i64>(args.num_tokens) * r.shape.num_topk;
  for (i64 i = thread_idx(); i < num_choices; i += num_threads())
    if (check_choice(r, args, i) != Status::ok) atomic_min(&first_bad, static_cast<u32>(i));
}

FA2A_DEVICE void note_choices(const DeviceRank& r, const RouteArgs& args, DeviceRound& round) {
  const i64 num_choices = static_cast<i64>(args.num_tokens) * r.shape.num_topk;
  for (i64 i = thread_idx(); i < num_choices; i += num_threads()) {
    const i32 expert = static_cast<i32>(expert_at(args, i));
    const i32 dst = expert < 0 ? -1 : r.expert_rank[expert];
    round.expert[i] = expert;
    round.dst_rank[i] = dst;
    round.weights[i] = args.topk_weights[i];
    if (dst < 0) continue;
    i32* claim = &round.claims_to[static_cast<i64>(dst) * r.shape.max_local_experts + r.expert_local[expert]];
    atomic_add(reinterpret_cast<u32*>(claim), 1);
  }
}

// The rows and answers of one destination, by one warp: tokens in order, 32 at a time.
FA2A_DEVICE void count_rows_to(const DeviceRank& r, DeviceRound& round, i32 dst) {
  const i32 k = r.shape.num_topk;
  i32 num_rows = 0, num_answers = 0;
  for (i32 base = 0; base < round.num_tokens; base += kWarpLanes) {
    const i32 token = base + lane();
    const i64 first = static_cast<i64>(token) * k;
    i32 num_choices = 0;
    for (i32 choice = 0; choice < k && token < round.num_tokens; ++choice)
      num_choices += round.dst_rank[first + choice] == dst ? 1 : 0;
    const u32 has_row = ballot(num_choices > 0);
    const i32 prefix = warp_prefix(num_choices);
    const i32 row = num_rows + count_bits(has_row & lanes_below());
    i32 answer = num_answers + prefix - num_choices;
    for (i32 choice = 0; choice < k && num_choices > 0; ++choice) {
      if (round.dst_rank[first + choice] != dst) continue;
      round.dispatch_row[first + choice] = row;
      // reduce="expert": one answer a row, whichever choices it sums.
      round.combine_row[first + choice] = r.shape.reduce_at_expert ? row : answer;
      ++answer;
    }
    num_rows += count_bits(has_row);
    num_answers += shuffle(prefix, kWarpLanes - 1);
  }
  if (lane() != 0) return;
  round.rows_to[dst] = num_rows;
  round.answers_from[dst] = r.shape.reduce_at_expert ? num_rows : num_answers;
}

// A barrier before and after is the caller's.
FA2A_DEVICE void clear_claims(const DeviceRank& r, DeviceRound& round) {
  for (i32 i = thread_idx(); i < r.shape.num_ranks * r.shape.max_local_experts; i += num_threads())
    round.claims_to[i] = 0;
}

FA2A_DEVICE void route_choices(const DeviceRank& r, const RouteArgs& args, DeviceRound& round) {
  note_choices(r, args, round);
  sync_block();
  for (i32 dst = warp(); dst < r.shape.num_ranks; dst += num_warps()) count_rows_to(r, round, dst);
}

}  // namespace device
}  // namespace fa2a
