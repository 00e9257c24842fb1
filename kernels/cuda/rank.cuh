// What the kernels of one rank work on, all of it in device memory: the rank's shape and addresses, and the rounds that
// are open. A launch names a rank and the caller's tensors, nothing that changes from round to round.
#pragma once

#include "kernels/cuda/arguments.hpp"
#include "kernels/cuda/device.cuh"
#include "kernels/verbs.hpp"
#include "protocol/control_page.hpp"
#include "protocol/stall.hpp"

namespace fa2a {
namespace device {

// How far a round has come, kernel by kernel.
enum class Step : u64 { closed, routed, sent, collected, received, answered, gathered };

// My chunks to one peer.
struct StreamOut {
  i32 num_chunks;  // 0: this peer gets nothing in this round
  i32 next_chunk;
  i32 num_moving;  // chunks from the next one on that the kernel after this one stores
  u32 is_open;     // something is still to be sent
};

// One peer's chunks to me.
enum class Flow : u32 { silent, flowing, whole, out };  // out: declined, refused or given up
struct StreamIn {
  Flow flow;
  i32 next_chunk;
  i32 num_rows;           // that have come: dispatch rows, or combine rows
  i32 num_choices;        // dispatch: of these rows
  u32 is_moving;          // dispatch: the kernel after this one copies the next chunk
  i32 moving_rows;        // of that chunk, and their choices
  i32 moving_choices;     //
  i32 num_summed;         // combine: rows of tokens that are summed
  i32 num_told;           // combine: chunks that were given back
  u64 words[kNumHalves];  // the signals of the chunks that stand in the window
};

// What a waiting thread has last seen of a peer's progress.
struct SeenProgress {
  StallWatch watch;
  i64 looked_ns;  // when it was last looked at
  i64 began_ns;   // the wait
};

struct DeviceRound {
  u64 step;  // a Step; waits of the other lane read it
  u64 round;
  u64 epoch;
  RankSet active;    // a copy: the round keeps the members that it began with
  RankSet trusted;   // of these, those whose partition belongs to the incarnation in the view
  RankSet opened;    // peers that get rows of this dispatch, decided once for all blocks
  RankSet taken;     // sources whose rows stand in recv.x
  RankSet shunned;   // owners that some block of the answer found suspected: they get `declined`
  RankSet answered;  // holders whose answer counts
  u16 partitions[kMaxRanks];
  i32 num_tokens;
  i32 num_received;
  u32 num_lost;
  u32 num_arrived;  // blocks of the running kernel that have done their part
  // As the owner of tokens.
  i32* expert;        // [num_tokens, num_topk], -1 none
  i32* dst_rank;      // [num_tokens, num_topk], -1 none
  i32* dispatch_row;  // [num_tokens, num_topk]: which row of dst_rank carries the token
  i32* combine_row;   // [num_tokens, num_topk]: which combine row of dst_rank answers the choice
  float* weights;     // [num_tokens, num_topk]
  i32* rows_to;       // [num_ranks]
  i32* answers_from;  // [num_ranks]: combine rows expected
  i32* claims_to;     // [num_ranks, max_local_experts]
  // As the holder of experts.
  u8* headers;            // [num_ranks, rows, header_stride]: copied out first, checked in the copy
  u32* rows_of_expert;    // [num_ranks, max_local_experts, row_words]: one bit a row
  i32* claims;            // [num_ranks, max_local_experts]
  i32* first;             // [num_ranks, max_local_experts]: row of recv.x of its first row
  i32* moved_by;          // [num_ranks, max_local_experts]: how far rows move when gaps are closed
  i32* first_choice;      // [num_ranks, num_max_tokens]: choices of the rows before
  i32* num_rows_from;     // [num_ranks]
  i32* num_choices_from;  // [num_ranks]
  u32* is_bad;            // [num_ranks]
  Received* received;     // [num_ranks, num_max_tokens * max_choices]
  u64* words;             // [num_ranks]: the signals that were taken
  // Of streams alone.
  const u8* x;         // the caller's, until the last chunk is out
  const u8* scales;    // as x, of rows that come quantised
  const u8* y;         // the caller's, until the last chunk is back
  i32* row_tokens;     // [num_ranks, num_max_tokens]: the token of each dispatch row
  i32* next;           // [num_ranks, max_local_experts]: row of recv.x of its next row
  StreamOut* out;      // [num_ranks]
  StreamIn* in;        // [num_ranks]
  SeenProgress* seen;  // [num_ranks]
  u32 is_placed;       // every row of the dispatch has its place
  u32 has_gaps;        // a source failed that had places
  i32 next_token;      // tokens before it are summed
  i32 end_token;       // those before this one are summed next
};

// What a call leaves for the calls that follow it, and for the host: the handle's device memory.
struct DeviceHandle {
  u64 round;
  Status status;  // whether the round began, and if not why
  Status ended;   // how the newest half of it ended: `ok`, or why the host released it
  i32 token;      // with bad_expert and repeated_expert: where
  i32 choice;
  i64 value;
};

struct DeviceRank {
  Shape shape;
  PartitionLayout at;
  i32 rank;
  DType dtype;
  bool packed, renormalize, weights_at_expert;
  WireFormat format;
  i32 num_local_experts;
  i64 tick_ns;
  RankState* state;
  ControlPage* page;
  void* host;               // the twin's wire; nothing on a GPU
  const i32* expert_rank;   // [num_experts]
  const i32* expert_local;  // [num_experts]
  u8* const* inbound;       // by partition
  u8* const* outbound;      // by owner
  SourceStats* sources;     // [num_ranks]
  Stats stats;
  u64 next_round;       // only a round that opened moves it on: rounds are caught up, never jumped
  u64 next_collective;  // small collectives run on the host, and are numbered there
  u64 progress_tick;
  u64 last_tick_ns;
  u64 looking;  // rank + 1 of the one whose waiting thread may show the watcher its word
  DeviceRound rounds[kNumParities];

