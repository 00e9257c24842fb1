// The system calls about processes and threads.
#include "host/process.hpp"

#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace fa2a {

ProcessWatch::ProcessWatch(i32 pid) noexcept : fd_(static_cast<i32>(syscall(SYS_pidfd_open, pid, 0))) {}

ProcessWatch::~ProcessWatch() {
  if (fd_ >= 0) close(fd_);
}

ProcessWatch& ProcessWatch::operator=(ProcessWatch&& other) noexcept {
  if (this != &other) {
    if (fd_ >= 0) close(fd_);
    fd_ = other.fd_;
    other.fd_ = -1;
  }
  return *this;
}

bool ProcessWatch::has_exited() const noexcept {
  if (fd_ < 0) return false;
  pollfd entry{fd_, POLLIN, 0};
  return poll(&entry, 1, 0) == 1 && (entry.revents & POLLIN) != 0;
}

i32 process_id() noexcept { return static_cast<i32>(getpid()); }

u64 process_namespace() noexcept {
  struct stat space;
  return stat("/proc/self/ns/pid", &space) == 0 ? static_cast<u64>(space.st_ino) : 0;
}

void block_all_signals() noexcept {
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, nullptr);
}

void name_thread(const char* name) noexcept { pthread_setname_np(pthread_self(), name); }

void prefer_low_latency() noexcept {
  struct Attributes {
    u32 size, policy;
    u64 flags;
    i32 nice;
    u32 priority;
    u64 runtime, deadline, period;
  } attributes{sizeof(Attributes), SCHED_OTHER, 0, 0, 0, 100000, 0, 0};  // EEVDF: the wished-for slice, 0.1 ms
  syscall(SYS_sched_setattr, 0, &attributes, 0);
}

void signal_self(i32 signal_number) noexcept { kill(getpid(), signal_number); }

}  // namespace fa2a
