// A tensor as Python hands it over: where it begins, as a number.
#pragma once
#include <cstdint>

namespace fa2a {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace fa2a
