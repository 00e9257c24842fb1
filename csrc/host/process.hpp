// Other processes and this one's threads: pidfds, signal masks, names.
#pragma once

#include "protocol/compiler.hpp"

namespace fa2a {

// The slower second witness of an exit: readable once the process is gone, after its memory was torn down.
class ProcessWatch {
 public:
  ProcessWatch() = default;
  explicit ProcessWatch(i32 pid) noexcept;
  ~ProcessWatch();
  ProcessWatch(ProcessWatch&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  ProcessWatch& operator=(ProcessWatch&& other) noexcept;

  bool watching() const noexcept { return fd_ >= 0; }
  bool has_exited() const noexcept;

 private:
  i32 fd_ = -1;
};

i32 process_id() noexcept;
// The namespace that this process's number belongs to: in another one (another container) the same number is somebody
// else's. 0: unknown, as where /proc is not mounted.
u64 process_namespace() noexcept;
void block_all_signals() noexcept;
void name_thread(const char* name) noexcept;
// Asks the scheduler for short slices, soon: the watcher runs rarely and briefly, and detection waits for it. Needs no
// privilege; without support (Linux before 6.12) nothing changes.
void prefer_low_latency() noexcept;
// Marks the instant, then sends this process the signal. For the test build's faults.
void signal_self(i32 signal_number) noexcept;

}  // namespace fa2a
