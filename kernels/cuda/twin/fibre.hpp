// A fibre: a stack of its own and a switch between stacks, without a thread and without a system call.
#pragma once

#include "protocol/compiler.hpp"

#if defined(__x86_64__) && !defined(FA2A_PORTABLE_FIBRES)
#define FA2A_OWN_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace fa2a {
namespace twin {

// Where a stack was left. `enter` never returns: it switches away for the last time.
class Fibre {
 public:
  // Ready to begin `enter` on a fresh stack.
  void prepare(u8* stack, u64 num_bytes, void (*enter)());
  // Leaves `from` and goes on with this one. `last`: nobody comes back to `from`.
  void switch_from(Fibre& from, bool last = false);
  // The first thing on a fresh stack: the other side of the first switch.
  void arrived(Fibre& from);

 private:
#if defined(FA2A_OWN_SWITCH)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  void* stack_ = nullptr;  // what a sanitizer must know
  u64 stack_bytes_ = 0;
  void* fake_stack_ = nullptr;
};

}  // namespace twin
}  // namespace fa2a
