// The 64-bit word that publishes: what it carries, and how a reader who expects one round understands any word it may
// find.
#pragma once

#include "protocol/compiler.hpp"
#include "protocol/guards.hpp"

namespace fa2a {

// One contiguous field of a word. The widths below sum to 64; tests walk each field over its end.
template <u32 Shift, u32 Bits>
struct Field {
  static constexpr u32 shift = Shift;
  static constexpr u32 bits = Bits;
  static constexpr u64 max = (1ull << Bits) - 1;
  FA2A_HD static constexpr u64 pack(u64 value) { return (value & max) << Shift; }
  FA2A_HD static constexpr u64 unpack(u64 word) { return word >> Shift & max; }
};

namespace signal_field {
using Round = Field<40, 24>;
using Epoch = Field<32, 8>;
using Count = Field<13, 19>;
using Chunk = Field<5, 8>;
using Attempt = Field<2, 3>;
using Last = Field<1, 1>;
using Declined = Field<0, 1>;
}  // namespace signal_field

struct Signal {
  u64 round = 0;  // full counters here; the word keeps their low bits
  u64 epoch = 0;
  u64 count = 0;
  u64 chunk = 0;
  u64 attempt = 0;
  bool last = true;
  bool declined = false;
};

FA2A_HD constexpr u64 pack(const Signal& s) {
  return signal_field::Round::pack(s.round) | signal_field::Epoch::pack(s.epoch) | signal_field::Count::pack(s.count) |
         signal_field::Chunk::pack(s.chunk) | signal_field::Attempt::pack(s.attempt) |
         signal_field::Last::pack(s.last) | signal_field::Declined::pack(s.declined);
}

FA2A_HD constexpr Signal unpack(u64 word) {
  Signal s;
  s.round = signal_field::Round::unpack(word);
  s.epoch = signal_field::Epoch::unpack(word);
  s.count = signal_field::Count::unpack(word);
  s.chunk = signal_field::Chunk::unpack(word);
  s.attempt = signal_field::Attempt::unpack(word);
  s.last = signal_field::Last::unpack(word) != 0;
  s.declined = signal_field::Declined::unpack(word) != 0;
  return s;
}

// How many rounds the word is ahead of `round`: serial-number arithmetic on 24 bits. Ranks are never more than two
// rounds apart, so the half-range of 8 million rounds is never in doubt; comparing with `<` would fail once every 16.7
// million.
FA2A_HD constexpr i64 rounds_ahead(u64 word, u64 round) {
  const u64 distance = (signal_field::Round::unpack(word) - round) & signal_field::Round::max;
  const u64 half = 1ull << (signal_field::Round::bits - 1);
  return distance < half ? static_cast<i64>(distance) : static_cast<i64>(distance) - 2 * static_cast<i64>(half);
}

enum class Reading : u32 { absent, present, declined };

// How many chunks the word is ahead of `chunk`, by the same arithmetic: a writer is never more than two chunks ahead of
// its reader, so 8 bits number a stream of any length.
FA2A_HD constexpr i64 chunks_ahead(u64 word, u64 chunk) {
  const u64 distance = (signal_field::Chunk::unpack(word) - chunk) & signal_field::Chunk::max;
  const u64 half = 1ull << (signal_field::Chunk::bits - 1);
  return distance < half ? static_cast<i64>(distance) : static_cast<i64>(distance) - 2 * static_cast<i64>(half);
}

// A reader expects exactly one (round, epoch) and, in a stream, one chunk. An older round is "not yet". A later round
// means the writer has given this one up: comparing for equality instead would leave an overtaken rank waiting for
// ever. The same round signed in another view is never taken: its rows were routed under a membership this reader does
// not use.
FA2A_HD Reading read_signal(u64 word, u64 round, u64 epoch, u64 chunk = 0) {
  const i64 ahead = rounds_ahead(word, round);
  if (ahead < 0 && guarded(guard_round_compare)) return Reading::absent;
  if (ahead > 0) return guarded(guard_later_declined) ? Reading::declined : Reading::absent;
  if (signal_field::Declined::unpack(word) != 0) return Reading::declined;
  if (signal_field::Epoch::unpack(word) != (epoch & signal_field::Epoch::max) && guarded(guard_epoch_compare))
    return Reading::declined;
  // The chunk that stood in this half before is "not yet"; a later one was stored over what I have not read.
  const i64 later = chunks_ahead(word, chunk);
  if (later < 0 && guarded(guard_chunk_compare)) return Reading::absent;
  return later > 0 ? Reading::declined : Reading::present;
}

// A writer reads what its reader has taken of its stream: has it got as far as `chunk`, which frees that chunk's half?
FA2A_HD Reading read_taken(u64 word, u64 round, u64 chunk) {
  const i64 ahead = rounds_ahead(word, round);
  if (ahead < 0) return Reading::absent;
  if (ahead > 0 || signal_field::Declined::unpack(word) != 0) return Reading::declined;
  return chunks_ahead(word, chunk) >= 0 ? Reading::present : Reading::absent;
}

// Consent: the reader's own later word says that it has copied round - 2 out of the slot. Any epoch will do, because
// the slot belongs to one incarnation; a lifted suspicion is no consent.
FA2A_HD bool slot_is_free(u64 reader_word, u64 round) {
  return !guarded(guard_consent) || rounds_ahead(reader_word, round - 2) >= 0;
}

// What a fresh partition holds in the word that round `first_round + parity` will use: a declined round two before, so
// that no word is special and the first round has its consent.
FA2A_HD constexpr u64 fresh_word(u64 first_round, u32 parity) {
  const u64 next = first_round + ((first_round ^ parity) & 1);
  Signal s;
  s.round = next - 2;
  s.declined = true;
  return pack(s);
}

// What only streams store would be as old as the last stream, and read as ahead once that is half the range of rounds
// ago: a stream after an hour of decode steps would be refused, and lost. So its writer stores it anew this often,
// where it may begin a stream; half as often would do, if none ever missed its turn for want of consent.
FA2A_HD constexpr bool freshens(u64 round) { return round % (1ull << 21) < 2; }  // one of each parity

// `progress`: where a rank is, stored at phase changes and, the tick, while it waits.
namespace progress_field {
using Round = Field<40, 24>;
using Phase = Field<32, 8>;
using Tick = Field<0, 32>;
static_assert(Round::shift == signal_field::Round::shift && Round::bits == signal_field::Round::bits,
              "rounds_ahead reads either word");
}  // namespace progress_field

// `caller`: between two calls of a round, in the experts or whatever else its caller does.
// `collective`: in a small collective, whose number stands where the round would.
enum class Phase : u32 {
  idle,
  gate,
  dispatch_send,
  dispatch_wait,
  caller,
  combine_send,
  combine_wait,
  closed,
  collective
};

// To another round or phase. A tick is none, but at the gate, where a rank waits for a view and owes nobody anything.
FA2A_HD constexpr bool has_come_on(u64 progress, u64 since) {
  const u64 phase = progress_field::Phase::unpack(progress);
  return progress_field::Round::unpack(progress) != progress_field::Round::unpack(since) ||
         phase != progress_field::Phase::unpack(since) || (phase == static_cast<u64>(Phase::gate) && progress != since);
}

FA2A_HD constexpr u64 pack_progress(u64 round, Phase phase, u64 tick) {
  return progress_field::Round::pack(round) | progress_field::Phase::pack(static_cast<u64>(phase)) |
         progress_field::Tick::pack(tick);
}

}  // namespace fa2a
