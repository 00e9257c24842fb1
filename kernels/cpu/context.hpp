// What the CPU kernels of one rank work on: its shape, its words, its way to the peers, and the rounds that are open.
#pragma once

#include <vector>

#include "host/copy.hpp"
#include "kernels/verbs.hpp"
#include "protocol/layout.hpp"
#include "protocol/rank_state.hpp"
#include "protocol/round.hpp"
#include "protocol/stall.hpp"
#include "transport/fabric.hpp"
#include "transport/wire.hpp"

namespace fa2a {

// My chunks to one peer. The first ones go out without asking; each later one waits for the peer's `taken`.
struct OutStream {
  bool open = false;  // something is still to be sent
  i32 next_chunk = 0;
  i32 num_chunks = 0;                 // 0: this peer gets nothing in this round
  u64 first_counts[kNumHalves] = {};  // rows of the first chunks, between their storing and their signal
};

// One peer's chunks to me.
struct InStream {
  enum class Stage : u32 { silent, flowing, whole, out };  // out: declined, refused or given up

  Stage stage = Stage::silent;
  i32 next_chunk = 0;
  i32 num_rows = 0;            // that have come: dispatch rows, or combine rows
  i32 num_summed = 0;          // combine: rows of tokens that are summed
  i32 num_told = 0;            // combine: chunks that were given back
  u64 words[kNumHalves] = {};  // combine: the signals of the chunks that stand in the window
  bool unfinished() const { return stage == Stage::silent || stage == Stage::flowing; }
};

// What a rank remembers of a round from its dispatch to its combine. `active` is a copy: the round keeps the members it
// began with whatever is installed meanwhile.
struct OpenRound {
  Stage stage = Stage::closed;
  u64 round = 0;
  u64 epoch = 0;
  RankSet active;
  std::vector<u16> partitions;
  RankSet trusted;  // members whose partition belongs to the incarnation in the view
  std::vector<OutStream> out;
  std::vector<InStream> in;
  // As the owner of tokens.
  const u8* x = nullptr;       // the caller's, until the last chunk is out
  const u8* scales = nullptr;  // as x, of rows that come quantised
  std::vector<u8> quantized;   // rows that are quantised here, as they travel
  bool streamed = false;       // more bytes than caches hold go past them
  i32 num_tokens = 0;
  std::vector<i32> topk_idx;  // [num_tokens * num_topk]
  std::vector<float> topk_weights;
  std::vector<i32> dst_rank;        // per choice; -1 none
  std::vector<i32> combine_row;     // per choice: which combine row of dst_rank answers it
  std::vector<i32> rows_of_expert;  // per expert: how many it gets from me
  std::vector<i32> row_tokens;      // the token of each dispatch row, destination after destination
  std::vector<i32> rows_to;         // per rank + 1: first entry of `row_tokens`
  std::vector<i32> answers_from;    // per rank: combine rows expected
  // As the holder of experts.
  const u8* y = nullptr;           // the caller's, until the last chunk is back
  RankSet taken;                   // sources whose rows stand in recv.x
  std::vector<Received> received;  // grouped by source, in the order of its rows
  std::vector<i32> received_from;  // per rank + 1: first entry of `received`

  i32 num_rows_to(i32 dst) const { return rows_to[static_cast<size_t>(dst) + 1] - rows_to[static_cast<size_t>(dst)]; }
};

// A small collective, from its call to its return; docs/protocol.md, section 11.
struct Collective {
  bool is_open = false;
  u64 number = 0;
  u64 version = 0;  // of the sets that I said
  bool is_contributed = false;
  bool is_frozen = false;
  RankSet has;  // whose contributions I have
  std::vector<u8> bytes;
  std::vector<u16> partitions;  // of the view it began in: nobody joins in the midst of it
};

struct Context {
  Shape shape;
  PartitionLayout at;
  i32 rank = 0;
  DType dtype = DType::bfloat16;
  bool packed = false;
  bool renormalize = false;
  bool weights_at_expert = false;
  WireFormat format;
  std::vector<i32> expert_rank;   // per expert
  std::vector<i32> expert_local;  // per expert
  i32 num_local_experts = 0;
  i64 tick_ns = 50 * 1000000;  // how often a waiting rank shows that it lives

  RankState* state = nullptr;
  Fabric* fabric = nullptr;
  Wire* wire = nullptr;
  OpenRound rounds[kNumParities];
  Collective collective;
  u64 next_collective = 0;
  Stats stats;
  std::vector<StallWatch> stalls;    // per rank
  std::vector<SourceStats> sources;  // per rank
  u64 progress_tick = 0;
  u64 next_round = 0;  // only a round that opened moves it on: rounds are caught up, never jumped
  // Kernels of a GPU run them, which graphs launch and nobody waits for: `rounds` and `next_round` are as of the last
  // time that the host asked.
  bool rounds_on_gpu = false;

  // `started` lies where a kernel stores it and this host loads it at any time; to ask the device is to wait for it.
  u64 rounds_begun() const { return rounds_on_gpu ? load_acquire(&state->started) : next_round; }
  u8* inbound(const OpenRound& round, i32 src) const {
    return fabric->inbound(round.partitions[static_cast<size_t>(src)]);
  }
  static u64* word(u8* partition, u64 offset) { return reinterpret_cast<u64*>(partition + offset); }
  i32 capacity() const { return shape.num_ranks * shape.num_max_tokens; }
  i32 hidden() const { return shape.hidden_bytes / (dtype == DType::float32 ? 4 : 2); }
  // So many bytes, by every rank of the host at once: do they go past the cache?
  bool streams(u64 num_bytes) const { return num_bytes * static_cast<u64>(shape.num_ranks) >= kStreamedBytes; }
};

// Each verb in two halves, which may follow each other at once or with other work in between. The first sends what goes
// without asking; the second sends the rest, if the batch is a stream, and waits.
DispatchResult dispatch_send(Context& c, const DispatchArgs& args);
DispatchResult dispatch_receive(Context& c, const ReceiveArgs& args);
CombineResult combine_send(Context& c, const CombineArgs& args);
CombineResult combine_receive(Context& c, const ReduceArgs& args);
// Ends a round from wherever it stands: every peer is told, and every peer's answer is waited for.
CombineResult abandon(Context& c, u64 round);

}  // namespace fa2a
