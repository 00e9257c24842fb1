// The windows of all virtual ranks of one process.
#pragma once

#include <vector>

#include "host/shared_memory.hpp"
#include "transport/fabric.hpp"

namespace fa2a {

class LocalGroup {
 public:
  explicit LocalGroup(const Shape& group_shape);
  u8* partition(i32 owner, i32 writer) const {
    return partitions[static_cast<size_t>(owner * num_writers + writer)].data();
  }

  Shape shape;
  i32 num_writers;
  std::vector<SharedMemory> pages;
  std::vector<SharedMemory> partitions;
};

}  // namespace fa2a
