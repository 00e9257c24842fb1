// What the CPU kernels of one rank work on: its shape, its words, its way to the peers, and the rounds that are open.
#pragma once

#include <vector>

#include "protocol/layout.hpp"
#include "protocol/rank_state.hpp"
#include "protocol/round.hpp"
#include "transport/fabric.hpp"
#include "transport/wire.hpp"

namespace fa2a {

enum class DType : u32 { bfloat16, float32, float16 };
enum class Outcome : u8 { none = 0, delivered = 1, lost = 2, unroutable = 3 };

// Why a call did nothing. Everything but `ok` leaves the rank as it was.
enum class Status : u32 { ok, bad_expert, repeated_expert, third_round, bad_handle, evicted, closed, quorum_lost };

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

// What a rank remembers of a round between its dispatch and its combine. `view` is a copy: the round keeps the members
// it began with whatever is installed meanwhile.
struct OpenRound {
  bool open = false;
  u64 round = 0;
  u64 epoch = 0;
  RankSet active;
  std::vector<u16> partitions;
  RankSet trusted;  // members whose partition belongs to the incarnation in the view
  // As the owner of tokens.
  i32 num_tokens = 0;
  std::vector<i32> topk_idx;  // [num_tokens * num_topk]
  std::vector<float> topk_weights;
  std::vector<i32> dst_rank;      // per choice; -1 none
  std::vector<i32> combine_row;   // per choice: which combine row of dst_rank answers it
  std::vector<i32> rows_to;       // per rank
  std::vector<i32> answers_from;  // per rank: combine rows expected
  // As the holder of experts.
  RankSet taken;                   // sources whose rows stand in recv.x
  std::vector<Received> received;  // grouped by source, in the order of its rows
  std::vector<i32> received_from;  // per rank + 1: first entry of `received`
};

struct Stats {
  u64 num_rounds = 0;
  u64 num_rejected = 0;  // sources whose counts or indices were refused
  u64 num_rechecks = 0;  // sources withdrawn because their word changed while they were copied
};

struct Context {
  Shape shape;
  PartitionLayout at;
  i32 rank = 0;
  DType dtype = DType::bfloat16;
  bool packed = false;
  bool renormalize = false;
  std::vector<i32> expert_rank;   // per expert
  std::vector<i32> expert_local;  // per expert
  i32 num_local_experts = 0;
  i64 tick_ns = 50 * 1000000;  // how often a waiting rank shows that it lives

  RankState* state = nullptr;
  Fabric* fabric = nullptr;
  Wire* wire = nullptr;
  OpenRound rounds[kNumParities];
  Stats stats;
  u64 progress_tick = 0;
  u64 next_round = 0;  // only a round that opened moves it on: rounds are caught up, never jumped

  u8* inbound(const OpenRound& round, i32 src) const {
    return fabric->inbound(round.partitions[static_cast<size_t>(src)]);
  }
  static u64* word(u8* partition, u64 offset) { return reinterpret_cast<u64*>(partition + offset); }
  // A partition that belongs to another incarnation than the view names is never read.
  Reading read(const OpenRound& open, i32 src, u64 value) const {
    return open.trusted.has(src) ? read_signal(value, open.round, open.epoch) : Reading::declined;
  }
  i32 capacity() const { return shape.num_ranks * shape.num_max_tokens; }
};

struct DispatchArgs {
  const u8* x;           // [num_tokens, hidden]
  const void* topk_idx;  // [num_tokens, num_topk]
  bool idx_is_64_bit;
  const float* topk_weights;
  i32 num_tokens;
  u8* recv_x;
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
  u8* out;       // [num_tokens, hidden]
  u8* codes;     // [num_tokens, num_topk]
  u8* lost;      // one bool
  bool abandon;  // answer everybody `declined`, give nothing back
};

struct CombineResult {
  Status status = Status::ok;
  i64 num_lost = 0;
};

DispatchResult dispatch(Context& c, const DispatchArgs& args);
CombineResult combine(Context& c, const CombineArgs& args);

// How a released wait is told to the caller.
Status released_status(const RankState& state);

}  // namespace fa2a
