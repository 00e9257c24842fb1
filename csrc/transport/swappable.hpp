// What the fabrics between processes share: mappings that are replaced at their address when a life ends or begins.
#pragma once

#include <vector>

#include "host/shared_memory.hpp"
#include "protocol/guards.hpp"
#include "transport/fabric.hpp"

namespace fa2a {

template <class Base>
class Swappable : public Base {
 public:
  explicit Swappable(const Shape& shape)
      : shape_(shape),
        fresh_(static_cast<size_t>(num_partitions(shape))),
        partition_bytes_(partition_layout(shape).num_bytes) {}

  bool open_page(i32 rank, i32 pid, i32 fd) noexcept override {
    auto* address = reinterpret_cast<u8*>(&this->page(rank));
    return map_over(address, control_page_bytes(), OpenFile::of_process(pid, fd), 0);
  }

  // The file stays open for as long as its writer may still have to open it, and until the next one at the latest. A
  // retired partition that were only filled anew would still be where its old writer's stores land.
  i32 renew_inbound(i32 partition) noexcept override {
    if (!guarded(guard_fresh_partition)) return first_fd(partition);
    OpenFile file = OpenFile::fresh_memory(partition_bytes_);
    if (!map_over(this->inbound(partition), partition_bytes_, file, 0)) return -1;
    OpenFile& kept = fresh_[static_cast<size_t>(partition)];
    kept = std::move(file);
    return kept.fd();
  }

  bool open_outbound(i32 owner, i32 pid, i32 fd, u64 offset) noexcept override {
    return map_over(this->outbound(owner), partition_bytes_, OpenFile::of_process(pid, fd), offset);
  }

 protected:
  // Of the memory that a partition had from the start; test build.
  virtual i32 first_fd(i32 partition) const = 0;

  Shape shape_;
  std::vector<OpenFile> fresh_;
  u64 partition_bytes_;
};

}  // namespace fa2a
