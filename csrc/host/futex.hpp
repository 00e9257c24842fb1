// Sleeping on a word in shared memory, and waking those who do.
#pragma once

#include "protocol/compiler.hpp"

namespace fa2a {

// Returns when woken, when *word != expected, after timeout_ns, or for no reason; the caller looks again.
void futex_wait(const u32* word, u32 expected, i64 timeout_ns) noexcept;
void futex_wake(const u32* word, i32 num_waiters) noexcept;

struct FutexPair {
  const u32* word;
  u32 expected;
};

// The same on any of several words (Linux 5.16). Returns false when the kernel cannot: the caller then polls.
bool futex_wait_any(const FutexPair* pairs, i32 num_pairs, i64 timeout_ns) noexcept;
constexpr i32 kMaxFutexPairs = 128;

}  // namespace fa2a
