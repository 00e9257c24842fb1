// Small collectives on the CPU: a few bytes of every rank to every rank, and the same ones on all who go on.
#pragma once

#include "kernels/cpu/context.hpp"

namespace fa2a {

struct CollectiveArgs {
  const u8* mine;   // [num_bytes]
  u64 num_bytes;    // the same on every rank, 1 to shape.collective_bytes
  u8* gathered;     // [num_ranks, num_bytes]: zeros where there is no contribution
  u8* contributed;  // [num_ranks]: 1 if that rank's contribution is in
};

struct CollectiveResult {
  Status status = Status::ok;
  u64 epoch = 0;      // of the view in which it returned
  i32 odd_rank = -1;  // contributed another number of bytes; nothing of the result can be used then
};

// Blocks like a round. With quorum_lost it stays open, and the same call with the same bytes goes on with it.
CollectiveResult gather_all(Context& c, const CollectiveArgs& args);

}  // namespace fa2a
