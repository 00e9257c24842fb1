// Rows on their way back to their owners, one by one: as an expert wrote it, or the sum of a token's rows here. By a
// block.
#pragma once

#include "kernels/cuda/rows.cuh"

namespace fa2a {
namespace device {

FA2A_DEVICE u8* answer_slot(const DeviceRank& r, const DeviceRound& round, i32 owner, i32 slot) {
  return r.outbound[owner] + r.at.combine_rows[parity_of(round)] + r.at.combine_stride * static_cast<u64>(slot);
}

FA2A_DEVICE i32 num_answers_to(const DeviceRank& r, const DeviceRound& round, i32 owner) {
  return r.shape.reduce_at_expert ? round.num_rows_from[owner] : round.num_choices_from[owner];
}

// A round that was never received, or whose experts failed: nobody is answered with rows, and everybody is told. By the
// block.
FA2A_DEVICE void give_up(DeviceRank& r, DeviceRound& round, bool was_received) {
  if (thread_idx() == 0) round.taken = RankSet();
  for (i32 peer = thread_idx(); peer < r.shape.num_ranks && !was_received; peer += num_threads())
    if (round.active.has(peer)) refuse(r, round, Verb::dispatch, peer);
  sync_block();
}

FA2A_DEVICE const u8* expert_row(const DeviceRank& r, const u8* y, const Received& row) {
  return y + static_cast<u64>(r.shape.hidden_bytes) * static_cast<u64>(row.position);
}

// Choice `i` of those that came from `owner`, as the expert wrote it.
FA2A_DEVICE void return_choice(DeviceRank& r, const DeviceRound& round, const u8* y, i32 owner, i32 i, i32 slot) {
  const Received* received = round.received + static_cast<i64>(owner) * r.received_stride();
  u8* place[1] = {answer_slot(r, round, owner, slot)};
  put_row(place, 1, expert_row(r, y, received[i]), static_cast<u64>(r.shape.hidden_bytes));
  if (thread_idx() == 0) point(r.host, Point::combine_send_rows, round.round);
}

// This rank's choices of the token in row `row` of `owner`, weighted and summed here.
FA2A_DEVICE void return_sum(DeviceRank& r, const DeviceRound& round, const u8* y, i32 owner, i32 row, i32 slot,
                            RowList& list) {
  const i32* first_choice = round.first_choice + static_cast<i64>(owner) * r.shape.num_max_tokens;
  const i32 first = first_choice[row];
  const i32 end = row + 1 < round.num_rows_from[owner] ? first_choice[row + 1] : round.num_choices_from[owner];
  const Received* received = round.received + static_cast<i64>(owner) * r.received_stride() + first;
  if (thread_idx() < end - first) {
    list.rows[thread_idx()] = expert_row(r, y, received[thread_idx()]);
    list.weights[thread_idx()] = r.weights_at_expert ? 1.0f : received[thread_idx()].weight;
  }
  if (thread_idx() == 0) {
    list.count = end - first;
    list.factor = 1.0f;
    list.is_zero = 0;
  }
  sync_block();
  sum_rows<StoreToPeer>(r, answer_slot(r, round, owner, slot), list);
  if (thread_idx() == 0) point(r.host, Point::combine_send_rows, round.round);
  sync_block();  // the list is made anew
}

}  // namespace device
}  // namespace fa2a
