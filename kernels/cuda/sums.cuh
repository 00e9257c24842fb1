// Sums of rows that came back, what became of each choice, and whose rows moved meanwhile: by a block.
#pragma once

#include "kernels/cuda/rows.cuh"

namespace fa2a {
namespace device {

// Of choice `i`, for rank `dst`. `kStreamed`: an answer that comes in chunks counts as far as its rows have come.
template <bool kStreamed>
FA2A_DEVICE Outcome outcome_of(const DeviceRound& round, i32 dst, i64 i) {
  if (dst < 0) return Outcome::none;
  if (!round.active.has(dst)) return Outcome::unroutable;
  const bool came = kStreamed ? round.combine_row[i] < round.in[dst].num_rows : round.answered.has(dst);
  return came ? Outcome::delivered : Outcome::lost;
}

// Where row `row` of a holder's answer stands in my window.
template <bool kStreamed>
FA2A_DEVICE const u8* answer_at(const DeviceRank& r, const DeviceRound& round, i32 dst, i32 row) {
  const i32 slot = kStreamed ? slot_of(row, r.at.num_combine_rows) : row;
  return inbound(r, round, dst) + r.at.combine_rows[parity_of(round)] + r.at.combine_stride * static_cast<u64>(slot);
}

// float32 sums, each rounded once per choice, so that the order of k is the order of the reference. By one thread.
template <bool kStreamed>
FA2A_DEVICE void find_factor(const DeviceRank& r, const DeviceRound& round, const float* weights, i64 first,
                             RowList& list) {
  list.factor = 1.0f;
  list.is_zero = 0;
  float all = 0.0f, here = 0.0f;
  bool missing = false;
  for (i64 i = first; i < first + r.shape.num_topk && r.renormalize; ++i) {
    const Outcome code = outcome_of<kStreamed>(round, round.dst_rank[i], i);
    if (code == Outcome::none) continue;
    all = add(all, weights[i]);
    if (code == Outcome::delivered)
      here = add(here, weights[i]);
    else
      missing = true;
  }
  if (!missing) return;
  list.is_zero = here == 0.0f ? 1 : 0;
  list.factor = divide(all, here);
}

// The rows of one token, by the first warp, a lane a choice: in the order of the choices, or one a rank by rank.
template <bool kStreamed>
FA2A_DEVICE void list_rows(const DeviceRank& r, const DeviceRound& round, i32 token, const ReduceTensors& to,
                           RowList& list) {
  const float* weights = to.topk_weights != nullptr ? to.topk_weights : round.weights;
  const i32 k = r.shape.num_topk;
  const i64 first = static_cast<i64>(token) * k;
  const i32 dst = lane() < k ? round.dst_rank[first + lane()] : -1;
  const Outcome code = outcome_of<kStreamed>(round, dst, first + lane());
  if (lane() < k) to.codes[first + lane()] = static_cast<u8>(code);
  bool adds = code == Outcome::delivered;
  if (r.shape.reduce_at_expert)
    for (i32 choice = 0; choice < lane() && adds; ++choice) adds = round.dst_rank[first + choice] != dst;
  const u32 rows = ballot(adds);
  i32 place = count_bits(rows & lanes_below());
  if (r.shape.reduce_at_expert) {
    place = 0;
    for (i32 choice = 0; choice < k; ++choice)
      if ((rows >> choice & 1u) != 0 && round.dst_rank[first + choice] < dst) ++place;
  }
  if (adds) {
    list.rows[place] = answer_at<kStreamed>(r, round, dst, round.combine_row[first + lane()]);
    list.weights[place] = r.shape.reduce_at_expert || r.weights_at_expert ? 1.0f : weights[first + lane()];
  }
  if (lane() != 0) return;
  list.count = count_bits(rows);
  find_factor<kStreamed>(r, round, weights, first, list);
}

template <bool kStreamed>
FA2A_DEVICE void sum_token(const DeviceRank& r, const DeviceRound& round, i32 token, const ReduceTensors& to,
                           RowList& list) {
  if (warp() == 0) list_rows<kStreamed>(r, round, token, to, list);
  sync_block();
  sum_rows<StoreHere>(r, to.out + static_cast<u64>(r.shape.hidden_bytes) * static_cast<u64>(token), list);
  sync_block();  // the list is made anew
}

// Whose word moved since it was noted: its writer stored without consent, and its rows may be torn. `withdraws(holder)`
// looks, by one thread, and takes such a one back. By the block; true if there was one, and sums must be made again.
template <class Withdraws>
FA2A_DEVICE bool withdraw_changed(DeviceRank& r, u32& num_changed, Withdraws withdraws) {
  if (thread_idx() == 0) num_changed = 0;
  sync_block();
  for (i32 dst = thread_idx(); dst < r.shape.num_ranks && guarded(guard_recheck); dst += num_threads())
    if (withdraws(dst)) atomic_add(&num_changed, 1);
  sync_block();
  const bool changed = num_changed != 0;
  if (thread_idx() == 0) r.stats.num_rechecks += num_changed;
  sync_block();
  return changed;
}

struct OutcomeCounts {
  u32 num_lost;
  u32 num_unroutable;
};

FA2A_DEVICE void count_outcome(u8 code, OutcomeCounts& counts) {
  if (code == static_cast<u8>(Outcome::lost)) atomic_add(&counts.num_lost, 1);
  if (code == static_cast<u8>(Outcome::unroutable)) atomic_add(&counts.num_unroutable, 1);
}

FA2A_DEVICE void note_outcomes(DeviceRank& r, const OutcomeCounts& counts) {
  add_to(r.stats.num_lost, counts.num_lost);
  add_to(r.stats.num_unroutable, counts.num_unroutable);
}

}  // namespace device
}  // namespace fa2a