  FA2A_HD i32 capacity() const { return shape.num_ranks * shape.num_max_tokens; }
  FA2A_HD i32 hidden() const { return shape.hidden_bytes / (dtype == DType::float32 ? 4 : 2); }
  FA2A_HD bool is_streaming() const { return at.num_halves > 1; }
  FA2A_HD i32 row_words() const { return (at.num_dispatch_rows + 31) / 32; }
  // By source: as many rows as one may send, in however many chunks.
  FA2A_HD i32 received_stride() const { return shape.num_max_tokens * at.max_choices; }
};

// Another compiler made the host's half. What both read must lie where both look.
#if defined(FA2A_RANK_BYTES)
static_assert(sizeof(DeviceRank) == FA2A_RANK_BYTES, "the host lays a rank out otherwise");
#endif

// One cursor both sizes and places the arrays of a rank; with `memory` nullptr it only sizes them.
struct Places {
  u8* memory;
  Cursor cursor;

  template <class T>
  FA2A_HD void take(T*& array, i64 count) {
    const u64 offset = cursor.take(sizeof(T) * static_cast<u64>(count), 16);
    if (memory != nullptr) array = reinterpret_cast<T*>(memory + offset);
  }
};

FA2A_HD void place_round(const DeviceRank& r, DeviceRound& round, Places& places) {
  const i64 n = r.shape.num_ranks, rows = r.at.num_dispatch_rows;
  const i64 choices = static_cast<i64>(r.shape.num_max_tokens) * r.shape.num_topk;
  const i64 cells = n * r.shape.max_local_experts;
  places.take(round.expert, choices);
  places.take(round.dst_rank, choices);
  places.take(round.dispatch_row, choices);
  places.take(round.combine_row, choices);
  places.take(round.weights, choices);
  places.take(round.rows_to, n);
  places.take(round.answers_from, n);
  places.take(round.claims_to, cells);
  places.take(round.headers, n * rows * static_cast<i64>(r.at.header_stride));
  places.take(round.rows_of_expert, cells * r.row_words());
  places.take(round.claims, cells);
  places.take(round.first, cells);
  places.take(round.moved_by, cells);
  places.take(round.first_choice, n * r.shape.num_max_tokens);
  places.take(round.num_rows_from, n);
  places.take(round.num_choices_from, n);
  places.take(round.is_bad, n);
  places.take(round.received, n * r.received_stride());
  places.take(round.words, n);
  if (!r.is_streaming()) return;
  places.take(round.row_tokens, n * r.shape.num_max_tokens);
  places.take(round.next, cells);
  places.take(round.out, n);
  places.take(round.in, n);
  places.take(round.seen, n);
}

// The bytes behind DeviceRank that it needs.
FA2A_HD u64 place_rank(DeviceRank& r, u8* memory) {
  Places places{memory, Cursor()};
  places.take(r.sources, r.shape.num_ranks);
  for (DeviceRound& round : r.rounds) place_round(r, round, places);
  return places.cursor.end();
}

FA2A_DEVICE u8* inbound(const DeviceRank& r, const DeviceRound& round, i32 src) {
  return r.inbound[round.partitions[src]];
}
FA2A_DEVICE u64* word_at(u8* partition, u64 offset) { return reinterpret_cast<u64*>(partition + offset); }
FA2A_DEVICE u32 parity_of(const DeviceRound& round) { return static_cast<u32>(round.round % kNumParities); }

// Where row `row` of a stream stands in a window whose halves have `num_rows` rows: chunks take the halves in turn.
FA2A_DEVICE i32 slot_of(i32 row, i32 num_rows) {
  const i32 chunk = row / num_rows;
  return chunk % static_cast<i32>(kNumHalves) * num_rows + row - chunk * num_rows;
}

// The word of `src` about this round, which it stores into my window.
FA2A_DEVICE u64 load_signal(const DeviceRank& r, const DeviceRound& round, Verb verb, i32 src) {
  return load_acquire(word_at(inbound(r, round, src), r.at.signal[static_cast<u32>(verb)][parity_of(round)][0]));
}

// What it says. A partition that belongs to another incarnation than the view names is never read.
FA2A_DEVICE Reading read_word(const DeviceRank& r, const DeviceRound& round, Verb verb, i32 src) {
  if (!round.trusted.has(src)) return Reading::declined;
  return read_signal(load_signal(r, round, verb, src), round.round, round.epoch);
}

FA2A_DEVICE u64 control_word(const DeviceRound& round, u64 count, bool last, bool declined) {
  Signal s;
  s.round = round.round;
  s.epoch = round.epoch;
  s.count = count;
  s.last = last;
  s.declined = declined;
  return pack(s);
}

FA2A_DEVICE void remember_sent(DeviceRank& r, const DeviceRound& round, WordKind kind, i32 peer, u64 value) {
  store_release(&r.page->sent[peer].words[static_cast<u32>(kind)][parity_of(round)], value);
}

// Tells `dst`: `count` rows stand in its window, or nothing is coming.
FA2A_DEVICE void signal(DeviceRank& r, const DeviceRound& round, Verb verb, i32 dst, u64 count, bool declined) {
  const u64 value = control_word(round, count, /*last=*/true, declined);
  const u64 offset = r.at.signal[static_cast<u32>(verb)][parity_of(round)][0];
  put_signal(r.host, dst, word_at(r.outbound[dst], offset), value, verb == Verb::combine);
  remember_sent(r, round, signal_kind(verb), dst, value);
}

// Tells `src` that I read no more of what it sends in this round.
FA2A_DEVICE void refuse(DeviceRank& r, const DeviceRound& round, Verb verb, i32 src) {
  const u64 value = control_word(round, 0, /*last=*/true, /*declined=*/true);
  put_taken(r.host, src, word_at(r.outbound[src], r.at.taken[static_cast<u32>(verb)][parity_of(round)]), value);
  remember_sent(r, round, taken_kind(verb), src, value);
}

// The round that a handle names, if it stands at this step; a replayed or repeated call finds nothing.
FA2A_DEVICE DeviceRound* round_at(DeviceRank& r, const DeviceHandle& handle, Step step) {
  DeviceRound& round = r.rounds[handle.round % kNumParities];
  const bool stands =
      handle.status == Status::ok && round.round == handle.round && round.step == static_cast<u64>(step);
  return stands ? &round : nullptr;
}

FA2A_DEVICE void set_step(DeviceRound& round, Step step) { store_release(&round.step, static_cast<u64>(step)); }

FA2A_DEVICE void add_rank(RankSet& set, i32 rank) { fetch_or(&set.words[rank / 64], 1ull << (rank % 64)); }

}  // namespace device
}  // namespace fa2a
