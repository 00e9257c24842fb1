// Open files handed to other processes of this host, of the same user: by a socket with a number for a name and a place
// in no folder, so that nothing is left behind by whoever ends.
#pragma once

#include <functional>
#include <thread>

#include "protocol/compiler.hpp"

namespace fa2a {

class Door {
 public:
  // `give` answers, on a thread of the door, which file stands for `what`; it is closed here once it is handed over.
  // -1: there is none. Throws std::runtime_error if the number is taken.
  Door(u64 number, std::function<i32(i32 what)> give);
  ~Door();
  Door(const Door&) = delete;
  Door& operator=(const Door&) = delete;

  // The file that the door of this number has for `what`, the caller's to close; -1: there is no door, or it gave none
  // in time.
  static i32 ask(u64 number, i32 what, i64 timeout_ns) noexcept;

 private:
  void serve();
  void answer(i32 visitor);

  std::function<i32(i32)> give_;
  i32 socket_;
  std::thread thread_;
};

}  // namespace fa2a
