// How one word is read and published between ranks: system-scope acquire, release and full fences on host and device.
#pragma once

#include "protocol/compiler.hpp"

namespace fa2a {

#if defined(__CUDA_ARCH__)

FA2A_HD u64 load_acquire(const u64* word) {
  u64 value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}
FA2A_HD u64 load_relaxed(const u64* word) {
  u64 value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}
FA2A_HD void store_release(u64* word, u64 value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}
FA2A_HD void store_relaxed(u64* word, u64 value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}
FA2A_HD void fetch_or(u64* word, u64 bits) {
  asm volatile("red.release.sys.global.or.b64 [%0], %1;" ::"l"(word), "l"(bits) : "memory");
}
FA2A_HD void fetch_and(u64* word, u64 bits) {
  asm volatile("red.release.sys.global.and.b64 [%0], %1;" ::"l"(word), "l"(bits) : "memory");
}
FA2A_HD void full_fence() { asm volatile("fence.sc.sys;" ::: "memory"); }

#elif defined(FA2A_SIMULATED)

// The simulator's: at each of them another rank may go on, and a store into a peer's window is under way for a while.
u64 load_acquire(const u64* word);
u64 load_relaxed(const u64* word);
void store_release(u64* word, u64 value);
void store_relaxed(u64* word, u64 value);
void fetch_or(u64* word, u64 bits);
void fetch_and(u64* word, u64 bits);
void full_fence();

#else

FA2A_HD u64 load_acquire(const u64* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
FA2A_HD u64 load_relaxed(const u64* word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }
FA2A_HD void store_release(u64* word, u64 value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }
FA2A_HD void store_relaxed(u64* word, u64 value) { __atomic_store_n(word, value, __ATOMIC_RELAXED); }
FA2A_HD void fetch_or(u64* word, u64 bits) { __atomic_fetch_or(word, bits, __ATOMIC_SEQ_CST); }
FA2A_HD void fetch_and(u64* word, u64 bits) { __atomic_fetch_and(word, bits, __ATOMIC_SEQ_CST); }
FA2A_HD void full_fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

#endif

}  // namespace fa2a
