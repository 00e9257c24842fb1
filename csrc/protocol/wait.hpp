// The one wait. Everything that can fail in the world looks the same here: my own word did not change in time.
#pragma once

#include "protocol/compiler.hpp"
#include "protocol/guards.hpp"
#include "protocol/rank_state.hpp"
#include "protocol/signal.hpp"

namespace fa2a {

enum class Waited : u32 { present, declined, suspect, released };

constexpr i32 kNobody = -1;

// `poll` returns a Reading of local memory. `machine` knows how this chip rests between polls:
//   begin(peer), end(peer)   marks that this rank now waits for peer (time counts against it only then)
//   rest()                   spins, yields or parks; ticks this rank's progress; judges a stall by its own clock
// The word is read before the suspicion and once more after it: a signal that arrived whole is worth taking from
// anybody. Inside a round a lost quorum ends no wait: the peers there are alive and answer, and suspects end their own.
template <class Machine, class Poll>
FA2A_HD Waited wait_for(Machine& machine, RankState& state, i32 peer, Poll poll) {
  const u64 ends_wait = peer == kNobody ? ~0ull : static_cast<u64>(release_evicted | release_closing);
  Reading reading = poll();
  if (reading == Reading::absent) {
    machine.begin(peer);
    while ((reading = poll()) == Reading::absent) {
      if ((load_acquire(&state.release) & ends_wait) != 0 && guarded(guard_release_word)) {
        machine.end(peer);
        return Waited::released;
      }
      if (peer != kNobody && is_suspect(state, peer)) {
        reading = poll();
        machine.end(peer);
        return reading == Reading::present    ? Waited::present
               : reading == Reading::declined ? Waited::declined
                                              : Waited::suspect;
      }
      machine.rest(peer);
    }
    machine.end(peer);
  }
  return reading == Reading::present ? Waited::present : Waited::declined;
}

}  // namespace fa2a
