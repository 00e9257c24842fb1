// Stores and loads of a stream's words.
#include "kernels/cpu/stream.hpp"

namespace fa2a {

namespace {

u64 stream_word(const OpenRound& open, i32 chunk, u64 count, bool last, bool declined) {
  Signal s;
  s.round = open.round;
  s.epoch = open.epoch;
  s.count = count;
  s.chunk = static_cast<u64>(chunk);
  s.last = last;
  s.declined = declined;
  return pack(s);
}

void put_signal(Context& c, const OpenRound& open, Verb verb, i32 dst, i32 chunk, u64 value) {
  const u32 parity = open.round % kNumParities;
  const u64 offset = c.at.signal[static_cast<u32>(verb)][parity][half_of(c, chunk)];
  c.wire->put_signal(dst, Context::word(c.fabric->outbound(dst), offset), value, verb == Verb::combine);
  SentWords& sent = c.fabric->page(c.rank).sent[dst];
  store_release(&sent.words[static_cast<u32>(signal_kind(verb))][parity], value);
}

void put_taken(Context& c, const OpenRound& open, Verb verb, i32 src, u64 value) {
  const u32 parity = open.round % kNumParities;
  c.wire->put_taken(src, Context::word(c.fabric->outbound(src), c.at.taken[static_cast<u32>(verb)][parity]), value);
  SentWords& sent = c.fabric->page(c.rank).sent[src];
  store_release(&sent.words[static_cast<u32>(taken_kind(verb))][parity], value);
}

}  // namespace

u64 load_signal(const Context& c, const OpenRound& open, Verb verb, i32 src, i32 chunk) {
  const u64 offset = c.at.signal[static_cast<u32>(verb)][open.round % kNumParities][half_of(c, chunk)];
  return load_acquire(Context::word(c.inbound(open, src), offset));
}

// A partition that belongs to another incarnation than the view names is never read.
Reading read_chunk(const Context& c, const OpenRound& open, Verb verb, i32 src, i32 chunk) {
  if (!open.trusted.has(src)) return Reading::declined;
  return read_signal(load_signal(c, open, verb, src, chunk), open.round, open.epoch, static_cast<u64>(chunk));
}

// Whoever may get a stream of this round has done with mine of two rounds ago, and I with its.
void freshen_words(Context& c, const OpenRound& open, Verb verb, i32 dst) {
  if (c.at.num_halves == 1 || !freshens(open.round) || !guarded(guard_fresh_words)) return;
  const u64 value = fresh_word(open.round, static_cast<u32>(open.round % kNumParities));
  put_taken(c, open, verb, dst, value);
  put_signal(c, open, verb, dst, 1, value);
}

void signal_chunk(Context& c, const OpenRound& open, Verb verb, i32 dst, i32 chunk, u64 count, bool last) {
  c.wire->at(verb == Verb::dispatch ? Point::dispatch_chunk : Point::combine_chunk, open.round);
  put_signal(c, open, verb, dst, chunk, stream_word(open, chunk, count, last, /*declined=*/false));
}

void decline(Context& c, const OpenRound& open, Verb verb, i32 dst, i32 chunk) {
  put_signal(c, open, verb, dst, chunk, stream_word(open, chunk, 0, /*last=*/true, /*declined=*/true));
}

void stop_streams(Context& c, OpenRound& open, Verb verb) {
  for (i32 peer = 0; peer < c.shape.num_ranks; ++peer) {
    OutStream& out = open.out[static_cast<size_t>(peer)];
    if (out.open) decline(c, open, verb, peer, out.next_chunk);
    out.open = false;
  }
}

void tell_taken(Context& c, const OpenRound& open, Verb verb, i32 src, i32 chunk) {
  put_taken(c, open, verb, src, stream_word(open, chunk, 0, /*last=*/false, /*declined=*/false));
}

void refuse(Context& c, const OpenRound& open, Verb verb, i32 src, i32 chunk) {
  put_taken(c, open, verb, src, stream_word(open, chunk, 0, /*last=*/true, /*declined=*/true));
}

// Chunk n goes where chunk n - num_halves stood, so that one must have been taken.
Reading read_room(const Context& c, const OpenRound& open, Verb verb, i32 dst, i32 chunk) {
  if (!guarded(guard_chunk_consent) || c.wire->ignores_consent()) return Reading::present;
  if (!open.trusted.has(dst)) return Reading::declined;
  const u64 offset = c.at.taken[static_cast<u32>(verb)][open.round % kNumParities];
  const u64 word = load_acquire(Context::word(c.inbound(open, dst), offset));
  return read_taken(word, open.round, static_cast<u64>(chunk - c.at.num_halves));
}

}  // namespace fa2a
