// The stores into a peer's window that are still under way, and where each of them lands.
#pragma once

#include <vector>

#include "protocol/control_page.hpp"
#include "protocol/layout.hpp"
#include "tests/simulator/scheduler.hpp"

namespace fa2a::sim {

struct Delays {
  i64 most_ns = 0;        // of a store that is under way
  bool reorders = false;  // rows of one signal come in any order, and in parts
};

// One piece of a store, or the word that publishes what was stored before it.
struct UnderWay {
  i64 at = 0;
  u8* to = nullptr;
  u64 num_bytes = 0;
  u8 bytes[16] = {};
  bool is_word = false;
};

// The way from one life into one other's window. A word comes after everything that was stored before it, as transports
// promise; rows are bound by nothing else, except that one place takes them in their order.
struct Link {
  std::vector<UnderWay> stores;  // by time
  size_t next = 0;
  i64 newest_at = 0;        // nothing that was stored so far comes later
  i64 loses_from = kNever;  // everything stored from then on is lost
  bool corrupts = false;    // rows come from another life of the writer
};

class Links {
 public:
  Links(i32 num_lives, const Delays& delays, const Shape& shape)
      : n_(num_lives),
        links_(static_cast<size_t>(num_lives) * static_cast<size_t>(num_lives)),
        incarnations_(static_cast<size_t>(num_lives), 0),
        delays_(delays),
        at_(partition_layout(shape)) {}

  void is_called(i32 life, u64 incarnation) { incarnations_[static_cast<size_t>(life)] = incarnation; }
  // True: it is a store of the running strand into a peer's window, and is under way now.
  bool take(void* to, const void* from, u64 num_bytes, bool is_word);
  i64 next_at() const;
  // Lands the next store. Returns the life whose doorbell to ring, or -1: nobody is rung for rows, nor for a peer's
  // progress.
  i32 land();
  Link& link(i32 writer, i32 owner) { return links_[static_cast<size_t>(writer * n_ + owner)]; }
  // A writer is gone: what it has under way lands late, or is lost from some point on.
  void writer_died(i32 writer, i64 most_late_ns, bool keeps_all);
  const char* wrong = nullptr;
  u64 num_landed = 0;

 private:
  void add(Link& link, UnderWay store);
  void check_writer(const Link& link, i32 writer, const u8* to);

  i32 n_;
  std::vector<Link> links_;
  std::vector<u64> incarnations_;
  Delays delays_;
  PartitionLayout at_;
};
extern Links* links;

// A watcher that sees what is not there. Whatever it takes back of its row of accusations, it says again, and itself
// believes it: somebody who wrote over its page from outside would have it propose what nobody sees.
struct SickWatcher {
  u64* row = nullptr;
  i32 num_ranks = 0;
  const ViewRing* ring = nullptr;
};
extern SickWatcher sick_watcher;

}  // namespace fa2a::sim
