// Takes a guard out by its name, for native tests that show what happens without it.
#pragma once

#include <string>

#include "protocol/guards.hpp"

namespace fa2a {

// False: no guard is called that.
inline bool take_out(const std::string& name) {
  const char* names[] = {
#define FA2A_GUARD_TEXT(guard) #guard,
      FA2A_GUARDS(FA2A_GUARD_TEXT)
#undef FA2A_GUARD_TEXT
  };
  for (u32 guard = 0; guard < num_guards; ++guard)
    if (name == names[guard]) return guards_off |= 1ull << guard, true;
  return false;
}

}  // namespace fa2a
