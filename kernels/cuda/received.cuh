// Rows where experts find them: a copy of one, and what is left to do when a source that had places is not taken.
#pragma once

#include "kernels/cuda/headers.cuh"
#include "kernels/cuda/rows.cuh"

namespace fa2a {
namespace device {

FA2A_DEVICE void copy_out(const DeviceRank& r, const ReceivedTensors& out, const u8* row, const Received& to) {
  const auto position = static_cast<u64>(to.position);
  copy_row(out.recv_x + r.format.payload_bytes * position, row, r.format.payload_bytes, lane(), kWarpLanes);
  if (out.recv_scales != nullptr)
    copy_row(out.recv_scales + r.format.scale_bytes * position, row + r.format.scales_at, r.format.scale_bytes, lane(),
             kWarpLanes);
  if (out.recv_weights != nullptr && lane() == 0) out.recv_weights[position] = to.weight;
}

// Copies `count` choices of a source out of the window, those behind the first `before`, by all blocks, a warp a
// choice.
template <bool kStreamed>
FA2A_DEVICE void copy_choices(DeviceRank& r, const DeviceRound& round, const ReceivedTensors& out, i32 src, i32 before,
                              i32 count) {
  const u8* rows = inbound(r, round, src) + r.at.dispatch_rows[parity_of(round)];
  const Received* received = round.received + static_cast<i64>(src) * r.received_stride() + before;
  for (i32 i = block_idx() * num_warps() + warp(); i < count; i += num_blocks() * num_warps()) {
    if (lane() == 0 && 4 * (i + 1) >= count) point(r.host, Point::dispatch_copy, round.round);
    const i32 row = received[i].src_row;
    const auto slot = static_cast<u64>(kStreamed ? slot_of(row, r.at.num_dispatch_rows) : row);
    copy_out(r, out, rows + r.at.dispatch_stride * slot, received[i]);
  }
}

// Rows of the sources that are left move up, one behind the other, and never over one that still has to move.
FA2A_DEVICE void move_rows(const DeviceRank& r, const ReceivedTensors& out, i32 to, i32 from, i32 num_rows) {
  for (i32 row = 0; row < num_rows; ++row) {
    const auto at = static_cast<u64>(from + row), place = static_cast<u64>(to + row);
    copy_row(out.recv_x + r.format.payload_bytes * place, out.recv_x + r.format.payload_bytes * at,
             r.format.payload_bytes, thread_idx(), num_threads());
    if (out.recv_scales != nullptr)
      copy_row(out.recv_scales + r.format.scale_bytes * place, out.recv_scales + r.format.scale_bytes * at,
               r.format.scale_bytes, thread_idx(), num_threads());
    if (out.recv_weights != nullptr && thread_idx() == 0) out.recv_weights[place] = out.recv_weights[at];
    sync_block();
  }
}

FA2A_DEVICE void close_gaps(const DeviceRank& r, DeviceRound& round, const ReceivedTensors& out) {
  i32 packed_end = 0;
  for (i32 expert = 0; expert < r.num_local_experts; ++expert) {
    i32 position = r.packed ? packed_end : expert * r.capacity();
    for (i32 src = 0; src < r.shape.num_ranks; ++src) {
      if (!round.taken.has(src)) continue;
      const i64 cell = cell_of(r, src, expert);
      const i32 moved_by = round.first[cell] - position, num_rows = round.claims[cell];
      if (moved_by != 0) move_rows(r, out, position, round.first[cell], num_rows);
      if (thread_idx() == 0) round.moved_by[cell] = moved_by;
      position += num_rows;
      packed_end += num_rows;
    }
  }
  sync_block();
  for (i32 src = 0; src < r.shape.num_ranks; ++src) {
    Received* received = round.received + static_cast<i64>(src) * r.received_stride();
    for (i32 i = thread_idx(); round.taken.has(src) && i < round.num_choices_from[src]; i += num_threads())
      received[i].position -= round.moved_by[cell_of(r, src, received[i].local_expert)];
  }
  sync_block();
}

// Counts of what is there, published after every row is.
FA2A_DEVICE void publish_counts(const DeviceRank& r, DeviceRound& round, const ReceivedTensors& out) {
  for (i32 expert = thread_idx(); expert < r.num_local_experts; expert += num_threads()) {
    i32 rows = 0;
    for (i32 src = 0; src < r.shape.num_ranks; ++src)
      if (round.taken.has(src)) rows += round.claims[cell_of(r, src, expert)];
    out.num_tokens_per_expert[expert] = rows;
  }
  sync_block();
  if (thread_idx() != 0) return;
  out.offsets[0] = 0;
  for (i32 expert = 0; expert < r.num_local_experts; ++expert)
    out.offsets[expert + 1] = out.offsets[expert] + out.num_tokens_per_expert[expert];
  round.num_received = out.offsets[r.num_local_experts];
}

}  // namespace device
}  // namespace fa2a
