// The halves of a stream that send, on a GPU: the first chunks of rows and of answers, which go without asking.
#include "kernels/cuda/grid.cuh"
#include "kernels/cuda/stream_rows.cuh"

namespace fa2a {
namespace device {

// Which row of each destination's stream carries which token; a token's choices for one rank all say the same.
FA2A_DEVICE void list_row_tokens(const DeviceRank& r, DeviceRound& round) {
  const i64 num_choices = static_cast<i64>(round.num_tokens) * r.shape.num_topk;
  for (i64 i = thread_idx(); i < num_choices; i += num_threads()) {
    const i32 dst = round.dst_rank[i];
    if (dst < 0) continue;
    round.row_tokens[static_cast<i64>(dst) * r.shape.num_max_tokens + round.dispatch_row[i]] =
        static_cast<i32>(i / r.shape.num_topk);
  }
}

// Opens this rank's streams of rows, behind dispatch_route. One block.
FA2A_KERNEL stream_open_rows(DeviceRank* rank, SendArgs args, const DeviceHandle* handle) {
  DeviceRank& r = *rank;
  DeviceRound* found = round_at(r, *handle, Step::routed);
  if (found == nullptr) return;
  DeviceRound& round = *found;
  list_row_tokens(r, round);
  for (i32 dst = thread_idx(); dst < r.shape.num_ranks; dst += num_threads())
    open_stream(round.out[dst], round.opened.has(dst) ? num_chunks_of(round.rows_to[dst], r.at.num_dispatch_rows) : 0);
  if (thread_idx() != 0) return;
  round.x = args.x;
  round.scales = args.scales;
}

// Stores their first chunks, and the last block tells. Any number of blocks.
FA2A_KERNEL stream_send_rows(DeviceRank* rank, SendArgs, const DeviceHandle* handle) {
  DeviceRank& r = *rank;
  SendShared& shared = block_shared<SendShared>();
  DeviceRound* found = round_at(r, *handle, Step::routed);
  if (found == nullptr) return;
  DeviceRound& round = *found;
  put_claims(r, round);
  store_dispatch_chunks(r, round, shared);
  if (!is_last_block(round, shared.is_last)) return;
  if (thread_idx() == 0) point(r.host, Point::dispatch_rows_sent, round.round);
  sync_block();
  signal_first_chunks(r, round, Verb::dispatch, Point::dispatch_half_signalled,
                      [&](i32 dst) { return round.rows_to[dst]; });
  if (thread_idx() == 0) point(r.host, Point::dispatch_signalled, round.round);
  end_half(r, round, Phase::caller, Step::sent);
}

// Opens this rank's streams of answers. A source that was not taken, and any suspect, gets `declined`. One block.
FA2A_KERNEL stream_open_answers(DeviceRank* rank, AnswerArgs args, const DeviceHandle* handle) {
  DeviceRank& r = *rank;
  DeviceRound* received = round_at(r, *handle, Step::received);
  DeviceRound* found = received == nullptr && args.abandon ? round_at(r, *handle, Step::sent) : received;
  if (found == nullptr) return;
  DeviceRound& round = *found;
  if (thread_idx() == 0) {
    if (planted(Plant::view_twice) || !guarded(guard_view_once)) round.active = newest_view(r.state->ring).active;
    point(r.host, Point::combine_begin, round.round);
    round.y = args.y;
  }
  enter(r, round.round, Phase::combine_send);
  sync_block();
  // Of a dispatch that was never received nobody waits for my chunks, nor for my `taken`.
  if (args.abandon && received == nullptr) stop_streams(r, round, Verb::dispatch);
  if (args.abandon) give_up(r, round, received != nullptr);
  for (i32 owner = thread_idx(); owner < r.shape.num_ranks; owner += num_threads()) {
    const bool answered = round.taken.has(owner) && !is_suspect(*r.state, owner);
    open_stream(round.out[owner], answered ? num_chunks_of(num_answers_to(r, round, owner), r.at.num_combine_rows) : 0);
  }
  sync_block();
  if (thread_idx() == 0) set_step(round, Step::received);
}

struct AnswerChunksShared {
  RowList list;
  u32 is_last;
};

// Stores their first chunks, and the last block tells. Any number of blocks.
FA2A_KERNEL stream_send_answers(DeviceRank* rank, AnswerArgs, const DeviceHandle* handle) {
  DeviceRank& r = *rank;
  AnswerChunksShared& shared = block_shared<AnswerChunksShared>();
  DeviceRound* found = round_at(r, *handle, Step::received);
  if (found == nullptr) return;
  DeviceRound& round = *found;
  store_answer_chunks(r, round, shared.list);
  if (!is_last_block(round, shared.is_last)) return;
  if (thread_idx() == 0) point(r.host, Point::combine_send_rows, round.round);
  sync_block();
  signal_first_chunks(r, round, Verb::combine, Point::combine_half_signalled,
                      [&](i32 owner) { return num_answers_to(r, round, owner); });
  if (thread_idx() == 0) point(r.host, Point::combine_signalled, round.round);
  end_half(r, round, Phase::caller, Step::answered);
}

}  // namespace device
}  // namespace fa2a
