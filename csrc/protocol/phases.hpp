// The named points inside a round, and inside a small collective, at which the test build can make a fault happen.
#pragma once

#include "protocol/compiler.hpp"

namespace fa2a {

#define FA2A_PHASES(X)                                                                                 \
  X(dispatch_gate, "dispatch.gate")                     /* before the gate of the round      */        \
  X(dispatch_started, "dispatch.started")               /* started is published              */        \
  X(dispatch_send_rows, "dispatch.send_rows")           /* half of the rows are stored       */        \
  X(dispatch_rows_sent, "dispatch.rows_sent")           /* the first rows stored, nothing signalled */ \
  X(dispatch_chunk, "dispatch.chunk")                   /* a chunk's rows stored, not signalled */     \
  X(dispatch_half_signalled, "dispatch.half_signalled") /* half of the group can read        */        \
  X(dispatch_signalled, "dispatch.signalled")           /* everybody can read                */        \
  X(dispatch_wait, "dispatch.wait")                     /* before the first wait             */        \
  X(dispatch_copy, "dispatch.copy")                     /* a quarter of the rows is copied   */        \
  X(dispatch_chunk_taken, "dispatch.chunk_taken")       /* a chunk copied, its sender not told */      \
  X(dispatch_taken, "dispatch.taken")                   /* before dispatch returns           */        \
  X(combine_begin, "combine.begin")                     /* the experts are done              */        \
  X(combine_send_rows, "combine.send_rows")             /* rows go back, nothing signalled   */        \
  X(combine_chunk, "combine.chunk")                                                                    \
  X(combine_half_signalled, "combine.half_signalled")                                                  \
  X(combine_signalled, "combine.signalled")                                                            \
  X(combine_wait, "combine.wait")                                                                      \
  X(combine_reduce, "combine.reduce")           /* rows are being summed                     */        \
  X(combine_chunk_taken, "combine.chunk_taken") /* tokens summed, nobody told                */        \
  X(combine_closed, "combine.closed")           /* before combine returns                    */        \
  X(collective_begin, "collective.begin")       /* nothing is stored                         */        \
  X(collective_half_contributed, "collective.half_contributed")                                        \
  X(collective_contributed, "collective.contributed")                                                  \
  X(collective_half_said, "collective.half_said") /* half know what this rank has            */        \
  X(collective_said, "collective.said")                                                                \
  X(collective_half_done, "collective.half_done") /* it returns, and half are told           */        \
  X(collective_returned, "collective.returned")

enum class Point : u32 {
#define FA2A_POINT(name, text) name,
  FA2A_PHASES(FA2A_POINT)
#undef FA2A_POINT
      count
};

}  // namespace fa2a
