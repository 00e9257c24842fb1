// Combine of a stream on a GPU, the half that receives: two kernels in turn until every token is summed. One block
// waits until a chunk has come or can be sent; all blocks send it and sum the tokens that are ready, and the last of
// them gives back the chunks that are read.
#include "kernels/cuda/grid.cuh"
#include "kernels/cuda/stream_rows.cuh"
#include "kernels/cuda/sums.cuh"

namespace fa2a {
namespace device {

struct GatherChunksShared {
  WaitShared wait;
  u32 num_awaited;
  u32 is_moving;
  u32 first_unready;
};

// `abandon`: answers are waited for and not looked at.
FA2A_DEVICE void begin_gather(DeviceRank& r, DeviceRound& round, bool abandon) {
  enter(r, round.round, Phase::combine_wait);
  if (thread_idx() == 0) {
    point(r.host, Point::combine_wait, round.round);
    round.next_token = round.end_token = abandon ? round.num_tokens : 0;
    round.num_lost = 0;
  }
  // Nothing more of a stream: whoever dropped its hook dropped the rows as well.
  if (abandon) stop_streams(r, round, Verb::combine);
  for (i32 dst = thread_idx(); dst < r.shape.num_ranks; dst += num_threads()) {
    round.in[dst] = StreamIn{};
    round.in[dst].flow = round.active.has(dst) ? Flow::silent : Flow::out;
  }
  sync_block();
  if (thread_idx() == 0) set_step(round, Step::gathered);
  sync_block();
}

// Not beyond the chunks that were given back: a writer that overwrites one that is still summed must be found out by
// its word.
FA2A_DEVICE bool has_room_for(const StreamIn& in) {
  return is_unfinished(in) && in.next_chunk < in.num_told + static_cast<i32>(kNumHalves);
}

// Takes note of the chunks of one answer that are there. They count only with as many rows as were asked for. By one
// thread.
FA2A_DEVICE void hear_answer(DeviceRank& r, DeviceRound& round, i32 dst, bool abandon) {
  StreamIn& in = round.in[dst];
  for (u32 half = 0; half < kNumHalves && has_room_for(in); ++half) {
    const Reading reading = read_or_give_up(r, round, Verb::combine, dst);
    if (reading == Reading::absent) return;
    const u64 word = load_chunk(r, round, Verb::combine, dst, in.next_chunk);
    const i32 missing = round.answers_from[dst] - in.num_rows;
    const i32 wanted = missing < r.at.num_combine_rows ? missing : r.at.num_combine_rows;
    const bool whole = signal_field::Count::unpack(word) == static_cast<u64>(wanted) || !guarded(guard_combine_count);
    if (reading != Reading::present || !whole || abandon)
      return end_stream(r, round, Verb::combine, dst, Flow::out, r.shape.hidden_bytes);
    in.flow = Flow::flowing;
    in.words[static_cast<u32>(in.next_chunk) % kNumHalves] = word;
    in.num_rows += wanted;
    ++in.next_chunk;
    if (in.num_rows == round.answers_from[dst])
      return end_stream(r, round, Verb::combine, dst, Flow::whole, r.shape.hidden_bytes);
  }
}

FA2A_DEVICE bool is_ready(const DeviceRank& r, const DeviceRound& round, i32 token) {
  const i64 first = static_cast<i64>(token) * r.shape.num_topk;
  for (i64 i = first; i < first + r.shape.num_topk; ++i) {
    const i32 dst = round.dst_rank[i];
    if (dst < 0 || !round.active.has(dst)) continue;
    if (round.combine_row[i] >= round.in[dst].num_rows && is_unfinished(round.in[dst])) return false;
  }
  return true;
}

// Tokens are summed in order, as soon as every row that they need has come or is lost: up to the first that is not
// ready. By the block; `first_unready` is the number of tokens before.
FA2A_DEVICE void find_ready_tokens(const DeviceRank& r, DeviceRound& round, u32& first_unready) {
  for (i32 base = round.next_token; base < round.num_tokens; base += num_threads()) {
    const i32 token = base + thread_idx();
    if (token < round.num_tokens && !is_ready(r, round, token)) atomic_min(&first_unready, static_cast<u32>(token));
    sync_block();
    // What a thread that is ahead finds meanwhile is not below its own tokens, and decides the same.
    if (atomic_or(&first_unready, 0) < static_cast<u32>(base + num_threads())) break;
  }
  sync_block();
  if (thread_idx() == 0) round.end_token = static_cast<i32>(first_unready);
}

// Waits until something can move, and finds out what. One block, the only one that waits.
FA2A_KERNEL stream_gather(DeviceRank* rank, GatherArgs args, DeviceHandle* handle) {
  DeviceRank& r = *rank;
  GatherChunksShared& shared = block_shared<GatherChunksShared>();
  DeviceRound* answered = round_at(r, *handle, Step::answered);
  DeviceRound* found = answered != nullptr ? answered : round_at(r, *handle, Step::gathered);
  if (found == nullptr) return;
  DeviceRound& round = *found;
  sync_block();
  if (answered != nullptr) begin_gather(r, round, args.abandon);
  auto awaits_signal = [&](i32 dst) { return has_room_for(round.in[dst]); };
  const StreamWords<decltype(awaits_signal)> words{r, round, Verb::combine, awaits_signal};
  bool goes_on = true;
  while (goes_on) {
    if (thread_idx() == 0) {
      shared.is_moving = shared.num_awaited = 0;
      shared.first_unready = static_cast<u32>(round.num_tokens);
    }
    sync_block();
    if (look_for_room(r, round, Verb::combine)) atomic_or(&shared.is_moving, 1);
    for (i32 dst = thread_idx(); dst < r.shape.num_ranks; dst += num_threads()) {
      hear_answer(r, round, dst, args.abandon);
      if (words.awaits(dst)) atomic_add(&shared.num_awaited, 1);
    }
    sync_block();
    find_ready_tokens(r, round, shared.first_unready);
    sync_block();
    if (shared.is_moving != 0 || round.end_token > round.next_token || shared.num_awaited == 0) break;
    goes_on = wait_for_any(words, Phase::combine_wait, shared.wait);
  }
  if (goes_on) return note_awaited(words, Phase::combine_wait);
  expect_nobody(r, round);
  if (thread_idx() == 0) handle->ended = released_status(*r.state);
  close_round(r, round);
}

struct ReduceChunksShared {
  RowList list;
  u32 is_last;
  u32 num_changed;
  OutcomeCounts counts;
  u32 num_unfinished;
};

FA2A_DEVICE void sum_batch(const DeviceRank& r, const DeviceRound& round, const ReduceTensors& to, RowList& list,
                           i32 first, i32 stride) {
  for (i32 token = round.next_token + first; token < round.end_token; token += stride)
    sum_token</*kStreamed=*/true>(r, round, token, to, list);
}

// What is summed already was looked at in its turn; the rest of a chunk that changed counts no more. True: it was
// withdrawn. By one thread.
FA2A_DEVICE bool withdraw_chunks(DeviceRank& r, DeviceRound& round, i32 dst) {
  StreamIn& in = round.in[dst];
  for (i32 chunk = in.num_summed / r.at.num_combine_rows; chunk < in.next_chunk; ++chunk) {
    const u64 noted = in.words[static_cast<u32>(chunk) % kNumHalves];
    if (load_chunk(r, round, Verb::combine, dst, chunk) == noted) continue;
    const i32 whole = chunk * r.at.num_combine_rows;
    in.num_rows = whole > in.num_summed ? whole : in.num_summed;
    in.next_chunk = chunk;
    end_stream(r, round, Verb::combine, dst, Flow::out, r.shape.hidden_bytes);
    return true;
  }
  return false;
}

// What became of the choices of the batch, and how far it has read each answer. By the block.
FA2A_DEVICE void count_batch(DeviceRank& r, DeviceRound& round, const ReduceTensors& to, OutcomeCounts& counts) {
  if (thread_idx() == 0) counts = OutcomeCounts{};
  sync_block();
  const i64 k = r.shape.num_topk;
  for (i64 i = round.next_token * k + thread_idx(); i < round.end_token * k; i += num_threads()) {
    count_outcome(to.codes[i], counts);
    const i32 dst = round.dst_rank[i];
    bool has_row = dst >= 0;  // reduce="expert": one row a token, whichever choices it sums
    for (i64 before = i - i % k; before < i && has_row && r.shape.reduce_at_expert; ++before)
      has_row = round.dst_rank[before] != dst;
    if (has_row) atomic_add(reinterpret_cast<u32*>(&round.in[dst].num_summed), 1);
  }
  sync_block();
  if (thread_idx() != 0) return;
  note_outcomes(r, counts);
  round.num_lost += counts.num_lost;
  round.next_token = round.end_token;
}

// Chunks whose rows are all summed may be overwritten. By one thread.
FA2A_DEVICE void give_back(DeviceRank& r, DeviceRound& round, i32 dst) {
  StreamIn& in = round.in[dst];
  if (in.flow != Flow::flowing) return;
  const i32 num_free = in.num_summed / r.at.num_combine_rows;
  if (num_free > in.num_told) tell_taken(r, round, Verb::combine, dst, num_free - 1);
  in.num_told = num_free;
}

// Moves what stream_gather found: chunks of answers to their owners, and the sums of this rank's tokens. Any number of
// blocks.
FA2A_KERNEL stream_reduce(DeviceRank* rank, ReduceTensors to, const DeviceHandle* handle) {
  DeviceRank& r = *rank;
  ReduceChunksShared& shared = block_shared<ReduceChunksShared>();
  DeviceRound* found = round_at(r, *handle, Step::gathered);
  if (found == nullptr) return;
  DeviceRound& round = *found;
  store_answer_chunks(r, round, shared.list);
  const bool has_batch = round.end_token > round.next_token;
  if (block_idx() == 0 && thread_idx() == 0 && (has_batch || round.num_tokens == 0))
    point(r.host, Point::combine_reduce, round.round);
  sum_batch(r, round, to, shared.list, block_idx(), num_blocks());
  if (!is_last_block(round, shared.is_last)) return;
  // At most once a holder: whoever is withdrawn stays so.
  for (i32 again = 0; again < r.shape.num_ranks && has_batch; ++again) {
    if (!withdraw_changed(r, shared.num_changed, [&](i32 dst) { return withdraw_chunks(r, round, dst); })) break;
    sum_batch(r, round, to, shared.list, 0, 1);
  }
  if (thread_idx() == 0) {
    shared.num_unfinished = 0;
    if (has_batch || round.num_tokens == 0) point(r.host, Point::combine_chunk_taken, round.round);
  }
  sync_block();
  if (has_batch) count_batch(r, round, to, shared.counts);
  sync_block();
  for (i32 peer = thread_idx(); peer < r.shape.num_ranks; peer += num_threads()) {
    give_back(r, round, peer);
    if (round.out[peer].num_moving != 0) signal_moving(r, round, Verb::combine, peer, num_answers_to(r, round, peer));
    if (is_unfinished(round.in[peer]) || round.out[peer].is_open != 0) atomic_add(&shared.num_unfinished, 1);
  }
  advance(r, round, Phase::combine_wait);
  if (shared.num_unfinished != 0 || round.next_token < round.num_tokens) return;
  expect_nobody(r, round);
  if (thread_idx() == 0 && to.lost != nullptr) *to.lost = round.num_lost > 0 ? 1 : 0;
  close_round(r, round);
}

}  // namespace device
}  // namespace fa2a
