// What a source says of its rows, checked by one block before anything is copied: counts, claims, experts. All or
// nothing for each source; a peer's number never bounds a loop, and its index never addresses memory.
#pragma once

#include "kernels/cuda/rank.cuh"

namespace fa2a {
namespace device {

FA2A_DEVICE i64 cell_of(const DeviceRank& r, i32 src, i32 expert) {
  return static_cast<i64>(src) * r.shape.max_local_experts + expert;
}
FA2A_DEVICE u32* rows_of(const DeviceRank& r, const DeviceRound& round, i32 src, i32 expert) {
  return round.rows_of_expert + cell_of(r, src, expert) * r.row_words();
}
FA2A_DEVICE const u8* header_at(const DeviceRank& r, const DeviceRound& round, i32 src, i32 row) {
  return round.headers + (static_cast<u64>(src) * static_cast<u64>(r.at.num_dispatch_rows) + static_cast<u64>(row)) *
                             r.at.header_stride;
}
FA2A_DEVICE const RowChoice* choices_at(const u8* header) {
  return reinterpret_cast<const RowChoice*>(header + sizeof(RowHeader));
}
FA2A_DEVICE i32 num_choices_at(const u8* header) { return reinterpret_cast<const RowHeader*>(header)->num_choices; }

FA2A_DEVICE void call_bad(const DeviceRound& round, i32 src) { atomic_or(&round.is_bad[src], 1); }

// Copies the claims of a source out of the window and adds them up, by one warp. They are checked in the copy: a peer
// that lies could change the original after the check.
FA2A_DEVICE void take_claims(const DeviceRank& r, DeviceRound& round, i32 src) {
  const auto* claims = reinterpret_cast<const i32*>(inbound(r, round, src) + r.at.claims[parity_of(round)]);
  i32 total = 0, num_wrong = 0;
  for (i32 expert = lane(); expert < r.num_local_experts; expert += kWarpLanes) {
    const i32 claim = claims[expert];
    round.claims[cell_of(r, src, expert)] = claim;
    const bool fits = claim >= 0 && claim <= r.shape.num_max_tokens;
    num_wrong += fits ? 0 : 1;
    total += fits ? claim : 0;
  }
  total = shuffle(warp_prefix(total), kWarpLanes - 1);
  num_wrong = shuffle(warp_prefix(num_wrong), kWarpLanes - 1);
  const i64 most = static_cast<i64>(r.shape.num_max_tokens) * r.at.max_choices;
  if ((num_wrong > 0 || total > most) && guarded(guard_clamp_count) && lane() == 0) call_bad(round, src);
}

// How many rows a source's word speaks of; none if that is more than there are slots.
FA2A_DEVICE i32 bounded_count(const DeviceRank& r, const DeviceRound& round, i32 src) {
  const u64 count = signal_field::Count::unpack(round.words[src]);
  const bool fits = count <= static_cast<u64>(r.at.num_dispatch_rows);
  if (fits || planted(Plant::count_unclamped) || !guarded(guard_clamp_count)) return static_cast<i32>(count);
  call_bad(round, src);
  return 0;
}

// `slot`: where the row stands in the window.
FA2A_DEVICE void copy_header(const DeviceRank& r, const DeviceRound& round, i32 src, i32 row, i32 slot) {
  const u8* from =
      inbound(r, round, src) + r.at.row_headers[parity_of(round)] + r.at.header_stride * static_cast<u64>(slot);
  u8* to = const_cast<u8*>(header_at(r, round, src, row));
  for (u64 at = 0; at < r.at.header_stride; at += sizeof(Vector16))
    *reinterpret_cast<Vector16*>(to + at) = *reinterpret_cast<const Vector16*>(from + at);
}

// One row's header, by one thread: each of its choices sets the row's bit with its expert. A bit that is set already is
// the same expert twice.
FA2A_DEVICE bool note_row(const DeviceRank& r, const DeviceRound& round, i32 src, i32 row) {
  const u8* header = header_at(r, round, src, row);
  const i32 num_choices = num_choices_at(header);
  if ((num_choices < 1 || num_choices > r.at.max_choices) && guarded(guard_check_index)) return false;
  const RowChoice* choices = choices_at(header);
  for (i32 i = 0; i < num_choices; ++i) {
    const RowChoice choice = choices[i];
    const bool in_range = choice.local_expert >= 0 && choice.local_expert < r.num_local_experts && choice.choice >= 0 &&
                          choice.choice < r.shape.num_topk;
    if (!in_range && guarded(guard_check_index)) return false;
    const u32 bit = 1u << (row % 32);
    const u32 before = atomic_or(rows_of(r, round, src, choice.local_expert) + row / 32, bit);
    if ((before & bit) != 0 && guarded(guard_check_index)) return false;
  }
  return true;
}

FA2A_DEVICE i32 rows_before(const u32* rows, i32 row) {
  i32 count = 0;
  for (i32 i = 0; i < row / 32; ++i) count += count_bits(rows[i]);
  return count + count_bits(rows[row / 32] & ((1u << (row % 32)) - 1u));
}

FA2A_DEVICE i32 count_rows(const DeviceRank& r, const u32* rows) {
  i32 count = 0;
  for (i32 i = 0; i < r.row_words(); ++i) count += count_bits(rows[i]);
  return count;
}

// Where each row's choices begin among those of its source, and whether the source sent what it had claimed; one warp.
FA2A_DEVICE void count_choices(const DeviceRank& r, DeviceRound& round, i32 src) {
  const i32 num_rows = round.num_rows_from[src];
  i32 total = 0;
  for (i32 base = 0; base < num_rows; base += kWarpLanes) {
    const i32 row = base + lane();
    const i32 mine = row < num_rows ? num_choices_at(header_at(r, round, src, row)) : 0;
    const i32 prefix = warp_prefix(mine);
    if (row < num_rows)
      round.first_choice[static_cast<i64>(src) * r.shape.num_max_tokens + row] = total + prefix - mine;
    total += shuffle(prefix, kWarpLanes - 1);
  }
  if (lane() == 0) round.num_choices_from[src] = total;
  bool met = true;
  for (i32 expert = lane(); expert < r.num_local_experts; expert += kWarpLanes) {
    met &= count_rows(r, rows_of(r, round, src, expert)) == round.claims[cell_of(r, src, expert)];
  }
  if (!met && guarded(guard_claims_met)) call_bad(round, src);
}

// Experts in order, within one by source rank, within that by the source's tokens. By the block; `totals` has room for
// an entry an expert and one more, in device memory.
FA2A_DEVICE void assign_places(const DeviceRank& r, DeviceRound& round, i32* offsets) {
  const i32 n = r.shape.num_ranks, num_experts = r.num_local_experts;
  for (i32 expert = thread_idx(); expert < num_experts; expert += num_threads()) {
    i32 rows = 0;
    for (i32 src = 0; src < n; ++src) {
      round.first[cell_of(r, src, expert)] = rows;
      if (round.taken.has(src)) rows += round.claims[cell_of(r, src, expert)];
    }
    offsets[expert + 1] = rows;
  }
  sync_block();
  if (thread_idx() == 0) {
    offsets[0] = 0;
    for (i32 expert = 0; expert < num_experts; ++expert) offsets[expert + 1] += offsets[expert];
  }
  sync_block();
  for (i32 cell = thread_idx(); cell < n * num_experts; cell += num_threads()) {
    const i32 src = cell / num_experts, expert = cell % num_experts;
    round.first[cell_of(r, src, expert)] += r.packed ? offsets[expert] : expert * r.capacity();
  }
  sync_block();
}

// What is remembered of each choice of one row, by one thread. Of a stream, `before` rows came in the chunks before
// this one, and have filled the places before `next`.
template <bool kStreamed>
FA2A_DEVICE void place_row(const DeviceRank& r, DeviceRound& round, i32 src, i32 row, i32 before) {
  const u8* header = header_at(r, round, src, row);
  const i32 token = reinterpret_cast<const RowHeader*>(header)->src_token;
  const i64 from = static_cast<i64>(src) * r.shape.num_max_tokens + before + row;
  Received* received = round.received + static_cast<i64>(src) * r.received_stride() + round.first_choice[from];
  for (i32 i = 0; i < num_choices_at(header); ++i) {
    const RowChoice choice = choices_at(header)[i];
    const i32 position = (kStreamed ? round.next : round.first)[cell_of(r, src, choice.local_expert)] +
                         rows_before(rows_of(r, round, src, choice.local_expert), row);
    received[i] = {position, choice.local_expert, src, token, choice.choice, choice.weight, before + row};
  }
}

}  // namespace device
}  // namespace fa2a
