// What each verb is asked and what it answers, the same for every machine that executes it; device compilers read it
// too.
#pragma once

#include "protocol/layout.hpp"
#include "protocol/memory.hpp"
#include "protocol/rank_state.hpp"

namespace fa2a {

enum class DType : u32 { bfloat16, float32, float16 };
enum class Outcome : u8 { none = 0, delivered = 1, lost = 2, unroutable = 3 };

// Why a call did nothing. Everything but `ok` leaves the rank as it was.
enum class Status : u32 {
  ok,
  bad_expert,
  repeated_expert,
  third_round,
  bad_handle,
  not_received,
  evicted,
  closed,
  quorum_lost,
  open_round,
  other_bytes
};

// How rows look on their way out. Scales, if there are any, stand behind the payload of their row.
struct WireFormat {
  enum class Quantize : u32 { never, float32, ue8m0 };  // what becomes of a row that comes in the type of `out`

  Quantize quantize = Quantize::never;
  u64 payload_bytes = 0;
  u64 scale_bytes = 0;  // 0: rows have no scales
  u64 scales_at = 0;
};

// One row of recv.x: where it stands and whose it is.
struct Received {
  i32 position;  // row of recv.x seen as two-dimensional
  i32 local_expert;
  i32 src_rank;
  i32 src_token;
  i32 choice;
  float weight;
  i32 src_row;  // which row of the source it came in
};

// How far a round has come on this rank.
enum class Stage : u32 { closed, sent, received, answered };

struct Stats {
  u64 num_rounds = 0;
  u64 num_rejected = 0;  // sources whose counts or indices were refused
  u64 num_rechecks = 0;  // sources withdrawn because their word changed while they were copied
  u64 num_lost = 0;      // choices of this rank's tokens, by their outcome; read by other threads at any time
  u64 num_unroutable = 0;
};

// What one peer has cost this rank so far: counters that only grow, read by other threads at any time.
struct SourceStats {
  u64 wait_ns = 0;       // this rank did nothing but wait for it
  u64 late_ns = 0;       // its word was missing while this rank was ready for it; others' may have been too
  u64 max_late_ns = 0;   // the longest such time
  u64 num_rows = 0;      // that came from it: dispatch rows and combine rows
  u64 num_bytes = 0;     // of these
  u64 num_failures = 0;  // dispatches and answers of it that were not taken whole
};

FA2A_HD void add_to(u64& counter, u64 amount) { store_relaxed(&counter, load_relaxed(&counter) + amount); }

struct DispatchArgs {
  const u8* x;           // [num_tokens, hidden]
  const u8* scales;      // of rows that come quantised; nullptr: x is of the type of `out`
  const void* topk_idx;  // [num_tokens, num_topk]
  bool idx_is_64_bit;
  const float* topk_weights;
  i32 num_tokens;
};

struct ReceiveArgs {
  u64 round;
  u8* recv_x;
  u8* recv_scales;             // nullptr: rows have none
  float* recv_weights;         // of each row of recv.x; nullptr: weights are applied at the owner
  i32* num_tokens_per_expert;  // [num_local_experts]
  i32* offsets;                // [num_local_experts + 1]
};

struct DispatchResult {
  Status status = Status::ok;
  u64 round = 0;
  i32 num_received = 0;  // rows of recv.x that are valid
  // With bad_expert and repeated_expert: where.
  i32 token = 0;
  i32 choice = 0;
  i64 value = 0;
};

struct CombineArgs {
  const u8* y;  // as recv.x
  u64 round;
  bool abandon;  // answer everybody `declined`, give nothing back
};

struct ReduceArgs {
  u64 round;
  u8* out;                              // [num_tokens, hidden]
  u8* codes;                            // [num_tokens, num_topk]
  u8* lost;                             // one bool
  const float* topk_weights = nullptr;  // in place of those of the dispatch; only for sums at the owner
};

struct CombineResult {
  Status status = Status::ok;
  i64 num_lost = 0;
};

// How a released wait is told to the caller.
FA2A_HD Status released_status(const RankState& state) {
  const u64 why = load_acquire(&state.release);
  if ((why & release_evicted) != 0) return Status::evicted;
  if ((why & release_closing) != 0) return Status::closed;
  if ((why & release_quorum_lost) != 0) return Status::quorum_lost;
  return Status::ok;
}

}  // namespace fa2a
