// Windows in GPU memory: one memory object per (owner, writer), each at an address that never changes, so that what
// lies there can be swapped under captured graphs. Not run on a GPU.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "protocol/guards.hpp"
#include "protocol/rank_set.hpp"
#include "transport/cuda_driver.hpp"

namespace fa2a {
namespace cuda {

// Physical memory, made here or imported. It lives as long as anybody maps it, in whatever process.
class Memory {
 public:
  static Memory create(const Driver& driver, int device, HandleType type, u64 num_bytes);
  // `fd` stays the caller's.
  static Memory import_file_descriptor(const Driver& driver, int fd);
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;
  ~Memory();

  Handle handle() const { return handle_; }
  // The caller closes it.
  int export_file_descriptor() const;

 private:
  Memory(const Driver& driver, Handle handle) : driver_(&driver), handle_(handle) {}
  const Driver* driver_;
  Handle handle_;
};

// Says that no kernel of this rank can run or start until it is gone. To make one is to wait for the device, so that
// nobody can swap what lies at an address without having waited. `calls` is the lock under which its calls launch; a
// graph that another thread replays meanwhile whoever marks step starts holds back.
// An unmap under a running kernel is an error that ends the whole context, of every rank in it.
class Quiescent {
 public:
  template <class Wait>
  Quiescent(const std::lock_guard<std::mutex>& calls, Wait wait_for_device) {
    (void)calls;
    if (guarded(guard_quiet_swap)) wait_for_device();
  }
  Quiescent(const Quiescent&) = delete;
  Quiescent& operator=(const Quiescent&) = delete;
};

// What lies in a range: one memory object, over and over if it is smaller.
struct Content {
  std::shared_ptr<const Memory> memory;
  u64 num_bytes = 0;  // of the object
};

// A range of addresses, reserved for good, and never without memory: a peer that is gone has a dummy there.
class Range {
 public:
  Range(const Driver& driver, int device, u64 num_bytes, u64 granule_bytes, Content first);
  ~Range();
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;

  Address address() const { return address_; }
  const Memory& memory() const { return *content_.memory; }
  // What lay here is let go, unless the other cannot be mapped: then it is back.
  void replace(Content content, const Quiescent&);

 private:
  Range(const Driver& driver, int device, u64 num_bytes, u64 granule_bytes);
  void put(Content content);
  void unmap() noexcept;

  const Driver& driver_;
  int device_;
  u64 num_bytes_;
  Address address_ = 0;
  u64 num_mapped_bytes_ = 0;
  Content content_;
};

// All partitions that one rank reads (its own window) and writes (one in each peer's).
class Windows {
 public:
  struct Layout {
    i32 rank;
    i32 num_ranks;
    i32 num_writers;  // spare ones included
    u64 partition_bytes;
  };
  // Peers' windows are dummies until they are plugged.
  Windows(const Driver& driver, int device, HandleType type, const Layout& layout);

  // A file descriptor for `writer` to import my partition by; the caller closes it.
  int export_partition(i32 writer) const;

  Address inbound(i32 writer) const { return inbound_[static_cast<size_t>(writer)]->address(); }
  Address outbound(i32 owner) const { return range_in(owner).address(); }

  // My partition in the window of `owner`, or of its replacement, by the descriptor that it exported for me.
  void plug(i32 owner, int fd, const Quiescent& quiescent);
  // `owner` is gone. Its memory is let go at once, so that its node can return, and stores to it go nowhere.
  void unplug(i32 owner, const Quiescent& quiescent);
  // Whose memory this rank imports.
  const RankSet& plugged() const { return plugged_; }
  // A new incarnation of `writer` gets a partition in which the old one, which may still be storing, has no part: what
  // it stores lands in memory that nobody reads any more.
  void renew(i32 writer, const Quiescent& quiescent);

 private:
  Content fresh_partition() const;
  Content dummy() const { return {dummy_, granule_bytes_}; }
  std::unique_ptr<Range> new_range(Content first) const;
  Range& range_in(i32 owner) const;
  Range& peer_range(i32 owner) const;

  const Driver& driver_;
  int device_;
  HandleType type_;
  Layout layout_;
  u64 granule_bytes_;
  u64 num_bytes_;  // of a partition, up to whole granules
  std::shared_ptr<const Memory> dummy_;
  std::vector<std::unique_ptr<Range>> inbound_;
  std::vector<std::unique_ptr<Range>> outbound_;  // nothing at this rank's own place: it stores into its own window
  RankSet plugged_;
};

}  // namespace cuda
}  // namespace fa2a
