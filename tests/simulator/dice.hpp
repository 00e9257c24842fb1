// The one source of chance of a schedule: a seed says all.
#pragma once

#include "protocol/compiler.hpp"

namespace fa2a::sim {

// splitmix64, public domain, Sebastiano Vigna. Not <random>: what its distributions draw differs between libraries, and
// a seed would mean another schedule elsewhere.
class Dice {
 public:
  explicit Dice(u64 seed) : state_(seed) {}
  u64 next() {
    u64 z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  // From 0 to limit - 1; 0 when there is no limit to speak of.
  u64 below(u64 limit) { return limit == 0 ? 0 : next() % limit; }
  i64 between(i64 low, i64 high) { return low + static_cast<i64>(below(static_cast<u64>(high - low + 1))); }
  bool one_in(u64 number) { return below(number) == 0; }
  // Mostly short, sometimes nearly as long as `most`: half of all draws are below an eighth of it.
  i64 heavy(i64 most) { return static_cast<i64>(below(static_cast<u64>(most) + 1)) >> (below(4) == 0 ? 0 : 3); }

 private:
  u64 state_;
};

}  // namespace fa2a::sim
