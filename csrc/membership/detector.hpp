// From samples of a peer's words to evidence against it. Pure: time comes in as a number.
#pragma once

#include <cstddef>
#include <vector>

#include "protocol/control_page.hpp"

namespace fa2a {

// What a watcher can see of one peer at one instant.
struct PeerSample {
  Life life = Life::running;
  bool owner_died = false;  // its death word
  bool has_exited = false;  // its pidfd
  bool readable = true;     // false when the path to its control page is lost: every word then stands still
  u64 process_beat = 0;
  u64 progress = 0;
  u64 sent = 0;  // what it last stored for this rank, of the kind that this rank looks for
};

// What this rank's own kernels say about the peer.
struct OwnWait {
  i64 since_ns = 0;     // 0: nobody waits for it
  bool absent = false;  // a kernel looks at its word this moment, and it is not there
  u64 word = 0;         // which one; see pack_waiting
  u64 progress = 0;     // of this rank itself: it ticks for as long as its kernel really looks
  bool kernel_suspects = false;
};

struct Timeouts {
  i64 silence_ns = 0;
  i64 link_ns = 0;
  i64 stall_ns = 0;
};

// Deadlines measure silence, not lateness: a peer that is late because it waits for somebody dead still beats. With one
// timeout for every stage, whoever waited for the dead rank arrives late at the next stage and is condemned itself.
class Detector {
 public:
  explicit Detector(i32 num_ranks) : peers_(static_cast<size_t>(num_ranks)) {}

  // Before the samples of one look around. A watcher that slept itself restarts its deadlines.
  void look(i64 now_ns);
  // Evidence of a broken link ends with the view: the wait that showed it is over, and nothing tells that it is mended.
  void new_view();
  // Another life of that rank: what was held against the one before does not count.
  void forget(i32 rank) { peers_[static_cast<size_t>(rank)] = Peer(); }
  Evidence judge(i32 peer, const PeerSample& sample, const OwnWait& wait, const Timeouts& timeouts);
  // It beats again, and has had no time to move on: what a kernel holds against it is no evidence yet.
  bool is_waking(i32 peer) const { return peers_[static_cast<size_t>(peer)].woke_ns != 0; }

 private:
  struct Peer {
    u64 beat = 0;
    i64 beat_since_ns = 0;      // when that beat was first seen
    i64 woke_ns = 0;            // when it last beat after a pause that was its own; 0: it has moved on, or never paused
    u64 woke_progress = ~0ull;  // where it stood then
    i64 link_since_ns = 0;      // since when it says it signalled and nothing came; 0: not so
    u64 progress = 0;           // at the last look
    u64 stall_progress = 0;     // where it stood when a kernel of ours suspected it
    Evidence evidence = Evidence::none;
  };
  void hear(Peer& peer, const PeerSample& sample, const Timeouts& timeouts) const;
  Evidence judge_silence(Peer& peer, const OwnWait& wait, const Timeouts& timeouts) const;
  bool looks_no_more(const OwnWait& wait, i64 link_ns);
  Evidence judge_link(Peer& peer, const PeerSample& sample, const OwnWait& wait, const Timeouts& timeouts);
  i64 restarted(i64 timeout_ns) const;

  std::vector<Peer> peers_;
  u64 own_progress_ = 0;
  i64 own_progress_since_ns_ = 0;
  i64 now_ns_ = 0;
  i64 gap_ns_ = 0;
  // Times at which this watcher woke from the longest sleeps: deadlines of a timeout count from the last gap over a
  // quarter of it.
  struct Gap {
    i64 length_ns;
    i64 end_ns;
  };
  std::vector<Gap> gaps_;
};

}  // namespace fa2a
