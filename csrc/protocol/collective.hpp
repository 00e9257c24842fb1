// The word of a small collective: which one, and the how-manieth set its writer says; docs/protocol.md, section 11.
#pragma once

#include "protocol/signal.hpp"

namespace fa2a {

constexpr u64 kMaxCollectiveBytes = signal_field::Count::max;

struct CollectiveWord {
  u64 number = 0;
  u64 epoch = 0;
  u64 version = 0;  // of its writer's sets; 0: it has only contributed
  u64 num_bytes = 0;
  bool done = false;      // its writer has returned
  bool changing = false;  // the set behind it is being written
};

FA2A_HD constexpr u64 pack(const CollectiveWord& w) {
  Signal s;
  s.round = w.number;
  s.epoch = w.epoch;
  s.count = w.num_bytes;
  s.chunk = w.version;
  s.last = w.done;
  s.declined = w.changing;
  return pack(s);
}

// Has its writer contributed to this collective? A later number in the word means that its writer goes on without this
// reader, which will learn so from the view: nothing of it can be used.
FA2A_HD constexpr bool has_contributed(u64 word, u64 number) {
  return rounds_ahead(word, number) == 0 && signal_field::Count::unpack(word) != 0;
}

FA2A_HD constexpr bool has_returned(u64 word, u64 number) {
  return rounds_ahead(word, number) > 0 || (has_contributed(word, number) && signal_field::Last::unpack(word) != 0);
}

// Has it said a set, in this epoch, that can be read now?
FA2A_HD bool has_said(u64 word, u64 number, u64 epoch) {
  const bool same_epoch = signal_field::Epoch::unpack(word) == (epoch & signal_field::Epoch::max);
  return has_contributed(word, number) && signal_field::Chunk::unpack(word) != 0 &&
         signal_field::Declined::unpack(word) == 0 && (same_epoch || !guarded(guard_say_epoch));
}

// What a fresh partition holds: the collective before the first, so that both parities read as behind.
FA2A_HD constexpr u64 fresh_collective_word(u64 first_number) { return signal_field::Round::pack(first_number - 1); }

}  // namespace fa2a
