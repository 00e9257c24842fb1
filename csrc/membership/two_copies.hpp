// How a record of the control page is published and read, so that nobody ever sees half of one.
#pragma once

#include <stddef.h>

#include "protocol/control_page.hpp"
#include "protocol/guards.hpp"
#include "protocol/memory.hpp"

namespace fa2a {

// Word by word: readers may look at any time, and a reader that lags two versions behind reads what is being written.
template <class Record>
void copy_words_out(Record& shared, const Record& record) {
  static_assert(sizeof(Record) % sizeof(u64) == 0, "copied in words");
  auto* to = reinterpret_cast<u64*>(&shared);
  const auto* from = reinterpret_cast<const u64*>(&record);
  for (size_t i = 0; i < sizeof(Record) / sizeof(u64); ++i) store_relaxed(to + i, from[i]);
}

// The two halves of a publication; its writer may die between them. Explored one by one in tests/native/ballots.cpp.
template <class Record>
void publish_half(TwoCopies<Record>& shared, const Record& record, bool second) {
  const u64 version = load_relaxed(&shared.version);
  if (second != guarded(guard_record_before_answer)) {
    // With the guard: the copy that nobody is to read, first. Without: the copy that counts already, second.
    // The fence keeps the word of the version before ahead of these stores; who reads one of them sees that word too.
    full_fence();
    copy_words_out(shared.copies[(version + (second ? 0 : 1)) % 2], record);
  } else {
    store_release(&shared.version, version + 1);
  }
}

template <class Record>
void publish(TwoCopies<Record>& shared, const Record& record) {
  publish_half(shared, record, false);
  publish_half(shared, record, true);
}

// False: nothing published yet, or it moved under us every time; the caller keeps what it had and looks again next
// turn. `seen` is the version that `out` holds.
template <class Record>
bool read_newest(const TwoCopies<Record>& shared, Record& out, u64& seen) {
  for (i32 attempt = 0; attempt < 4; ++attempt) {
    const u64 version = load_acquire(&shared.version);
    if (version == 0) return false;
    const auto* from = reinterpret_cast<const u64*>(&shared.copies[version % 2]);
    auto* to = reinterpret_cast<u64*>(&out);
    for (size_t i = 0; i < sizeof(Record) / sizeof(u64); ++i) to[i] = load_relaxed(from + i);
    full_fence();
    if (load_acquire(&shared.version) != version) continue;
    seen = version;
    return true;
  }
  return false;
}

}  // namespace fa2a
