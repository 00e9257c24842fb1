// Dispatch of a stream on a GPU, the half that receives: two kernels in turn until every source has ended. One block
// waits until a chunk can be taken or sent, and checks it; all blocks move what it found, and the last of them tells.
#include "kernels/cuda/grid.cuh"
#include "kernels/cuda/received.cuh"
#include "kernels/cuda/stream_rows.cuh"

namespace fa2a {
namespace device {

struct CollectChunksShared {
  WaitShared wait;
  u32 num_unheard;
  u32 num_awaited;
  u32 is_moving;
};

// All or nothing: a source is taken with all its rows or not at all, so whatever is wrong with one chunk ends it. By
// one thread.
FA2A_DEVICE void drop_source(DeviceRank& r, DeviceRound& round, i32 src) {
  fetch_and(&round.taken.words[src / 64], ~(1ull << (src % 64)));
  if (round.is_placed != 0) atomic_or(&round.has_gaps, 1);
  round.in[src].is_moving = 0;
  end_stream(r, round, Verb::dispatch, src, Flow::out, r.shape.dispatch_bytes);
}

FA2A_DEVICE void reject_source(DeviceRank& r, DeviceRound& round, i32 src) {
  atomic_add(reinterpret_cast<u32*>(&r.stats.num_rejected), 1);
  drop_source(r, round, src);
}

FA2A_DEVICE void begin_receive(DeviceRank& r, DeviceRound& round) {
  const i32 n = r.shape.num_ranks;
  enter(r, round.round, Phase::dispatch_wait);
  if (thread_idx() == 0) {
    point(r.host, Point::dispatch_wait, round.round);
    round.taken = RankSet();
    round.is_placed = round.has_gaps = 0;
  }
  for (i32 src = thread_idx(); src < n; src += num_threads()) {
    round.in[src] = StreamIn{};
    round.in[src].flow = round.active.has(src) ? Flow::silent : Flow::out;
    round.is_bad[src] = 0;
    round.num_rows_from[src] = round.num_choices_from[src] = 0;
  }
  sync_block();
  if (thread_idx() == 0) set_step(round, Step::collected);
  sync_block();
}

// The first signal of a source comes with its claims; a warp a source. `num_unheard` counts those who have said
// nothing yet.
FA2A_DEVICE void hear_claims(DeviceRank& r, DeviceRound& round, u32& num_unheard) {
  for (i32 src = warp(); src < r.shape.num_ranks; src += num_warps()) {
    if (round.in[src].flow != Flow::silent) continue;
    i32 said = 0;
    if (lane() == 0) said = static_cast<i32>(read_or_give_up(r, round, Verb::dispatch, src));
    const auto reading = static_cast<Reading>(shuffle(said, 0));
    if (reading == Reading::present) take_claims(r, round, src);
    if (lane() != 0) continue;
    if (reading == Reading::absent) {
      atomic_add(&num_unheard, 1);
    } else if (reading == Reading::declined) {
      drop_source(r, round, src);
    } else if (round.is_bad[src] != 0) {
      reject_source(r, round, src);
    } else {
      round.in[src].flow = Flow::flowing;
      add_rank(round.taken, src);
    }
  }
}

// Once all sources have claimed or are out, every row has its place. By the block; true if it has.
FA2A_DEVICE bool find_places(DeviceRank& r, DeviceRound& round, i32* offsets, CollectChunksShared& shared) {
  if (round.is_placed != 0) return true;
  hear_claims(r, round, shared.num_unheard);
  sync_block();
  if (shared.num_unheard != 0) return false;
  assign_places(r, round, offsets);
  for (i64 cell = thread_idx(); cell < static_cast<i64>(r.shape.num_ranks) * r.shape.max_local_experts;
       cell += num_threads())
    round.next[cell] = round.first[cell];
  if (thread_idx() == 0) {
    if (offsets[r.num_local_experts] == 0) point(r.host, Point::dispatch_copy, round.round);
    round.is_placed = 1;
  }
  sync_block();
  return true;
}

// Whose next chunk is there, and how many rows it says that it has; a warp a source.
FA2A_DEVICE void hear_chunks(DeviceRank& r, DeviceRound& round) {
  for (i32 src = warp(); src < r.shape.num_ranks; src += num_warps()) {
    StreamIn& in = round.in[src];
    if (in.flow != Flow::flowing) continue;
    for (i32 i = lane(); i < r.shape.max_local_experts * r.row_words(); i += kWarpLanes)
      rows_of(r, round, src, 0)[i] = 0;
    if (lane() != 0) continue;
    const Reading reading = read_or_give_up(r, round, Verb::dispatch, src);
    if (reading == Reading::declined) drop_source(r, round, src);
    if (reading != Reading::present) continue;
    round.words[src] = load_chunk(r, round, Verb::dispatch, src, in.next_chunk);
    in.moving_rows = bounded_count(r, round, src);
    // Nor more rows in all its chunks than a batch has, however many choices it has claimed.
    if (in.num_rows + in.moving_rows > r.shape.num_max_tokens && guarded(guard_clamp_count)) call_bad(round, src);
    if (round.is_bad[src] != 0)
      reject_source(r, round, src);
    else
      in.is_moving = 1;
  }
}

// By all threads of one block, for every source whose chunk is looked at.
template <class Work>
FA2A_DEVICE void for_each_moving_row(const DeviceRank& r, const DeviceRound& round, Work work) {
  for (i32 src = 0; src < r.shape.num_ranks; ++src) {
    if (round.in[src].is_moving == 0) continue;
    for (i32 row = thread_idx(); row < round.in[src].moving_rows; row += num_threads()) work(src, row);
  }
}

// Where the choices of each row of the chunk begin among those of its source; and whether the source keeps to its
// claims, which the last chunk must meet. By one warp.
FA2A_DEVICE void count_chunk(const DeviceRank& r, DeviceRound& round, i32 src) {
  StreamIn& in = round.in[src];
  i32* first_choice = round.first_choice + static_cast<i64>(src) * r.shape.num_max_tokens + in.num_rows;
  i32 total = 0;
  for (i32 base = 0; base < in.moving_rows; base += kWarpLanes) {
    const i32 row = base + lane();
    const i32 mine = row < in.moving_rows ? num_choices_at(header_at(r, round, src, row)) : 0;
    const i32 prefix = warp_prefix(mine);
    if (row < in.moving_rows) first_choice[row] = in.num_choices + total + prefix - mine;
    total += shuffle(prefix, kWarpLanes - 1);
  }
  if (lane() == 0) in.moving_choices = total;
  const bool is_last = signal_field::Last::unpack(round.words[src]) != 0;
  bool keeps = true, meets = true;
  for (i32 expert = lane(); expert < r.num_local_experts; expert += kWarpLanes) {
    const i64 cell = cell_of(r, src, expert);
    const i32 count = round.next[cell] - round.first[cell] + count_rows(r, rows_of(r, round, src, expert));
    keeps &= count <= round.claims[cell];
    meets &= count == round.claims[cell];
  }
  if ((!keeps && guarded(guard_check_index)) || (is_last && !meets && guarded(guard_claims_met))) call_bad(round, src);
}

// A barrier before and after.
FA2A_DEVICE void drop_bad_chunks(DeviceRank& r, DeviceRound& round) {
  for (i32 src = thread_idx(); src < r.shape.num_ranks; src += num_threads())
    if (round.in[src].is_moving != 0 && round.is_bad[src] != 0) reject_source(r, round, src);
  sync_block();
}

// Checks the next chunks of all sources, in copies of their headers, and gives their rows to their places. By the
// block.
FA2A_DEVICE void take_chunks(DeviceRank& r, DeviceRound& round, u32& is_moving) {
  const i32 n = r.shape.num_ranks;
  hear_chunks(r, round);
  sync_block();
  for_each_moving_row(r, round, [&](i32 src, i32 row) {
    const i32 half = round.in[src].next_chunk % static_cast<i32>(kNumHalves);
    copy_header(r, round, src, row, half * r.at.num_dispatch_rows + row);
    if (!note_row(r, round, src, row)) call_bad(round, src);
  });
  sync_block();
  drop_bad_chunks(r, round);
  for (i32 src = warp(); src < n; src += num_warps())
    if (round.in[src].is_moving != 0) count_chunk(r, round, src);
  sync_block();
  drop_bad_chunks(r, round);
  for_each_moving_row(
      r, round, [&](i32 src, i32 row) { place_row</*kStreamed=*/true>(r, round, src, row, round.in[src].num_rows); });
  sync_block();
  for (i32 src = warp(); src < n; src += num_warps()) {
    if (round.in[src].is_moving == 0) continue;
    if (lane() == 0) atomic_or(&is_moving, 1);
    for (i32 expert = lane(); expert < r.num_local_experts; expert += kWarpLanes)
      round.next[cell_of(r, src, expert)] += count_rows(r, rows_of(r, round, src, expert));
  }
}

// Waits until something can move, and finds out what. One block, the only one that waits.
FA2A_KERNEL stream_collect(DeviceRank* rank, ReceivedTensors out, DeviceHandle* handle) {
  DeviceRank& r = *rank;
  CollectChunksShared& shared = block_shared<CollectChunksShared>();
  DeviceRound* sent = round_at(r, *handle, Step::sent);
  DeviceRound* found = sent != nullptr ? sent : round_at(r, *handle, Step::collected);
  if (found == nullptr || handle->ended != Status::ok) return;
  DeviceRound& round = *found;
  sync_block();
  if (sent != nullptr) begin_receive(r, round);
  auto awaits_signal = [&](i32 src) {
    // Before rows have their places only the signals of silent sources are missing: the others' wait for us.
    return round.is_placed != 0 ? is_unfinished(round.in[src]) : round.in[src].flow == Flow::silent;
  };
  const StreamWords<decltype(awaits_signal)> words{r, round, Verb::dispatch, awaits_signal};
  bool goes_on = true;
  while (goes_on) {
    if (thread_idx() == 0) shared.is_moving = shared.num_unheard = shared.num_awaited = 0;
    sync_block();
    if (look_for_room(r, round, Verb::dispatch)) atomic_or(&shared.is_moving, 1);
    if (find_places(r, round, out.offsets, shared)) take_chunks(r, round, shared.is_moving);
    for (i32 peer = thread_idx(); peer < r.shape.num_ranks; peer += num_threads())
      if (words.awaits(peer)) atomic_add(&shared.num_awaited, 1);
    sync_block();
    if (shared.is_moving != 0 || shared.num_awaited == 0) break;
    goes_on = wait_for_any(words, Phase::dispatch_wait, shared.wait);
  }
  if (goes_on) return note_awaited(words, Phase::dispatch_wait);
  expect_nobody(r, round);
  if (thread_idx() != 0) return;
  handle->ended = released_status(*r.state);
  // A closing rank still owes its peers an answer to this round; close() sends it.
  round.taken = RankSet();
  set_step(round, handle->ended == Status::closed ? Step::sent : Step::closed);
}

// Copies rows out of the window.
FA2A_DEVICE void copy_chunks(DeviceRank& r, const DeviceRound& round, const ReceivedTensors& out) {
  for (i32 src = 0; src < r.shape.num_ranks; ++src) {
    const StreamIn& in = round.in[src];
    if (in.is_moving != 0) copy_choices</*kStreamed=*/true>(r, round, out, src, in.num_choices, in.moving_choices);
  }
}

// A chunk is copied: its source may overwrite it, or has sent its last one. A word that moved meanwhile was stored
// without consent: the rows may be torn. By one thread.
FA2A_DEVICE void settle_chunk(DeviceRank& r, DeviceRound& round, i32 src) {
  StreamIn& in = round.in[src];
  const u64 word = round.words[src];
  if (load_chunk(r, round, Verb::dispatch, src, in.next_chunk) != word && guarded(guard_recheck)) {
    atomic_add(reinterpret_cast<u32*>(&r.stats.num_rechecks), 1);
    return drop_source(r, round, src);
  }
  in.is_moving = 0;
  in.num_rows += in.moving_rows;
  in.num_choices += in.moving_choices;
  point(r.host, Point::dispatch_chunk_taken, round.round);
  if (signal_field::Last::unpack(word) == 0) return tell_taken(r, round, Verb::dispatch, src, in.next_chunk++);
  round.num_rows_from[src] = in.num_rows;
  round.num_choices_from[src] = in.num_choices;
  end_stream(r, round, Verb::dispatch, src, Flow::whole, r.shape.dispatch_bytes);
}

struct ExpandChunksShared {
  SendShared send;
  u32 is_last;
  u32 num_unfinished;
};

// Moves what stream_collect found: chunks into the windows of peers, and out of this rank's. Any number of blocks.
FA2A_KERNEL stream_expand(DeviceRank* rank, ReceivedTensors out, const DeviceHandle* handle) {
  DeviceRank& r = *rank;
  ExpandChunksShared& shared = block_shared<ExpandChunksShared>();
  DeviceRound* found = round_at(r, *handle, Step::collected);
  if (found == nullptr) return;
  DeviceRound& round = *found;
  store_dispatch_chunks(r, round, shared.send);
  copy_chunks(r, round, out);
  if (!is_last_block(round, shared.is_last)) return;
  if (thread_idx() == 0) shared.num_unfinished = 0;
  sync_block();
  for (i32 peer = thread_idx(); peer < r.shape.num_ranks; peer += num_threads()) {
    if (round.in[peer].is_moving != 0) settle_chunk(r, round, peer);
    if (round.out[peer].num_moving != 0) signal_moving(r, round, Verb::dispatch, peer, round.rows_to[peer]);
    if (is_unfinished(round.in[peer]) || round.out[peer].is_open != 0) atomic_add(&shared.num_unfinished, 1);
  }
  advance(r, round, Phase::dispatch_wait);
  if (shared.num_unfinished != 0) return;
  expect_nobody(r, round);
  if (round.has_gaps != 0) close_gaps(r, round, out);
  publish_counts(r, round, out);
  if (thread_idx() == 0) ++r.stats.num_rounds;
  end_half(r, round, Phase::caller, Step::received);
  if (thread_idx() == 0) point(r.host, Point::dispatch_taken, round.round);
}

}  // namespace device
}  // namespace fa2a
