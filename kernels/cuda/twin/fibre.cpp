// The switch between stacks: six registers on x86-64, ucontext elsewhere; AddressSanitizer is told of each.
#include "kernels/cuda/twin/fibre.hpp"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FA2A_ADDRESS_SANITIZER 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(FA2A_ADDRESS_SANITIZER)
extern "C" void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, unsigned long size);
extern "C" void __sanitizer_finish_switch_fiber(void* fake_stack_save, const void** bottom_old,
                                                unsigned long* size_old);
extern "C" void __asan_unpoison_memory_region(void const volatile* at, unsigned long size);
#define FA2A_TELL_SANITIZER 1
#endif

#if defined(FA2A_OWN_SWITCH)
// void fa2a_switch_stack(void** leave, void* go_on): keeps what a callee must keep, and nothing else. swapcontext()
// would also save the signal mask, two system calls a switch.
extern "C" void fa2a_switch_stack(void** leave, void* go_on);
asm(R"(
.text
.p2align 4
.globl fa2a_switch_stack
.hidden fa2a_switch_stack
.type fa2a_switch_stack,@function
fa2a_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fa2a_switch_stack,.-fa2a_switch_stack
)");
#endif

namespace fa2a {
namespace twin {

void Fibre::prepare(u8* stack, u64 num_bytes, void (*enter)()) {
  stack_ = stack;
  stack_bytes_ = num_bytes;
  fake_stack_ = nullptr;
#if defined(FA2A_TELL_SANITIZER)
  // The fibre before it never returned from its frames, whose edges are still marked.
  __asan_unpoison_memory_region(stack, num_bytes);
#endif
#if defined(FA2A_OWN_SWITCH)
  // As if `enter` had just been called: its return address, which it never uses, stands 8 bytes off a multiple of 16.
  auto** top = reinterpret_cast<void**>((reinterpret_cast<u64>(stack) + num_bytes) & ~15ull);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(enter);
  for (i32 i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = num_bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, enter, 0);
#endif
}

void Fibre::switch_from(Fibre& from, bool last) {
#if defined(FA2A_TELL_SANITIZER)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack_, stack_, stack_bytes_);
#else
  static_cast<void>(last);
#endif
#if defined(FA2A_OWN_SWITCH)
  fa2a_switch_stack(&from.stack_pointer_, stack_pointer_);
#else
  swapcontext(&from.context_, &context_);
#endif
#if defined(FA2A_TELL_SANITIZER)
  __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
#endif
}

void Fibre::arrived(Fibre& from) {
#if defined(FA2A_TELL_SANITIZER)
  const void* bottom = nullptr;
  unsigned long size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  from.stack_ = const_cast<void*>(bottom);
  from.stack_bytes_ = size;
#else
  static_cast<void>(from);
#endif
}

}  // namespace twin
}  // namespace fa2a
