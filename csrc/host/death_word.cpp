// Registers the death word with the kernel. The entry is private memory, only the word itself is shared: the kernel
// follows the list in the dying process, so a list in shared memory could be bent by a peer.
#include "host/death_word.hpp"

#include <linux/futex.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace fa2a {

bool DeathWordHolder::hold(u32* word) noexcept {
  const u32 thread_id = static_cast<u32>(syscall(SYS_gettid));
  size_t bytes = 0;
  if (syscall(SYS_get_robust_list, 0, &previous_, &bytes) != 0) previous_ = nullptr;
  previous_bytes_ = bytes;
  word_ = word;
  // The waiter bit is set from the start: nobody locks this word, yet the kernel must wake when it marks it.
  __atomic_store_n(word, (thread_id & FUTEX_TID_MASK) | FUTEX_WAITERS, __ATOMIC_SEQ_CST);
  list_.first = &entry_;
  list_.word_offset = reinterpret_cast<char*>(word) - reinterpret_cast<char*>(&entry_);
  list_.pending = nullptr;
  entry_.next = reinterpret_cast<Entry*>(&list_);
  return syscall(SYS_set_robust_list, &list_, sizeof(List)) == 0;
}

void DeathWordHolder::let_go() noexcept {
  if (word_ == nullptr) return;
  syscall(SYS_set_robust_list, previous_, previous_bytes_ != 0 ? previous_bytes_ : sizeof(List));
  __atomic_store_n(word_, 0u, __ATOMIC_SEQ_CST);
  word_ = nullptr;
}

bool owner_died(const u32* word) noexcept { return (__atomic_load_n(word, __ATOMIC_ACQUIRE) & kOwnerDied) != 0; }

}  // namespace fa2a
