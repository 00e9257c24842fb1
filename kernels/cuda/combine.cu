// Combine on a GPU, the half that sends: expert rows go back to their owners, and everybody gets an answer.
#include "kernels/cuda/grid.cuh"
#include "kernels/cuda/machine.cuh"
#include "kernels/cuda/rows.cuh"

namespace fa2a {
namespace device {

struct AnswerShared {
  RowList list;
  u32 is_last;
};

FA2A_DEVICE u8* answer_slot(const DeviceRank& r, const DeviceRound& round, i32 owner, i32 row) {
  return r.outbound[owner] + r.at.combine_rows[parity_of(round)] + r.at.combine_stride * static_cast<u64>(row);
}

FA2A_DEVICE const u8* expert_row(const DeviceRank& r, const AnswerArgs& args, const Received& row) {
  return args.y + static_cast<u64>(r.shape.hidden_bytes) * static_cast<u64>(row.position);
}

// One combine row per choice, as the expert wrote it; a block a row.
FA2A_DEVICE void return_choices(DeviceRank& r, const DeviceRound& round, const AnswerArgs& args, i32 owner) {
  const Received* received = round.received + static_cast<i64>(owner) * r.received_stride();
  for (i32 i = block_idx(); i < round.num_choices_from[owner]; i += num_blocks()) {
    u8* place[1] = {answer_slot(r, round, owner, i)};
    put_row(place, 1, expert_row(r, args, received[i]), static_cast<u64>(r.shape.hidden_bytes));
    if (thread_idx() == 0) point(r.host, Point::combine_send_rows, round.round);
  }
}

// One combine row per token: this rank's choices of it, weighted and summed here.
FA2A_DEVICE void return_sums(DeviceRank& r, const DeviceRound& round, const AnswerArgs& args, i32 owner,
                             RowList& list) {
  const i32 num_rows = round.num_rows_from[owner];
  const i32* first_choice = round.first_choice + static_cast<i64>(owner) * r.at.num_dispatch_rows;
  for (i32 row = block_idx(); row < num_rows; row += num_blocks()) {
    const i32 first = first_choice[row];
    const i32 end = row + 1 < num_rows ? first_choice[row + 1] : round.num_choices_from[owner];
    const Received* received = round.received + static_cast<i64>(owner) * r.received_stride() + first;
    if (thread_idx() < end - first) {
      list.rows[thread_idx()] = expert_row(r, args, received[thread_idx()]);
      list.weights[thread_idx()] = r.weights_at_expert ? 1.0f : received[thread_idx()].weight;
    }
    if (thread_idx() == 0) {
      list.count = end - first;
      list.factor = 1.0f;
      list.is_zero = 0;
    }
    sync_block();
    sum_rows<StoreToPeer>(r, answer_slot(r, round, owner, row), list);
    if (thread_idx() == 0) point(r.host, Point::combine_send_rows, round.round);
    sync_block();  // the list is made anew
  }
}

// Tells every active peer, a thread a peer. A source that was not taken, and any suspect, gets `declined`: without it
// the source would wait for ever, and its rows would never be free again.
FA2A_DEVICE void signal_answers(DeviceRank& r, const DeviceRound& round) {
  const i32 n = r.shape.num_ranks;
  for (i32 half = 0; half < 2; ++half) {
    const i32 first = half == 0 ? 1 : n / 2 + 1, last = half == 0 ? n / 2 : n;
    if (half == 1 && thread_idx() == 0) point(r.host, Point::combine_half_signalled, round.round);
    sync_block();
    for (i32 step = first + thread_idx(); step <= last; step += num_threads()) {
      const i32 owner = (r.rank + step) % n;
      const bool answered = round.taken.has(owner) && !round.shunned.has(owner);
      if (!answered && !(round.active.has(owner) && guarded(guard_one_answer))) continue;
      const i32 count = r.shape.reduce_at_expert ? round.num_rows_from[owner] : round.num_choices_from[owner];
      if (answered) point(r.host, Point::combine_chunk, round.round);
      signal(r, round, Verb::combine, owner, answered ? static_cast<u64>(count) : 0, !answered);
    }
    sync_block();
  }
  if (thread_idx() == 0) point(r.host, Point::combine_signalled, round.round);
}

// A round that was never received, or whose experts failed: nobody is answered with rows, and everybody is told.
FA2A_DEVICE void give_up(DeviceRank& r, DeviceRound& round, bool was_received) {
  if (thread_idx() == 0) round.taken = RankSet();
  for (i32 peer = thread_idx(); peer < r.shape.num_ranks && !was_received; peer += num_threads())
    if (round.active.has(peer)) refuse(r, round, Verb::dispatch, peer);
  sync_block();
}

// Any number of blocks; one where the round is given up.
FA2A_KERNEL combine_answer(DeviceRank* rank, AnswerArgs args, const DeviceHandle* handle) {
  DeviceRank& r = *rank;
  AnswerShared& shared = block_shared<AnswerShared>();
  DeviceRound* received = round_at(r, *handle, Step::received);
  DeviceRound* found = received == nullptr && args.abandon ? round_at(r, *handle, Step::sent) : received;
  if (found == nullptr) return;
  DeviceRound& round = *found;
  if (block_idx() == 0) {
    if (thread_idx() == 0) point(r.host, Point::combine_begin, round.round);
    enter(r, round.round, Phase::combine_send);
  }
  if (args.abandon) give_up(r, round, received != nullptr);
  for (i32 owner = 0; owner < r.shape.num_ranks; ++owner) {
    // Whichever block sees the suspicion: the owner is declined, whatever others have stored for it.
    if (thread_idx() == 0 && is_suspect(*r.state, owner)) add_rank(round.shunned, owner);
    if (!round.taken.has(owner)) continue;
    if (r.shape.reduce_at_expert)
      return_sums(r, round, args, owner, shared.list);
    else
      return_choices(r, round, args, owner);
  }
  if (!is_last_block(round, shared.is_last)) return;
  if (thread_idx() == 0 && (planted(Plant::view_twice) || !guarded(guard_view_once)))
    round.active = newest_view(r.state->ring).active;
  sync_block();
  signal_answers(r, round);
  enter(r, round.round, Phase::caller);
  sync_block();
  if (thread_idx() == 0) set_step(round, Step::answered);
}

}  // namespace device
}  // namespace fa2a
