// The death word: a robust-futex entry by which the kernel itself announces, within microseconds, that a thread is
// gone.
#pragma once

#include "protocol/compiler.hpp"

namespace fa2a {

// Held by one thread for as long as the process serves. The holder must block all signals and never return by itself:
// the word says that its holder *thread* is gone, and only these conditions make that mean the process.
class DeathWordHolder {
 public:
  // Called in the holder thread. False: the kernel refused the list, and `exit` evidence rests on pidfd alone.
  bool hold(u32* word) noexcept;
  // Called in the holder thread after `left` was published, so that a planned leave does not look like a death.
  void let_go() noexcept;

 private:
  struct Entry {
    Entry* next;
  };
  struct List {
    Entry* first;
    long word_offset;
    Entry* pending;
  };
  List list_{};
  Entry entry_{};
  List* previous_ = nullptr;
  u64 previous_bytes_ = 0;
  u32* word_ = nullptr;
};

constexpr u32 kOwnerDied = 0x40000000u;

bool owner_died(const u32* word) noexcept;

}  // namespace fa2a
