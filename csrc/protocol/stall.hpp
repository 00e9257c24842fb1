// Has a peer stalled? The clock of a rank that waits for it, on every machine: its progress stands still, and time in
// which the one that waits did not look counts for nothing.
#pragma once

#include "protocol/guards.hpp"
#include "protocol/view.hpp"

namespace fa2a {

// What a waiting rank has last seen of a peer's progress.
struct StallWatch {
  u64 progress;
  i64 since_ns;  // it has not changed, as far as that may be counted
  u64 held_in;   // epoch + 1 of the view in which it was found stalled; 0: it was not
};

FA2A_HD void count_anew(StallWatch& watch, u64 progress, i64 now_ns) { watch = {progress, now_ns, 0}; }

// `looked_ns`: when the one that waits looked last. What came to pass in a longer pause than a quarter of the timeout,
// it cannot tell from its own sleep.
FA2A_HD bool has_stalled(StallWatch& watch, u64 progress, i64 now_ns, i64 looked_ns, i64 timeout_ns,
                         const ViewRing& ring) {
  const bool slept = now_ns - looked_ns > timeout_ns / 4 && guarded(guard_gap_restart);
  if (progress != watch.progress || slept) count_anew(watch, progress, now_ns);
  if (now_ns - watch.since_ns < timeout_ns) return false;
  // Of the newest view and not of the round's: a round may be open long after a view that takes nobody out of it, and
  // what is held in a view that is over is held no more.
  const u64 epoch_plus_one = newest_view(ring).epoch + 1;
  const bool was_taken_back = watch.held_in != 0 && watch.held_in != epoch_plus_one;
  if (was_taken_back && guarded(guard_taken_back)) {
    count_anew(watch, progress, now_ns);
    return false;
  }
  watch.held_in = epoch_plus_one;
  return true;
}

}  // namespace fa2a
