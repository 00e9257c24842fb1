// One object of shared memory, mapped whole: named, or open by its descriptor only; and how another one takes its
// place.
#pragma once

#include <string>

#include "protocol/compiler.hpp"

namespace fa2a {

class SharedMemory {
 public:
  SharedMemory() = default;
  ~SharedMemory();
  SharedMemory(SharedMemory&& other) noexcept;
  SharedMemory& operator=(SharedMemory&& other) noexcept;

  // Creates and reserves the pages now: a full /dev/shm must be an error here, not a SIGBUS in the middle of a round.
  // `keep_open`: its descriptor stays, for processes that come when the name is gone.
  static SharedMemory create(const std::string& name, u64 num_bytes, bool keep_open = false);
  // The same without a name: nothing that a crash could leave behind, and nothing that an earlier life could open.
  static SharedMemory create_unnamed(u64 num_bytes);
  // Opens what a peer created; throws when it is missing or of another size.
  static SharedMemory open(const std::string& name, u64 num_bytes);
  // Memory of this process only, for virtual ranks, and to keep an address for what comes later.
  static SharedMemory anonymous(u64 num_bytes);
  static void unlink(const std::string& name) noexcept;

  u8* data() const noexcept { return data_; }
  u64 num_bytes() const noexcept { return num_bytes_; }
  i32 fd() const noexcept { return fd_; }  // -1: not kept open

 private:
  SharedMemory(u8* data, u64 num_bytes, i32 fd = -1) : data_(data), num_bytes_(num_bytes), fd_(fd) {}
  u8* data_ = nullptr;
  u64 num_bytes_ = 0;
  i32 fd_ = -1;
};

// A descriptor of this process, closed at the end; -1: none.
class OpenFile {
 public:
  OpenFile() = default;
  explicit OpenFile(i32 fd) noexcept : fd_(fd) {}
  ~OpenFile();
  OpenFile(OpenFile&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  OpenFile& operator=(OpenFile&& other) noexcept;
  // What another process of this user has open. It needs the same PID namespace, and no name.
  static OpenFile of_process(i32 pid, i32 fd) noexcept;
  // Fresh memory, reserved; -1 when there is none left.
  static OpenFile fresh_memory(u64 num_bytes) noexcept;

  i32 fd() const noexcept { return fd_; }
  u64 num_bytes() const noexcept;

 private:
  i32 fd_ = -1;
};

// Puts `num_bytes` of the file where something is mapped already. The kernel does it in one step: whoever loads or
// stores there meets the old object or the new one, and never a hole. False: nothing changed.
bool map_over(u8* address, u64 num_bytes, const OpenFile& file, u64 offset) noexcept;

}  // namespace fa2a
