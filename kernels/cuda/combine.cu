// Combine on a GPU, the half that sends: expert rows go back to their owners, and everybody gets an answer.
#include "kernels/cuda/answers.cuh"
#include "kernels/cuda/grid.cuh"
#include "kernels/cuda/machine.cuh"

namespace fa2a {
namespace device {

struct AnswerShared {
  RowList list;
  u32 is_last;
};

// One combine row per choice.
FA2A_DEVICE void return_choices(DeviceRank& r, const DeviceRound& round, const u8* y, i32 owner) {
  for (i32 i = block_idx(); i < round.num_choices_from[owner]; i += num_blocks())
    return_choice(r, round, y, owner, i, i);
}

// One combine row per token.
FA2A_DEVICE void return_sums(DeviceRank& r, const DeviceRound& round, const u8* y, i32 owner, RowList& list) {
  for (i32 row = block_idx(); row < round.num_rows_from[owner]; row += num_blocks())
    return_sum(r, round, y, owner, row, row, list);
}

// Tells every active peer. A source that was not taken, and any suspect, gets `declined`: without it
// the source would wait for ever, and its rows would never be free again.
FA2A_DEVICE void signal_answers(DeviceRank& r, const DeviceRound& round) {
  tell_peers(r, round, Point::combine_half_signalled, [&](i32 owner) {
    const bool answered = round.taken.has(owner) && !round.shunned.has(owner);
    if (!answered && !(round.active.has(owner) && guarded(guard_one_answer))) return;
    const i32 count = num_answers_to(r, round, owner);
    if (answered) point(r.host, Point::combine_chunk, round.round);
    signal(r, round, Verb::combine, owner, answered ? static_cast<u64>(count) : 0, !answered);
  });
  if (thread_idx() == 0) point(r.host, Point::combine_signalled, round.round);
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
      return_sums(r, round, args.y, owner, shared.list);
    else
      return_choices(r, round, args.y, owner);
  }
  if (!is_last_block(round, shared.is_last)) return;
  if (thread_idx() == 0 && (planted(Plant::view_twice) || !guarded(guard_view_once)))
    round.active = newest_view(r.state->ring).active;
  sync_block();
  signal_answers(r, round);
  end_half(r, round, Phase::caller, Step::answered);
}

}  // namespace device
}  // namespace fa2a
