// The words of a stream as a GPU stores and reads them, and the wait in which all peers' streams are looked at
// together.
#pragma once

#include "kernels/cuda/machine.cuh"

namespace fa2a {
namespace device {

// Chunks that `num_rows` make; an empty stream is one empty chunk.
FA2A_DEVICE i32 num_chunks_of(i32 num_rows, i32 rows_of_chunk) {
  return num_rows <= rows_of_chunk ? 1 : (num_rows + rows_of_chunk - 1) / rows_of_chunk;
}

FA2A_DEVICE i32 rows_of_chunk(const DeviceRank& r, Verb verb) {
  return verb == Verb::dispatch ? r.at.num_dispatch_rows : r.at.num_combine_rows;
}

FA2A_DEVICE bool is_unfinished(const StreamIn& in) { return in.flow == Flow::silent || in.flow == Flow::flowing; }

FA2A_DEVICE u64* signal_at(const DeviceRank& r, const DeviceRound& round, u8* partition, Verb verb, i32 chunk) {
  const u32 half = static_cast<u32>(chunk) % kNumHalves;
  return word_at(partition, r.at.signal[static_cast<u32>(verb)][parity_of(round)][half]);
}

FA2A_DEVICE u64 load_chunk(const DeviceRank& r, const DeviceRound& round, Verb verb, i32 src, i32 chunk) {
  return load_acquire(signal_at(r, round, inbound(r, round, src), verb, chunk));
}

// What the word of `src` says of its chunk. A partition that belongs to another incarnation is never read.
FA2A_DEVICE Reading read_chunk(const DeviceRank& r, const DeviceRound& round, Verb verb, i32 src, i32 chunk) {
  if (!round.trusted.has(src)) return Reading::declined;
  return read_signal(load_chunk(r, round, verb, src, chunk), round.round, round.epoch, static_cast<u64>(chunk));
}

// A source that declines, or is suspected and has nothing there, is out. In this order: a signal that arrived whole
// before the suspicion is worth having from anybody.
FA2A_DEVICE Reading read_or_give_up(const DeviceRank& r, const DeviceRound& round, Verb verb, i32 src) {
  const bool suspected = is_suspect(*r.state, src);
  const Reading reading = read_chunk(r, round, verb, src, round.in[src].next_chunk);
  return reading == Reading::absent && suspected ? Reading::declined : reading;
}

// Has the reader made room for my next chunk? It goes where the chunk two before it stood, so that one must have been
// taken.
FA2A_DEVICE Reading read_room(const DeviceRank& r, const DeviceRound& round, Verb verb, i32 dst) {
  if (!guarded(guard_chunk_consent) || ignores_consent(r.host)) return Reading::present;
  if (!round.trusted.has(dst)) return Reading::declined;
  const u64 offset = r.at.taken[static_cast<u32>(verb)][parity_of(round)];
  const u64 word = load_acquire(word_at(inbound(r, round, dst), offset));
  return read_taken(word, round.round, static_cast<u64>(round.out[dst].next_chunk) - kNumHalves);
}

FA2A_DEVICE u64 stream_word(const DeviceRound& round, i32 chunk, u64 count, bool last, bool declined) {
  Signal s;
  s.round = round.round;
  s.epoch = round.epoch;
  s.count = count;
  s.chunk = static_cast<u64>(chunk);
  s.last = last;
  s.declined = declined;
  return pack(s);
}

FA2A_DEVICE void put_chunk_word(DeviceRank& r, const DeviceRound& round, Verb verb, i32 dst, i32 chunk, u64 value) {
  put_signal(r.host, dst, signal_at(r, round, r.outbound[dst], verb, chunk), value, verb == Verb::combine);
  remember_sent(r, round, signal_kind(verb), dst, value);
}

FA2A_DEVICE void put_taken_word(DeviceRank& r, const DeviceRound& round, Verb verb, i32 src, u64 value) {
  put_taken(r.host, src, word_at(r.outbound[src], r.at.taken[static_cast<u32>(verb)][parity_of(round)]), value);
  remember_sent(r, round, taken_kind(verb), src, value);
}

// Tells `src` that its chunk may be overwritten.
FA2A_DEVICE void tell_taken(DeviceRank& r, const DeviceRound& round, Verb verb, i32 src, i32 chunk) {
  put_taken_word(r, round, verb, src, stream_word(round, chunk, 0, /*last=*/false, /*declined=*/false));
}

// Tells `src` that I read no more of its stream, so that it waits for no word of mine.
FA2A_DEVICE void refuse_rest(DeviceRank& r, const DeviceRound& round, Verb verb, i32 src) {
  const i32 chunk = round.in[src].next_chunk;
  put_taken_word(r, round, verb, src, stream_word(round, chunk, 0, /*last=*/true, /*declined=*/true));
}

// Tells `dst` that nothing more of my stream is coming, where the signal of the next chunk would stand.
FA2A_DEVICE void decline_rest(DeviceRank& r, DeviceRound& round, Verb verb, i32 dst) {
  const i32 chunk = round.out[dst].next_chunk;
  put_chunk_word(r, round, verb, dst, chunk, stream_word(round, chunk, 0, /*last=*/true, /*declined=*/true));
  round.out[dst].is_open = 0;
}

// By the block; a barrier before and after is the caller's.
FA2A_DEVICE void stop_streams(DeviceRank& r, DeviceRound& round, Verb verb) {
  for (i32 dst = thread_idx(); dst < r.shape.num_ranks; dst += num_threads())
    if (round.out[dst].is_open != 0) decline_rest(r, round, verb, dst);
}

// Rows from `first` to `end` of `dst`'s stream are those that the kernel after this one stores.
FA2A_DEVICE i32 first_moving(const DeviceRank& r, const StreamOut& out, Verb verb) {
  return out.next_chunk * rows_of_chunk(r, verb);
}
FA2A_DEVICE i32 end_moving(const DeviceRank& r, const StreamOut& out, Verb verb, i32 num_rows) {
  const i32 end = (out.next_chunk + out.num_moving) * rows_of_chunk(r, verb);
  return end < num_rows ? end : num_rows;
}

// My stream to `dst` of `num_rows` rows; its first chunks go without asking. 0 chunks: it is declined.
FA2A_DEVICE void open_stream(StreamOut& out, i32 num_chunks) {
  const i32 most = static_cast<i32>(kNumHalves);
  out = {num_chunks, 0, num_chunks < most ? num_chunks : most, 0};
}

// Signals the chunks to `dst` whose rows are stored; `num_rows` is the length of the whole stream.
FA2A_DEVICE void signal_moving(DeviceRank& r, DeviceRound& round, Verb verb, i32 dst, i32 num_rows) {
  StreamOut& out = round.out[dst];
  for (; out.num_moving > 0; --out.num_moving, ++out.next_chunk) {
    const i32 left = num_rows - first_moving(r, out, verb), most = rows_of_chunk(r, verb);
    point(r.host, verb == Verb::dispatch ? Point::dispatch_chunk : Point::combine_chunk, round.round);
    const u64 value = stream_word(round, out.next_chunk, static_cast<u64>(left < most ? left : most),
                                  /*last=*/out.next_chunk + 1 == out.num_chunks, /*declined=*/false);
    put_chunk_word(r, round, verb, dst, out.next_chunk, value);
  }
  out.is_open = out.next_chunk < out.num_chunks ? 1 : 0;
}

// Whoever may get a stream of this round has done with mine of two rounds ago, and I with its.
FA2A_DEVICE void freshen_words(DeviceRank& r, const DeviceRound& round, Verb verb, i32 dst) {
  if (!freshens(round.round) || !guarded(guard_fresh_words)) return;
  const u64 value = fresh_word(round.round, parity_of(round));
  put_taken_word(r, round, verb, dst, value);
  put_chunk_word(r, round, verb, dst, 1, value);
}

// Tells every active peer of the first chunks, as tell_peers does; not by it, since a thread that has all of this to do
// in there takes ten more registers on sm_100a.
template <class NumRows>
FA2A_DEVICE void signal_first_chunks(DeviceRank& r, DeviceRound& round, Verb verb, Point half_signalled,
                                     NumRows num_rows) {
  const i32 n = r.shape.num_ranks;
  for (i32 half = 0; half < 2; ++half) {
    const i32 first = half == 0 ? 1 : n / 2 + 1, last = half == 0 ? n / 2 : n;
    if (half == 1 && thread_idx() == 0) point(r.host, half_signalled, round.round);
    sync_block();
    for (i32 step = first + thread_idx(); step <= last; step += num_threads()) {
      const i32 dst = (r.rank + step) % n;
      const bool owed = round.active.has(dst) && (verb == Verb::dispatch || guarded(guard_one_answer));
      if (round.out[dst].num_chunks == 0 && owed) decline_rest(r, round, verb, dst);
      if (round.out[dst].num_chunks == 0) continue;
      freshen_words(r, round, verb, dst);
      signal_moving(r, round, verb, dst, num_rows(dst));
    }
    sync_block();
  }
}

// Finds the peers whose readers have made room, and gives up those who will not. By the block; true in the threads that
// have found one.
FA2A_DEVICE bool look_for_room(DeviceRank& r, DeviceRound& round, Verb verb) {
  bool is_moving = false;
  for (i32 dst = thread_idx(); dst < r.shape.num_ranks; dst += num_threads()) {
    StreamOut& out = round.out[dst];
    if (out.is_open == 0) continue;
    const Reading room = read_room(r, round, verb, dst);
    if (room == Reading::declined || is_suspect(*r.state, dst))
      decline_rest(r, round, verb, dst);
    else if (room == Reading::present)
      out.num_moving = 1, is_moving = true;
  }
  return is_moving;
}

FA2A_DEVICE void end_stream(DeviceRank& r, DeviceRound& round, Verb verb, i32 src, Flow flow, i32 row_bytes) {
  StreamIn& in = round.in[src];
  in.flow = flow;
  add_to(r.sources[src].num_rows, static_cast<u64>(in.num_rows));
  add_to(r.sources[src].num_bytes, static_cast<u64>(in.num_rows) * static_cast<u64>(row_bytes));
  if (flow != Flow::out) return;
  add_to(r.sources[src].num_failures, 1);
  refuse_rest(r, round, verb, src);
}

// Shows that work goes on, inside a phase that may last. By the block.
FA2A_DEVICE void advance(DeviceRank& r, const DeviceRound& round, Phase phase) {
  if (thread_idx() == 0) add_to(r.progress_tick, 1);
  sync_block();
  enter(r, round.round, phase);
}

// `awaits_signal(peer)`: its next chunk is wanted, and may come without anything more from here.
template <class AwaitsSignal>
struct StreamWords {
  DeviceRank& r;
  DeviceRound& round;
  Verb verb;
  AwaitsSignal awaits_signal;

