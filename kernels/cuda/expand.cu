// Dispatch on a GPU, the half that receives: one block waits for all sources and checks what they say, all blocks copy
// rows to where their experts find them, and the last of them closes the gaps of sources that were withdrawn.
#include "kernels/cuda/grid.cuh"
#include "kernels/cuda/headers.cuh"
#include "kernels/cuda/machine.cuh"
#include "kernels/cuda/received.cuh"

namespace fa2a {
namespace device {

// By all threads of one block, for every source in `round.taken`.
template <class Work>
FA2A_DEVICE void for_each_row(const DeviceRank& r, const DeviceRound& round, Work work) {
  const i32 most = r.at.num_dispatch_rows;
  for (i32 src = 0; src < r.shape.num_ranks; ++src) {
    if (!round.taken.has(src)) continue;
    const i32 num_rows =
        planted(Plant::count_unclamped) || round.num_rows_from[src] <= most ? round.num_rows_from[src] : most;
    for (i32 row = thread_idx(); row < num_rows; row += num_threads()) work(src, row);
  }
}

// A source whose claims, counts or indices are wrong is not taken; a barrier before and after.
FA2A_DEVICE void drop_bad_sources(DeviceRank& r, DeviceRound& round) {
  for (i32 src = thread_idx(); src < r.shape.num_ranks; src += num_threads()) {
    if (!round.taken.has(src) || round.is_bad[src] == 0) continue;
    fetch_and(&round.taken.words[src / 64], ~(1ull << (src % 64)));
    atomic_add(reinterpret_cast<u32*>(&r.stats.num_rejected), 1);
  }
  sync_block();
}

FA2A_DEVICE void check_sources(DeviceRank& r, DeviceRound& round) {
  const i32 n = r.shape.num_ranks;
  for (i32 src = warp(); src < n; src += num_warps()) {
    if (!round.taken.has(src)) continue;
    take_claims(r, round, src);
    if (lane() == 0) round.num_rows_from[src] = bounded_count(r, round, src);
  }
  sync_block();
  drop_bad_sources(r, round);
  for_each_row(r, round, [&](i32 src, i32 row) {
    copy_header(r, round, src, row, row);
    if (!note_row(r, round, src, row)) call_bad(round, src);
  });
  sync_block();
  drop_bad_sources(r, round);
  for (i32 src = warp(); src < n; src += num_warps())
    if (round.taken.has(src)) count_choices(r, round, src);
  sync_block();
  drop_bad_sources(r, round);
}

struct CollectShared {
  u32 is_released;
};

// Waits for every source and finds a place for every row. One block, the only one that waits.
FA2A_KERNEL dispatch_collect(DeviceRank* rank, ReceivedTensors out, DeviceHandle* handle) {
  DeviceRank& r = *rank;
  CollectShared& shared = block_shared<CollectShared>();
  DeviceRound* found = round_at(r, *handle, Step::sent);
  if (found == nullptr) return;
  DeviceRound& round = *found;
  const i32 n = r.shape.num_ranks;
  if (thread_idx() == 0) shared.is_released = 0;
  enter(r, round.round, Phase::dispatch_wait);
  if (thread_idx() == 0) point(r.host, Point::dispatch_wait, round.round);
  for (i32 src = thread_idx(); src < n; src += num_threads())
    round.is_bad[src] = static_cast<u32>(round.num_rows_from[src] = round.num_choices_from[src] = 0);
  for (i64 i = thread_idx(); i < static_cast<i64>(n) * r.shape.max_local_experts * r.row_words(); i += num_threads())
    round.rows_of_expert[i] = 0;
  sync_block();
  const bool went_on = wait_for_all(
      r, round, Verb::dispatch, Phase::dispatch_wait,
      [&](i32 src, u64 word) {
        round.words[src] = word;
        add_rank(round.taken, src);
      },
      [](i32) {});
  if (!went_on) atomic_or(&shared.is_released, 1);
  sync_block();
  if (shared.is_released != 0) {
    if (thread_idx() != 0) return;
    handle->ended = released_status(*r.state);
    // A closing rank still owes its peers an answer to this round; close() sends it.
    round.taken = RankSet();
    if (handle->ended != Status::closed) set_step(round, Step::closed);
    return;
  }
  check_sources(r, round);
  assign_places(r, round, out.offsets);
  for_each_row(r, round, [&](i32 src, i32 row) { place_row</*kStreamed=*/false>(r, round, src, row, 0); });
  if (thread_idx() == 0) set_step(round, Step::collected);
}

// Copies rows out of the window.
FA2A_DEVICE void copy_rows(DeviceRank& r, const DeviceRound& round, const ReceivedTensors& out) {
  for (i32 src = 0; src < r.shape.num_ranks; ++src)
    if (round.taken.has(src)) copy_choices</*kStreamed=*/false>(r, round, out, src, 0, round.num_choices_from[src]);
}

// A word that moved while its rows were copied was stored without consent: the rows may be torn.
FA2A_DEVICE void withdraw_changed_sources(DeviceRank& r, DeviceRound& round, u32& num_changed) {
  for (i32 src = thread_idx(); src < r.shape.num_ranks; src += num_threads()) {
    if (!round.taken.has(src) || !guarded(guard_recheck)) continue;
    if (load_signal(r, round, Verb::dispatch, src) == round.words[src]) continue;
    fetch_and(&round.taken.words[src / 64], ~(1ull << (src % 64)));
    atomic_add(&num_changed, 1);
  }
  sync_block();
}

FA2A_DEVICE void note_sources(DeviceRank& r, DeviceRound& round) {
  for (i32 src = thread_idx(); src < r.shape.num_ranks; src += num_threads()) {
    const u64 num_rows = round.taken.has(src) ? static_cast<u64>(round.num_rows_from[src]) : 0;
    add_to(r.sources[src].num_rows, num_rows);
    add_to(r.sources[src].num_bytes, num_rows * static_cast<u64>(r.shape.dispatch_bytes));
    if (!round.active.has(src) || round.taken.has(src)) continue;
    add_to(r.sources[src].num_failures, 1);
    refuse(r, round, Verb::dispatch, src);
  }
}

// A round that never began here, or that the host ended: a replayed graph goes on with its experts all the same, and
// must not find the counts of the replay before.
FA2A_DEVICE void publish_nothing(const DeviceRank& r, const ReceivedTensors& out) {
  for (i32 expert = thread_idx(); expert <= r.num_local_experts; expert += num_threads()) {
    out.offsets[expert] = 0;
    if (expert < r.num_local_experts) out.num_tokens_per_expert[expert] = 0;
  }
}

struct ExpandShared {
  u32 is_last;
  u32 num_changed;
};

// Copies rows to expert-major. Any number of blocks.
FA2A_KERNEL dispatch_expand(DeviceRank* rank, ReceivedTensors out, const DeviceHandle* handle) {
  DeviceRank& r = *rank;
  ExpandShared& shared = block_shared<ExpandShared>();
  DeviceRound* found = round_at(r, *handle, Step::collected);
  if (found == nullptr && block_idx() == 0) publish_nothing(r, out);
  if (found == nullptr) return;
  DeviceRound& round = *found;
  copy_rows(r, round, out);
  if (!is_last_block(round, shared.is_last)) return;
  if (thread_idx() == 0) shared.num_changed = 0;
  sync_block();
  withdraw_changed_sources(r, round, shared.num_changed);
  if (shared.num_changed != 0) close_gaps(r, round, out);
  publish_counts(r, round, out);
  note_sources(r, round);
  if (thread_idx() == 0) {
    r.stats.num_rechecks += shared.num_changed;
    ++r.stats.num_rounds;
    point(r.host, Point::dispatch_chunk_taken, round.round);
  }
  end_half(r, round, Phase::caller, Step::received);
  if (thread_idx() == 0) point(r.host, Point::dispatch_taken, round.round);
}

}  // namespace device
}  // namespace fa2a
