// A fibre: a call stack of its own that runs until it yields. All fibres share one thread, so nothing runs by chance.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <memory>

#include "protocol/compiler.hpp"

namespace fa2a::sim {

class Fibre {
 public:
  using Body = void* (*)(void*);
  Fibre(Body body, void* argument);
  ~Fibre();
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  // Called outside of all fibres: runs this one until it yields or ends.
  void resume();
  // Called inside a fibre.
  static void yield();
  bool ended() const { return ended_; }

 private:
  static void begin();

  Body body_;
  void* argument_;
  u8* stack_;
  bool begun_ = false, ended_ = false;
  ucontext_t first_;
  jmp_buf here_;
  void* exceptions_[2] = {};  // what the C++ runtime keeps of exceptions in flight; it thinks in threads
};

}  // namespace fa2a::sim
