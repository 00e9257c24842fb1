// The chunks of a stream that are to be stored now, on their way out and back: by any number of blocks, a block a row.
#pragma once

#include "kernels/cuda/answers.cuh"
#include "kernels/cuda/send_rows.cuh"
#include "kernels/cuda/stream.cuh"

namespace fa2a {
namespace device {

// Where one row of `dst`'s stream goes, and its header. By the first warp, a lane a choice.
FA2A_DEVICE void list_place(const DeviceRank& r, const DeviceRound& round, i32 dst, i32 row, SendShared& shared) {
  const i32 token = round.row_tokens[static_cast<i64>(dst) * r.shape.num_max_tokens + row];
  const i64 first = static_cast<i64>(token) * r.shape.num_topk;
  const bool goes = lane() < r.shape.num_topk && round.dst_rank[first + lane()] == dst;
  const u32 choices = ballot(goes);
  if (goes) {
    u32* words = shared.words + 2 + 3 * count_bits(choices & lanes_below());
    words[0] = static_cast<u32>(r.expert_local[round.expert[first + lane()]]);
    words[1] = static_cast<u32>(lane());
    words[2] = bits_of(round.weights[first + lane()]);
  }
  if (lane() != 0) return;
  const i32 num_words = 2 + 3 * count_bits(choices);
  shared.words[0] = static_cast<u32>(token);
  shared.words[1] = static_cast<u32>(count_bits(choices));
  const i32 whole = (num_words + 3) / 4 * 4;
  for (i32 at = num_words; at < whole; ++at) shared.words[at] = 0;
  const auto slot = static_cast<u64>(slot_of(row, r.at.num_dispatch_rows));
  u8* partition = r.outbound[dst];
  shared.rows[0] = partition + r.at.dispatch_rows[parity_of(round)] + r.at.dispatch_stride * slot;
  shared.headers[0] = partition + r.at.row_headers[parity_of(round)] + r.at.header_stride * slot;
  shared.header_words[0] = 0;
  shared.header_words[1] = whole;
  shared.num_places = 1;
}

// A row is read, and quantised, once for each rank that it goes to: their streams are not at the same chunk.
FA2A_DEVICE void store_dispatch_chunks(DeviceRank& r, const DeviceRound& round, SendShared& shared) {
  const SendArgs args{round.x, round.scales};
  for (i32 step = 1; step <= r.shape.num_ranks; ++step) {
    const i32 dst = (r.rank + step) % r.shape.num_ranks;
    const StreamOut& out = round.out[dst];
    const i32 first = first_moving(r, out, Verb::dispatch);
    const i32 end = out.num_moving == 0 ? first : end_moving(r, out, Verb::dispatch, round.rows_to[dst]);
    for (i32 row = first + block_idx(); row < end; row += num_blocks()) {
      if (warp() == 0) list_place(r, round, dst, row, shared);
      sync_block();
      put_headers(shared);
      put_token(r, args, static_cast<i32>(shared.words[0]), shared);
      if (thread_idx() == 0 && 2 * (row - first + 1) >= end - first)
        point(r.host, Point::dispatch_send_rows, round.round);
      sync_block();  // the list is made anew
    }
  }
}

FA2A_DEVICE void store_answer_chunks(DeviceRank& r, const DeviceRound& round, RowList& list) {
  for (i32 step = 1; step <= r.shape.num_ranks; ++step) {
    const i32 owner = (r.rank + step) % r.shape.num_ranks;
    const StreamOut& out = round.out[owner];
    const i32 first = first_moving(r, out, Verb::combine);
    const i32 end = out.num_moving == 0 ? first : end_moving(r, out, Verb::combine, num_answers_to(r, round, owner));
    for (i32 row = first + block_idx(); row < end; row += num_blocks()) {
      const i32 slot = slot_of(row, r.at.num_combine_rows);
      if (r.shape.reduce_at_expert)
        return_sum(r, round, round.y, owner, row, slot, list);
      else
        return_choice(r, round, round.y, owner, row, slot);
    }
  }
}

}  // namespace device
}  // namespace fa2a