  FA2A_DEVICE bool awaits(i32 peer) const { return awaits_signal(peer) || round.out[peer].is_open != 0; }
  FA2A_DEVICE bool can_move(i32 peer) const {
    if (!awaits(peer)) return false;
    if (is_suspect(*r.state, peer)) return true;
    if (awaits_signal(peer) && read_chunk(r, round, verb, peer, round.in[peer].next_chunk) != Reading::absent)
      return true;
    return round.out[peer].is_open != 0 && read_room(r, round, verb, peer) != Reading::absent;
  }
  FA2A_DEVICE i32 first_awaited() const {
    for (i32 peer = thread_idx(); peer < r.shape.num_ranks; peer += num_threads())
      if (awaits(peer)) return peer;
    return kNobody;
  }
  FA2A_DEVICE WordKind kind(i32 peer) const { return awaits_signal(peer) ? signal_kind(verb) : taken_kind(verb); }
  FA2A_DEVICE i32 chunk(i32 peer) const {
    return awaits_signal(peer) ? round.in[peer].next_chunk : round.out[peer].next_chunk - static_cast<i32>(kNumHalves);
  }
};

// How a thread rests while it looks for any word of its peers. Time counts against each of them from the moment on
// which its word is missing until it is there, over all launches of the half: what is kept of that stands in device
// memory.
template <class Words>
class StreamMachine : public DeviceMachine {
 public:
  FA2A_DEVICE StreamMachine(const Words& words, Phase phase)
      : DeviceMachine(words.r, words.round.round, phase, WordKind::dispatch_signal), words_(words) {}

