// Sleep until a peer has stored something: the word in the control page that wakes a rank's waiting kernel.
#pragma once

#include "host/futex.hpp"
#include "protocol/control_page.hpp"

namespace fa2a {

// Only waiters edit the waiter count. A ringer that cleared it would lose the wake-up of a waiter that came in between.
class DoorbellWaiter {
 public:
  explicit DoorbellWaiter(ControlPage& page) : page_(page) {
    __atomic_fetch_add(&page_.doorbell_waiters, 1, __ATOMIC_SEQ_CST);
  }
  ~DoorbellWaiter() { __atomic_fetch_sub(&page_.doorbell_waiters, 1, __ATOMIC_SEQ_CST); }
  DoorbellWaiter(const DoorbellWaiter&) = delete;
  DoorbellWaiter& operator=(const DoorbellWaiter&) = delete;

  u32 listen() const { return __atomic_load_n(&page_.doorbell, __ATOMIC_SEQ_CST); }
  void sleep(u32 heard, i64 timeout_ns) const { futex_wait(&page_.doorbell, heard, timeout_ns); }

 private:
  ControlPage& page_;
};

// After the signal is stored. The fence orders that store before the look at the count, as the waiter's increment
// stands before its look at the signal: one of the two sees the other.
inline void ring_doorbell(ControlPage& page) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  if (__atomic_load_n(&page.doorbell_waiters, __ATOMIC_SEQ_CST) == 0) return;
  __atomic_fetch_add(&page.doorbell, 1, __ATOMIC_SEQ_CST);
  futex_wake(&page.doorbell, 0x7fffffff);
}

inline void ring_pulse(ControlPage& page) {
  __atomic_fetch_add(&page.pulse_bell, 1, __ATOMIC_SEQ_CST);
  futex_wake(&page.pulse_bell, 0x7fffffff);
}

}  // namespace fa2a
