// The words of one rank that its kernels and its own host thread share: on a GPU they live in device memory.
#pragma once

#include "protocol/compiler.hpp"
#include "protocol/control_page.hpp"
#include "protocol/guards.hpp"
#include "protocol/memory.hpp"
#include "protocol/rank_set.hpp"
#include "protocol/view.hpp"

namespace fa2a {

constexpr u64 kNoLimit = ~0ull;

// Why the host ends every wait of this rank. Any bit set ends them.
enum Release : u64 { release_evicted = 1, release_closing = 2, release_quorum_lost = 4 };

struct RankState {
  alignas(kLine) u64 started = 0;             // rounds begun so far; round r is number r + 1
  alignas(kLine) u64 round_limit = kNoLimit;  // rounds from here on wait for a view
  alignas(kLine) RankSet suspects;            // kernels and host OR bits in; only an installed view takes them out
  alignas(kLine) u64 release = 0;
  alignas(kLine) ViewRing ring;
  // Whom this rank waits for now, since when and in which (round, phase): the detector counts time only then.
  alignas(kLine) u64 waiting_since_ns[kMaxRanks] = {};
  alignas(kLine) u64 waiting_peer = 0;  // rank + 1 of the one whose word is being looked at now; 0: nobody's
  u64 waiting_progress = 0;             // packed as a progress word
  // Changeable while the group runs.
  alignas(kLine) u64 silence_ns[kMaxRanks] = {};
  u64 stall_ns[kMaxRanks] = {};
};

FA2A_HD bool is_suspect(const RankState& state, i32 rank) {
  return (load_acquire(&state.suspects.words[rank / 64]) >> (rank % 64) & 1ull) != 0;
}

FA2A_HD void suspect(RankState& state, i32 rank) { fetch_or(&state.suspects.words[rank / 64], 1ull << (rank % 64)); }

FA2A_HD RankSet suspects_of(const RankState& state) {
  RankSet out;
  for (i32 i = 0; i < RankSet::kNumWords; ++i) out.words[i] = load_acquire(&state.suspects.words[i]);
  return out;
}

}  // namespace fa2a
