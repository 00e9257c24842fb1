// Where every byte of a window stands: one cursor both sizes and places, on host and device alike.
#pragma once

#include "protocol/compiler.hpp"
#include "protocol/rank_set.hpp"
#include "protocol/signal.hpp"

namespace fa2a {

constexpr u64 kLine = 64;  // a word that is polled has a cache line of its own
constexpr u64 kPage = 4096;
constexpr u32 kNumParities = 2;  // rounds r and r+1 may be open together
constexpr u32 kNumHalves = 2;    // of a stream's slots: one is filled while the other is read
constexpr u64 kPartitionMagic = 0x6661326170617274ull;

// What the sizes follow from. Every rank of a group has the same shape; its hash is compared at construction.
struct Shape {
  i32 num_ranks = 0;
  i32 num_experts = 0;
  i32 num_topk = 0;
  i32 num_max_tokens = 0;     // per rank and round
  i32 num_chunk_tokens = 0;   // rounds of more tokens travel as a stream of chunks of so many
  i32 max_local_experts = 0;  // the largest number of experts on one rank
  i32 dispatch_bytes = 0;     // of a row on its way out, scales included
  i32 hidden_bytes = 0;       // of a row on its way back
  i32 num_spare_partitions = 1;
  i32 reduce_at_expert = 0;  // 0: one combine row per (token, choice); 1: one per (token, rank)
  i32 collective_bytes = 0;  // the most that a rank may contribute to a small collective
};

// One choice of a row that travels: which of the receiver's experts, and which of the token's k it is.
struct RowChoice {
  i32 local_expert;
  i32 choice;
  float weight;
};

// Stands before the choices of a row; the stride of the whole comes from the layout.
struct RowHeader {
  i32 src_token;
  i32 num_choices;
};

struct PartitionHeader {
  u64 magic;
  u64 shape_hash;
  u64 incarnation;  // of the one writer that this partition belongs to
  i32 owner;
  i32 writer;
};

class Cursor {
 public:
  FA2A_HD constexpr u64 take(u64 num_bytes, u64 alignment) {
    const u64 offset = round_up(at_, alignment);
    at_ = offset + num_bytes;
    return offset;
  }
  FA2A_HD constexpr u64 end() const { return at_; }

 private:
  u64 at_ = 0;
};

// The two directions of a round; each has words and rows of its own.
enum class Verb : u32 { dispatch, combine };
constexpr u32 kNumVerbs = 2;

// One (owner, writer) partition: the only memory that this writer may store into in this owner's window.
struct PartitionLayout {
  u64 header = 0;
  u64 progress = 0;                                      // the writer's progress word
  u64 signal[kNumVerbs][kNumParities][kNumHalves] = {};  // of the writer's chunks
  u64 taken[kNumVerbs][kNumParities] = {};               // by the writer, of the owner's chunks
  u64 collective_word[kNumParities] = {};                // of small collectives
  u64 collective_set[kNumParities] = {};                 // whose contributions the writer has
  u64 collective_bytes[kNumParities] = {};               // the writer's contribution
  u64 claims[kNumParities] = {};                         // rows for each of the owner's experts
  u64 row_headers[kNumParities] = {};
  u64 dispatch_rows[kNumParities] = {};  // dispatch and combine never share bytes
  u64 combine_rows[kNumParities] = {};
  u64 header_stride = 0;
  u64 dispatch_stride = 0;
  u64 combine_stride = 0;
  i32 num_halves = 0;         // 1 when every round fits into one chunk
  i32 num_dispatch_rows = 0;  // of one half
  i32 num_combine_rows = 0;   // of one half
  i32 max_choices = 0;        // of one token on one rank
  u64 num_bytes = 0;
};

FA2A_HD constexpr PartitionLayout partition_layout(const Shape& shape) {
  PartitionLayout at;
  at.num_halves = shape.num_max_tokens > shape.num_chunk_tokens ? static_cast<i32>(kNumHalves) : 1;
  at.max_choices = shape.num_topk < shape.max_local_experts ? shape.num_topk : shape.max_local_experts;
  at.num_dispatch_rows = shape.num_chunk_tokens;
  at.num_combine_rows = shape.reduce_at_expert ? shape.num_chunk_tokens : shape.num_chunk_tokens * at.max_choices;
  at.header_stride = round_up(sizeof(RowHeader) + sizeof(RowChoice) * static_cast<u64>(at.max_choices), 16);
  at.dispatch_stride = round_up(static_cast<u64>(shape.dispatch_bytes), kLine);
  at.combine_stride = round_up(static_cast<u64>(shape.hidden_bytes), kLine);

  Cursor cursor;
  at.header = cursor.take(sizeof(PartitionHeader), kLine);
  at.progress = cursor.take(sizeof(u64), kLine);
  for (u32 verb = 0; verb < kNumVerbs; ++verb) {
    for (u32 p = 0; p < kNumParities; ++p) {
      for (u32 half = 0; half < kNumHalves; ++half) at.signal[verb][p][half] = cursor.take(sizeof(u64), kLine);
      at.taken[verb][p] = cursor.take(sizeof(u64), kLine);
    }
  }
  const u64 dispatch_slots = static_cast<u64>(at.num_dispatch_rows) * static_cast<u64>(at.num_halves);
  const u64 combine_slots = static_cast<u64>(at.num_combine_rows) * static_cast<u64>(at.num_halves);
  for (u32 p = 0; p < kNumParities; ++p) {
    at.collective_word[p] = cursor.take(sizeof(u64), kLine);
    at.collective_set[p] = cursor.take(sizeof(RankSet), kLine);
    at.collective_bytes[p] = cursor.take(static_cast<u64>(shape.collective_bytes), kLine);
  }
  for (u32 p = 0; p < kNumParities; ++p)
    at.claims[p] = cursor.take(sizeof(i32) * static_cast<u64>(shape.max_local_experts), kLine);
  for (u32 p = 0; p < kNumParities; ++p) at.row_headers[p] = cursor.take(at.header_stride * dispatch_slots, kLine);
  for (u32 p = 0; p < kNumParities; ++p) at.dispatch_rows[p] = cursor.take(at.dispatch_stride * dispatch_slots, kLine);
  for (u32 p = 0; p < kNumParities; ++p) at.combine_rows[p] = cursor.take(at.combine_stride * combine_slots, kLine);
  at.num_bytes = round_up(cursor.end(), kPage);
  return at;
}

FA2A_HD constexpr i32 num_partitions(const Shape& shape) { return shape.num_ranks + shape.num_spare_partitions; }

// All that one rank exports, its control page left out (see control_page.hpp).
FA2A_HD constexpr u64 window_bytes(const Shape& shape) {
  return partition_layout(shape).num_bytes * static_cast<u64>(num_partitions(shape));
}

// Two ranks built for different shapes must not exchange a byte: FNV-1a over every field.
FA2A_HD constexpr u64 shape_hash(const Shape& shape) {
  const i32 fields[] = {shape.num_ranks,        shape.num_experts,      shape.num_topk,
                        shape.num_max_tokens,   shape.num_chunk_tokens, shape.max_local_experts,
                        shape.dispatch_bytes,   shape.hidden_bytes,     shape.num_spare_partitions,
                        shape.reduce_at_expert, shape.collective_bytes};
  u64 hash = 14695981039346656037ull;
  for (i32 field : fields) hash = (hash ^ static_cast<u64>(static_cast<u32>(field))) * 1099511628211ull;
  return hash;
}

}  // namespace fa2a
