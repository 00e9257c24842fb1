// Reads the clock; nobody else does, so that everything that decides by time can be handed any time by a test.
#include "host/clock.hpp"

#include <time.h>

namespace fa2a {

i64 now_ns() noexcept {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<i64>(now.tv_sec) * 1000000000 + now.tv_nsec;
}

void sleep_ns(i64 duration_ns) noexcept {
  if (duration_ns <= 0) return;
  timespec rest{static_cast<time_t>(duration_ns / 1000000000), static_cast<long>(duration_ns % 1000000000)};
  while (nanosleep(&rest, &rest) != 0) {
  }
}

}  // namespace fa2a
