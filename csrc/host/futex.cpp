// The futex system calls. All words are in memory that several processes map, so none of the calls is FUTEX_PRIVATE.
#include "host/futex.hpp"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "host/clock.hpp"

namespace fa2a {

namespace {

// linux/futex.h of an older distribution may lack futex_waitv; the numbers are part of the kernel's ABI.
struct WaitvEntry {
  u64 expected;
  u64 address;
  u32 flags;
  u32 reserved;
};
constexpr u32 kFutex32 = 2;
constexpr long kSysFutexWaitv = 449;

timespec to_timespec(i64 duration_ns) {
  return {static_cast<time_t>(duration_ns / 1000000000), static_cast<long>(duration_ns % 1000000000)};
}

}  // namespace

void futex_wait(const u32* word, u32 expected, i64 timeout_ns) noexcept {
  const timespec timeout = to_timespec(timeout_ns > 0 ? timeout_ns : 1);
  syscall(SYS_futex, word, FUTEX_WAIT, expected, &timeout, nullptr, 0);
}

void futex_wake(const u32* word, i32 num_waiters) noexcept {
  syscall(SYS_futex, word, FUTEX_WAKE, num_waiters, nullptr, nullptr, 0);
}

bool futex_wait_any(const FutexPair* pairs, i32 num_pairs, i64 timeout_ns) noexcept {
  if (num_pairs > kMaxFutexPairs) return false;
  WaitvEntry entries[kMaxFutexPairs];
  for (i32 i = 0; i < num_pairs; ++i)
    entries[i] = {pairs[i].expected, reinterpret_cast<u64>(pairs[i].word), kFutex32, 0};
  const timespec deadline = to_timespec(now_ns() + (timeout_ns > 0 ? timeout_ns : 1));
  const long woken = syscall(kSysFutexWaitv, entries, num_pairs, 0, &deadline, CLOCK_MONOTONIC);
  return woken >= 0 || (errno != ENOSYS && errno != EPERM && errno != EINVAL);
}

}  // namespace fa2a
