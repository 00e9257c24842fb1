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

// A word that is waited for: its round and chunk as in a signal, and its kind where an attempt would stand.
FA2A_HD constexpr u64 pack_waiting(WordKind kind, u64 round, u64 chunk) {
  return signal_field::Round::pack(round) | signal_field::Chunk::pack(chunk) |
         signal_field::Attempt::pack(static_cast<u64>(kind));
}

// Has the writer stored the word that is waited for, or a later one?
FA2A_HD constexpr bool was_sent(u64 sent, u64 waiting) {
  const bool is_done = signal_field::Attempt::unpack(waiting) == static_cast<u64>(WordKind::collective) &&
                       signal_field::Last::unpack(sent) != 0;
  const i64 ahead = rounds_ahead(sent, signal_field::Round::unpack(waiting));
  return ahead > 0 || (ahead == 0 && is_done) ||
         (ahead == 0 && chunks_ahead(sent, signal_field::Chunk::unpack(waiting)) >= 0);
}

// Whom a rank waits for now, since when and at which word it looks: the detector counts time only then.
struct Waiting {
  alignas(kLine) u64 since_ns[kMaxRanks] = {};
  alignas(kLine) u64 peer = 0;  // rank + 1 of the one whose word is being looked at now; 0: nobody's
  u64 word = 0;                 // which word that is; see pack_waiting
};

struct RankState {
  alignas(kPage) u64 started = 0;  // rounds begun so far; round r is number r + 1. Whole pages: see Gpu::share
  alignas(kLine) u64 round_limit = kNoLimit;  // rounds from here on wait for a view
  alignas(kLine) RankSet suspects;            // kernels and host OR bits in; only an installed view takes them out
  alignas(kLine) u64 release = 0;
  alignas(kLine) ViewRing ring;
  // Two sets, because a graph's rounds run on while the host is in a collective: in one that both used, whoever ended
  // its wait for a peer first would stop the clock for the other, which then waited for a silent peer without end.
  Waiting waiting_in_round;
  Waiting waiting_in_collective;
  // epoch + 1 of the view in which a kernel on a GPU found this peer stalled: plain stores, because a chip's atomics
  // and the host's do not see each other over every bus, and one of two bits in a word of `suspects` would be lost.
  alignas(kLine) u64 stalled_in[kMaxRanks] = {};
  // Changeable while the group runs.
  alignas(kLine) u64 silence_ns[kMaxRanks] = {};
  u64 stall_ns[kMaxRanks] = {};
};

FA2A_HD bool is_suspect(const RankState& state, i32 rank) {
  if (!kWatched) return false;
  return (load_acquire(&state.suspects.words[rank / 64]) >> (rank % 64) & 1ull) != 0;
}

// Without a quorum: no view comes, and its rounds wait at the gate.
FA2A_HD bool is_suspended(const RankState& state) { return (load_acquire(&state.release) & release_quorum_lost) != 0; }

FA2A_HD void suspect(RankState& state, i32 rank) { fetch_or(&state.suspects.words[rank / 64], 1ull << (rank % 64)); }

FA2A_HD RankSet suspects_of(const RankState& state) {
  RankSet out;
  for (i32 i = 0; i < RankSet::kNumWords; ++i) out.words[i] = load_acquire(&state.suspects.words[i]);
  return out;
}

}  // namespace fa2a
