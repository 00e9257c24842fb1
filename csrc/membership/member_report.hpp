// What one rank can read of a member at one instant.
#pragma once

#include "protocol/control_page.hpp"

namespace fa2a {

struct MemberReport {
  bool proven_dead = false;  // exit or left, verified by this rank itself, before it read the rest
  bool accused = false;      // this rank's kernels or watcher hold a suspicion against it
  u64 beat = 0;              // how often it has shown that it lives, as a number that only moves on; 0: cannot be read
  u64 progress = 0;          // where it is in its rounds
  Promise promise;
  StepHold hold;                                     // where it holds for a change; nowhere by default
  const u64* accusations = nullptr;                  // its row of the matrix; nullptr: cannot be read
  const Decision* decision = nullptr;                // the newest view it knows to be decided; nullptr: cannot be read
  const AcceptorRecord<Decision>* votes = nullptr;   // nullptr: cannot be read
  const BallotRequest<Decision>* request = nullptr;  // nullptr: asks for nothing, or cannot be read
};

}  // namespace fa2a