  FA2A_DEVICE void begin(i32 peer) {
    began_ns_ = clock_ns();
    kind_ = words_.kind(peer);
    chunk_ = words_.chunk(peer);
  }

  FA2A_DEVICE void end(i32 peer) {
    if (looked_from_ns_ == 0) return;
    add_to(r_.sources[peer].wait_ns, static_cast<u64>(clock_ns() - looked_from_ns_));
    store_relaxed(&r_.state->waiting_in_round.peer, 0);
    store_release(&r_.looking, 0);
  }

  FA2A_DEVICE void rest(i32 peer) {
    pause();
    const i64 now = clock_ns();
    show_word_of(peer, now);
    for (i32 other = peer; other < r_.shape.num_ranks; other += num_threads())
      if (words_.awaits(other)) judge(other, now);
    tick(now);
  }

  FA2A_DEVICE void expect(i32 peer) {
    const i64 now = clock_ns();
    store_relaxed(&r_.state->waiting_in_round.since_ns[peer], static_cast<u64>(now));
    words_.round.seen[peer] = {{progress_of(peer), now, 0}, now, now};
  }

 private:
  FA2A_DEVICE void judge(i32 peer, i64 now) {
    SeenProgress& seen = words_.round.seen[peer];
    judge_stall(peer, now, seen.looked_ns, seen.watch);
    seen.looked_ns = now;
  }

