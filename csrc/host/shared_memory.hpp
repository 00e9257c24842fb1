// One named object of POSIX shared memory, mapped whole.
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
  static SharedMemory create(const std::string& name, u64 num_bytes);
  // Opens what a peer created; throws when it is missing or of another size.
  static SharedMemory open(const std::string& name, u64 num_bytes);
  // Memory of this process only, for virtual ranks.
  static SharedMemory anonymous(u64 num_bytes);
  static void unlink(const std::string& name) noexcept;

  u8* data() const noexcept { return data_; }
  u64 num_bytes() const noexcept { return num_bytes_; }

 private:
  SharedMemory(u8* data, u64 num_bytes) : data_(data), num_bytes_(num_bytes) {}
  u8* data_ = nullptr;
  u64 num_bytes_ = 0;
};

}  // namespace fa2a
