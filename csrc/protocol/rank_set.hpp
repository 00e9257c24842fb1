// A set of ranks, up to 1024 of them, as plain words that a host and a device read alike.
#pragma once

#include "protocol/compiler.hpp"

namespace fa2a {

// Every table by rank is so long, and a view travels whole. The simulator, whose groups are small, asks for less.
#if defined(FA2A_MAX_RANKS)
constexpr i32 kMaxRanks = FA2A_MAX_RANKS;
#else
constexpr i32 kMaxRanks = 1024;
#endif
static_assert(kMaxRanks % 64 == 0, "whole words");

struct RankSet {
  static constexpr i32 kNumWords = kMaxRanks / 64;
  u64 words[kNumWords] = {};

  FA2A_HD static constexpr bool in_range(i32 rank) { return rank >= 0 && rank < kMaxRanks; }

  FA2A_HD constexpr bool has(i32 rank) const { return in_range(rank) && (words[rank / 64] >> (rank % 64) & 1ull) != 0; }
  FA2A_HD constexpr void add(i32 rank) {
    if (in_range(rank)) words[rank / 64] |= 1ull << (rank % 64);
  }
  FA2A_HD constexpr void remove(i32 rank) {
    if (in_range(rank)) words[rank / 64] &= ~(1ull << (rank % 64));
  }

  FA2A_HD constexpr bool empty() const {
    for (i32 i = 0; i < kNumWords; ++i)
      if (words[i] != 0) return false;
    return true;
  }
  FA2A_HD constexpr i32 size() const {
    i32 total = 0;
    for (i32 i = 0; i < kNumWords; ++i)
      for (u64 bits = words[i]; bits != 0; bits &= bits - 1) ++total;
    return total;
  }
  FA2A_HD constexpr i32 lowest() const {  // -1 when empty
    for (i32 rank = 0; rank < kMaxRanks; ++rank)
      if (has(rank)) return rank;
    return -1;
  }

  FA2A_HD static constexpr RankSet first(i32 num_ranks) {
    RankSet all;
    for (i32 rank = 0; rank < num_ranks; ++rank) all.add(rank);
    return all;
  }
  FA2A_HD constexpr RankSet operator&(const RankSet& other) const {
    RankSet out;
    for (i32 i = 0; i < kNumWords; ++i) out.words[i] = words[i] & other.words[i];
    return out;
  }
  FA2A_HD constexpr RankSet operator|(const RankSet& other) const {
    RankSet out;
    for (i32 i = 0; i < kNumWords; ++i) out.words[i] = words[i] | other.words[i];
    return out;
  }
  FA2A_HD constexpr RankSet without(const RankSet& other) const {
    RankSet out;
    for (i32 i = 0; i < kNumWords; ++i) out.words[i] = words[i] & ~other.words[i];
    return out;
  }
  FA2A_HD constexpr bool operator==(const RankSet& other) const {
    for (i32 i = 0; i < kNumWords; ++i)
      if (words[i] != other.words[i]) return false;
    return true;
  }
  FA2A_HD constexpr bool operator!=(const RankSet& other) const { return !(*this == other); }
};

}  // namespace fa2a
