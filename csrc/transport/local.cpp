// Virtual ranks in one process: every window is memory of this process, and a thread is a rank.
#include "transport/local.hpp"

#include <new>

namespace fa2a {

LocalGroup::LocalGroup(const Shape& group_shape) : shape(group_shape), num_writers(num_partitions(group_shape)) {
  const u64 num_bytes = partition_layout(shape).num_bytes;
  for (i32 rank = 0; rank < shape.num_ranks; ++rank) {
    pages.push_back(SharedMemory::anonymous(control_page_bytes()));
    new (pages.back().data()) ControlPage();
    for (i32 writer = 0; writer < num_writers; ++writer) partitions.push_back(SharedMemory::anonymous(num_bytes));
  }
}

namespace {

class LocalFabric : public Fabric {
 public:
  LocalFabric(std::shared_ptr<LocalGroup> group, i32 rank) : group_(std::move(group)) {
    for (auto& page : group_->pages) pages_.push_back(reinterpret_cast<ControlPage*>(page.data()));
    for (i32 writer = 0; writer < group_->num_writers; ++writer) inbound_.push_back(group_->partition(rank, writer));
    for (i32 owner = 0; owner < group_->shape.num_ranks; ++owner) outbound_.push_back(group_->partition(owner, rank));
  }
  bool between_processes() const override { return false; }

 private:
  std::shared_ptr<LocalGroup> group_;
};

}  // namespace

std::unique_ptr<Fabric> make_local_fabric(std::shared_ptr<LocalGroup> group, i32 rank) {
  return std::make_unique<LocalFabric>(std::move(group), rank);
}

}  // namespace fa2a
