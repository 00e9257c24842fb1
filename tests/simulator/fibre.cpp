// Fibres on ucontext, which makes their stacks, and setjmp, which changes between them without a system call.
#include "tests/simulator/fibre.hpp"

#include <cxxabi.h>
#include <string.h>

#include <vector>

namespace fa2a::sim {
namespace {

// A view change nests several decisions by value.
constexpr size_t kStackBytes = 256 << 10;

Fibre* running = nullptr;
jmp_buf outside;
std::vector<u8*> spare_stacks;  // a schedule costs a millisecond; fresh stacks would cost as much

}  // namespace

Fibre::Fibre(Body body, void* argument) : body_(body), argument_(argument) {
  if (spare_stacks.empty()) spare_stacks.push_back(new u8[kStackBytes]);
  stack_ = spare_stacks.back();
  spare_stacks.pop_back();
}

Fibre::~Fibre() { spare_stacks.push_back(stack_); }

void Fibre::begin() {
  Fibre* self = running;
  self->body_(self->argument_);
  self->ended_ = true;
  for (;;) yield();
}

void Fibre::resume() {
  void* exceptions[2];
  void* of_thread = abi::__cxa_get_globals();
  memcpy(exceptions, of_thread, sizeof exceptions);
  memcpy(of_thread, exceptions_, sizeof exceptions_);
  running = this;
  if (_setjmp(outside) == 0) {
    if (begun_) _longjmp(here_, 1);
    begun_ = true;
    getcontext(&first_);
    first_.uc_stack.ss_sp = stack_;
    first_.uc_stack.ss_size = kStackBytes;
    first_.uc_link = nullptr;
    makecontext(&first_, begin, 0);
    setcontext(&first_);
  }
  running = nullptr;
  memcpy(exceptions_, of_thread, sizeof exceptions_);
  memcpy(of_thread, exceptions, sizeof exceptions);
}

void Fibre::yield() {
  Fibre* self = running;
  if (_setjmp(self->here_) == 0) _longjmp(outside, 1);
}

}  // namespace fa2a::sim
