// The simulated operating system: time, sleeping, threads, the death word and memory, as csrc/host offers them. Linked
// in place of csrc/host, so that everything above it is the code that runs in production.
#include <pthread.h>
#include <string.h>

#include <algorithm>
#include <stdexcept>

#include "host/clock.hpp"
#include "host/death_word.hpp"
#include "host/futex.hpp"
#include "host/process.hpp"
#include "tests/simulator/files.hpp"
#include "tests/simulator/scheduler.hpp"

namespace fa2a {

using sim::scheduler;

i64 now_ns() noexcept { return scheduler->local_ns(); }

void sleep_ns(i64 duration_ns) noexcept {
  if (duration_ns > 0) scheduler->sleep_until(scheduler->now() + scheduler->to_global(duration_ns), nullptr, 0);
}

void futex_wait(const u32* word, u32 expected, i64 timeout_ns) noexcept {
  const FutexPair pair{word, expected};
  futex_wait_any(&pair, 1, timeout_ns);
}

void futex_wake(const u32* word, i32) noexcept { scheduler->wake(sim::files.one_address_of(word)); }

// A look at the words and falling asleep are one, as with the real one.
bool futex_wait_any(const FutexPair* pairs, i32 num_pairs, i64 timeout_ns) noexcept {
  const u32* words[kMaxFutexPairs];
  for (i32 i = 0; i < num_pairs; ++i) {
    if (*pairs[i].word != pairs[i].expected) return scheduler->touch(), true;
    words[i] = sim::files.one_address_of(pairs[i].word);
  }
  // Not for ever: ranks that end are not rung for.
  const i64 timeout = std::clamp<i64>(timeout_ns, 1, 1000 * sim::kMs);
  scheduler->sleep_until(scheduler->now() + scheduler->to_global(timeout), words, num_pairs);
  return true;
}

// Who holds it is known by whose strand this is; the world marks the word when that life is gone.
bool DeathWordHolder::hold(u32* word) noexcept {
  *word = static_cast<u32>(scheduler->running_life()) + 1;
  word_ = word;
  return true;
}

void DeathWordHolder::let_go() noexcept {
  if (word_ != nullptr) *word_ = 0;
  word_ = nullptr;
}

bool owner_died(const u32* word) noexcept { return (*word & kOwnerDied) != 0; }

ProcessWatch::ProcessWatch(i32) noexcept {}
ProcessWatch::~ProcessWatch() {}
ProcessWatch& ProcessWatch::operator=(ProcessWatch&&) noexcept { return *this; }
bool ProcessWatch::has_exited() const noexcept { return false; }

i32 process_id() noexcept { return sim::process_of(scheduler->running_life()); }
u64 process_namespace() noexcept { return 1; }
void block_all_signals() noexcept {}
void name_thread(const char*) noexcept {}
void prefer_low_latency() noexcept {}
void signal_self(i32) noexcept {}

}  // namespace fa2a

// Threads are strands. The pulse is started, joined and locked by the C++ library, which ends here.
extern "C" {

int pthread_create(pthread_t* thread, const pthread_attr_t*, void* (*body)(void*), void* argument) {
  auto* scheduler = fa2a::sim::scheduler;
  scheduler->spawn(body, argument, scheduler->running_life(), /*is_pulse=*/true);
  *thread = scheduler->num_strands();  // not 0, which is nobody
  return 0;
}

int pthread_join(pthread_t thread, void**) {
  auto* scheduler = fa2a::sim::scheduler;
  const auto& strand = scheduler->strand(thread - 1);
  while (!strand.fibre->ended()) {
    if (scheduler->running() == nullptr)
      scheduler->step();
    else
      scheduler->sleep_until(scheduler->now() + 10 * fa2a::sim::kUs, nullptr, 0);
  }
  return 0;
}

int pthread_mutex_lock(pthread_mutex_t* mutex) {
  auto* scheduler = fa2a::sim::scheduler;
  while (mutex->__data.__lock != 0) {
    if (scheduler->running() == nullptr)
      scheduler->step();
    else
      scheduler->sleep_until(scheduler->now() + 1 * fa2a::sim::kUs, nullptr, 0);
  }
  mutex->__data.__lock = 1;
  return 0;
}

int pthread_mutex_unlock(pthread_mutex_t* mutex) {
  mutex->__data.__lock = 0;
  return 0;
}
}
