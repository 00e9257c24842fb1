// Windows in GPU memory: one memory object per (owner, writer), each at an address that never changes, so that what
// lies there can be swapped under captured graphs. Not run on a GPU.
#pragma once

#include <memory>
#include <vector>

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

// Says that no kernel of this process can run or start until it is gone: whoever holds one has waited for the device
// and holds back launches. An unmap under a running kernel is an error that ends the whole context, of every rank in
// it.
struct Quiescent {};

// A range of addresses, reserved for good. Never without memory: a peer that is gone has a dummy there.
class Range {
 public:
  Range(const Driver& driver, int device, u64 num_bytes, u64 granule_bytes);
  ~Range();
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;

  Address address() const { return address_; }
  u64 num_bytes() const { return num_bytes_; }
  // The first time, before any kernel has seen the address.
  void map(Memory memory);
  // Swaps what lies here.
  void replace(Memory memory, const Quiescent&);
  // One granule of memory, over and over: stores land, and nobody reads them.
  void replace_by_dummy(const Memory& dummy, const Quiescent&);
  const Memory* memory() const { return memory_.get(); }  // nullptr: a dummy lies here

 private:
  void unmap() noexcept;
  void map_piece(Address at, u64 num_bytes, Handle handle);
  void open_access();

  const Driver& driver_;
  int device_;
  u64 num_bytes_;
  u64 granule_bytes_;
  Address address_ = 0;
  u64 num_mapped_bytes_ = 0;
  u64 piece_bytes_ = 0;
  std::unique_ptr<Memory> memory_;
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
  Windows(const Driver& driver, int device, HandleType type, const Layout& layout);

  // A file descriptor for `writer` to import my partition by; the caller closes it.
  int export_partition(i32 writer) const;
  // My partition in the window of `owner`, by the descriptor that it exported for me.
  void open(i32 owner, int fd);

  Address inbound(i32 writer) const { return inbound_[static_cast<size_t>(writer)]->address(); }
  Address outbound(i32 owner) const { return range_in(owner).address(); }

  // `owner` is gone. Its memory is let go at once, so that its node can return, and stores to it go nowhere.
  void unplug(i32 owner, const Quiescent& quiescent);
  // A replacement of `owner` has come, with memory of its own.
  void plug(i32 owner, int fd, const Quiescent& quiescent);
  // A new incarnation of `writer` gets a partition in which the old one, which may still be storing, has no part: what
  // it stores lands in memory that nobody reads any more.
  void renew(i32 writer, const Quiescent& quiescent);

 private:
  Memory new_memory(u64 num_bytes) const { return Memory::create(driver_, device_, type_, num_bytes); }
  Range& range_in(i32 owner) const;
  Range& peer_range(i32 owner) const;

  const Driver& driver_;
  int device_;
  HandleType type_;
  Layout layout_;
  u64 granule_bytes_ = 0;
  u64 num_bytes_ = 0;  // of a partition, up to whole granules
  std::unique_ptr<Memory> dummy_;
  std::vector<std::unique_ptr<Range>> inbound_;
  std::vector<std::unique_ptr<Range>> outbound_;  // nothing at this rank's own place: it stores into its own window
};

}  // namespace cuda
}  // namespace fa2a
