// What a launch names besides its rank and its handle: the kernel, and the caller's tensors. Nothing here changes from
// round to round, so a captured graph may replay it.
#pragma once

#include "kernels/verbs.hpp"

namespace fa2a {
namespace device {

// In the order of a round, and of a round of streams; each is the name of a function in a .cu file.
enum class Kernel : u32 {
  dispatch_route,
  dispatch_send,
  dispatch_collect,
  dispatch_expand,
  combine_answer,
  combine_gather,
  combine_reduce,
  stream_open_rows,
  stream_send_rows,
  stream_collect,
  stream_expand,
  stream_open_answers,
  stream_send_answers,
  stream_gather,
  stream_reduce
};
constexpr u32 kNumKernels = 15;

struct RouteArgs {
  const void* topk_idx;  // [num_tokens, num_topk]
  bool idx_is_64_bit;
  const float* topk_weights;
  i32 num_tokens;
};

struct SendArgs {
  const u8* x;       // [num_tokens, hidden]
  const u8* scales;  // of rows that come quantised; nullptr: x is of the type of `out`
};

struct ReceivedTensors {
  u8* recv_x;
  u8* recv_scales;             // nullptr: rows have none
  float* recv_weights;         // nullptr: weights are applied at the owner
  i32* num_tokens_per_expert;  // [num_local_experts]
  i32* offsets;                // [num_local_experts + 1]
};

struct AnswerArgs {
  const u8* y;   // as recv.x
  bool abandon;  // answer everybody `declined`, give nothing back
};

struct GatherArgs {
  bool abandon;  // answers are waited for and not looked at
};

struct ReduceTensors {
  u8* out;    // [num_tokens, hidden]
  u8* codes;  // [num_tokens, num_topk]
  u8* lost;   // one bool; nullptr: a stream was abandoned, and there is no token
  i32 num_tokens;
  const float* topk_weights;  // in place of those of the dispatch; nullptr: those
};

}  // namespace device
}  // namespace fa2a
