// What a life that begins asks of the transport, which membership does not know. Called by the pulse's thread.
#pragma once

#include "protocol/view.hpp"

namespace fa2a {

class Doors {
 public:
  virtual ~Doors() = default;
  // Of a member: the newcomer of `rank` has its control page open under this number; map it in the place of the old
  // one. False: it cannot be had, or is none.
  virtual bool open_page(i32 rank, i32 pid, i32 fd) noexcept = 0;
  // Of a newcomer, before anybody may store into its window: every member's partition in it begins with that
  // round and that collective.
  virtual void fill_window(const View& members, u64 first_round, u64 first_collective) noexcept = 0;
};

}  // namespace fa2a