  const Words& words_;
};

FA2A_DEVICE void expect_no_more(DeviceRank& r, const DeviceRound& round, i32 peer) {
  store_relaxed(&r.state->waiting_in_round.since_ns[peer], 0);
  SourceStats& stats = r.sources[peer];
  const u64 late_ns = static_cast<u64>(clock_ns() - round.seen[peer].began_ns);
  add_to(stats.late_ns, late_ns);
  if (late_ns > load_relaxed(&stats.max_late_ns)) store_relaxed(&stats.max_late_ns, late_ns);
}

// Every stream of the half has ended. By the block.
FA2A_DEVICE void expect_nobody(DeviceRank& r, const DeviceRound& round) {
  for (i32 peer = thread_idx(); peer < r.shape.num_ranks; peer += num_threads())
    if (load_relaxed(&r.state->waiting_in_round.since_ns[peer]) != 0) expect_no_more(r, round, peer);
}

// Time counts against those who are awaited, and no longer against those who are not. By the block.
template <class Words>
FA2A_DEVICE void note_awaited(const Words& words, Phase phase) {
  for (i32 peer = thread_idx(); peer < words.r.shape.num_ranks; peer += num_threads()) {
    const bool awaited = words.awaits(peer);
    if (awaited == (load_relaxed(&words.r.state->waiting_in_round.since_ns[peer]) != 0)) continue;
    if (awaited)
      StreamMachine<Words>(words, phase).expect(peer);
    else
      expect_no_more(words.r, words.round, peer);
  }
}

struct WaitShared {
  u32 is_found;
  u32 is_released;
};

// Waits until something can move: a thread looks for its peers, and whoever finds something ends the wait of all. A
// thread that waited for one peer's word alone would be the wait that streams must not have: A for B, B for C, C for A,
// while each could have served the next. By the block; false: the host released this rank.
template <class Words>
FA2A_DEVICE bool wait_for_any(const Words& words, Phase phase, WaitShared& shared) {
  if (thread_idx() == 0) shared.is_found = shared.is_released = 0;
  note_awaited(words, phase);
  sync_block();
  const i32 first = words.first_awaited();
  if (first != kNobody) {
    StreamMachine<Words> machine(words, phase);
    const Waited waited = wait_for(machine, *words.r.state, first, [&] {
      return look_often([&] {
        if (atomic_or(&shared.is_found, 0) != 0) return Reading::present;
        for (i32 peer = first; peer < words.r.shape.num_ranks; peer += num_threads())
          if (words.can_move(peer)) return Reading::present;
        return Reading::absent;
      });
    });
    if (waited == Waited::released) atomic_or(&shared.is_released, 1);
    atomic_or(&shared.is_found, 1);
  }
  sync_block();
  return shared.is_released == 0;
}

}  // namespace device
}  // namespace fa2a
