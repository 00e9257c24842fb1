// The only clock of the library: CLOCK_MONOTONIC in nanoseconds, which all processes of a host share.
#pragma once

#include "protocol/compiler.hpp"

namespace fa2a {

constexpr i64 kNsPerMs = 1000000;
constexpr i64 kNsPerUs = 1000;

i64 now_ns() noexcept;
void sleep_ns(i64 duration_ns) noexcept;

}  // namespace fa2a
