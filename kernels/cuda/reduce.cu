// Combine on a GPU, the half that receives: one block waits for all answers, all blocks sum, a token at a time, and the
// last of them looks whether a row moved meanwhile, and says exactly what did not come back.
#include "kernels/cuda/grid.cuh"
#include "kernels/cuda/machine.cuh"
#include "kernels/cuda/sums.cuh"

namespace fa2a {
namespace device {

// Waits for every holder's answer. It counts only with as many rows as were asked for. One block.
FA2A_KERNEL combine_gather(DeviceRank* rank, GatherArgs args, DeviceHandle* handle) {
  DeviceRank& r = *rank;
  u32& is_released = block_shared<u32>();
  DeviceRound* found = round_at(r, *handle, Step::answered);
  if (found == nullptr) return;
  DeviceRound& round = *found;
  if (thread_idx() == 0) is_released = 0;
  enter(r, round.round, Phase::combine_wait);
  if (thread_idx() == 0) point(r.host, Point::combine_wait, round.round);
  sync_block();
  const bool went_on = wait_for_all(
      r, round, Verb::combine, Phase::combine_wait,
      [&](i32 dst, u64 word) {
        const u64 asked = static_cast<u64>(round.answers_from[dst]);
        const bool whole = signal_field::Count::unpack(word) == asked || !guarded(guard_combine_count);
        round.words[dst] = word;
        if (whole && !args.abandon) add_rank(round.answered, dst);
      },
      [](i32) {});
  if (!went_on) atomic_or(&is_released, 1);
  sync_block();
  for (i32 dst = thread_idx(); dst < r.shape.num_ranks && is_released == 0; dst += num_threads()) {
    if (!round.active.has(dst)) continue;
    const bool whole = round.answered.has(dst);
    const u64 num_rows = whole ? static_cast<u64>(round.answers_from[dst]) : 0;
    add_to(r.sources[dst].num_rows, num_rows);
    add_to(r.sources[dst].num_bytes, num_rows * static_cast<u64>(r.shape.hidden_bytes));
    if (whole) continue;
    add_to(r.sources[dst].num_failures, 1);
    refuse(r, round, Verb::combine, dst);
  }
  sync_block();
  if (is_released == 0 && !args.abandon) {
    if (thread_idx() == 0) set_step(round, Step::gathered);
    return;
  }
  if (is_released != 0 && thread_idx() == 0) handle->ended = released_status(*r.state);
  close_round(r, round);
}

struct ReduceShared {
  RowList list;
  u32 is_last;
  u32 num_changed;
  OutcomeCounts counts;
};

// True: it was withdrawn. By one thread.
FA2A_DEVICE bool withdraw_answer(DeviceRank& r, DeviceRound& round, i32 dst) {
  if (!round.answered.has(dst) || load_signal(r, round, Verb::combine, dst) == round.words[dst]) return false;
  fetch_and(&round.answered.words[dst / 64], ~(1ull << (dst % 64)));
  refuse(r, round, Verb::combine, dst);
  return true;
}

FA2A_DEVICE void count_losses(DeviceRank& r, DeviceRound& round, const ReduceTensors& to, OutcomeCounts& counts) {
  if (thread_idx() == 0) counts = OutcomeCounts{};
  sync_block();
  const i64 num_choices = static_cast<i64>(round.num_tokens) * r.shape.num_topk;
  for (i64 i = thread_idx(); i < num_choices; i += num_threads()) count_outcome(to.codes[i], counts);
  sync_block();
  if (thread_idx() != 0) return;
  note_outcomes(r, counts);
  round.num_lost = counts.num_lost;
  *to.lost = counts.num_lost > 0 ? 1 : 0;
}

// A round that never began here, or that the host ended: nothing came back, and a replayed graph says so instead of
// handing on what the replay before it has left.
FA2A_DEVICE void lose_everything(const DeviceRank& r, const ReduceTensors& to) {
  const u64 first = static_cast<u64>(block_idx()) * static_cast<u64>(num_threads()) + static_cast<u64>(thread_idx());
  const u64 stride = static_cast<u64>(num_blocks()) * static_cast<u64>(num_threads());
  const auto num_tokens = static_cast<u64>(to.num_tokens);
  for (u64 i = first; i < num_tokens * static_cast<u64>(r.shape.num_topk); i += stride)
    to.codes[i] = static_cast<u8>(Outcome::lost);
  for (u64 at = first * sizeof(Vector16); at < num_tokens * static_cast<u64>(r.shape.hidden_bytes);
       at += stride * sizeof(Vector16))
    *reinterpret_cast<Vector16*>(to.out + at) = Vector16{};
  if (first == 0) *to.lost = num_tokens > 0 ? 1 : 0;
}

// Sums. Any number of blocks.
FA2A_KERNEL combine_reduce(DeviceRank* rank, ReduceTensors to, const DeviceHandle* handle) {
  DeviceRank& r = *rank;
  ReduceShared& shared = block_shared<ReduceShared>();
  DeviceRound* found = round_at(r, *handle, Step::gathered);
  if (found == nullptr) return lose_everything(r, to);
  DeviceRound& round = *found;
  if (block_idx() == 0 && thread_idx() == 0) point(r.host, Point::combine_reduce, round.round);
  for (i32 token = block_idx(); token < round.num_tokens; token += num_blocks())
    sum_token</*kStreamed=*/false>(r, round, token, to, shared.list);
  if (!is_last_block(round, shared.is_last)) return;
  // At most once a holder: whoever is withdrawn stays so.
  for (i32 again = 0; again < r.shape.num_ranks; ++again) {
    if (!withdraw_changed(r, shared.num_changed, [&](i32 dst) { return withdraw_answer(r, round, dst); })) break;
    for (i32 token = 0; token < round.num_tokens; ++token)
      sum_token</*kStreamed=*/false>(r, round, token, to, shared.list);
  }
  count_losses(r, round, to, shared.counts);
  if (thread_idx() == 0) point(r.host, Point::combine_chunk_taken, round.round);
  close_round(r, round);
}

}  // namespace device
}  // namespace fa2a
