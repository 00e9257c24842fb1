// POSIX shared memory between processes: one object per (owner, writer), so that a partition can be swapped at its
// address, and one control page per rank.
#include <new>

#include "host/shared_memory.hpp"
#include "transport/fabric.hpp"

namespace fa2a {

namespace {

class PosixFabric : public SharedFabric {
 public:
  PosixFabric(const Shape& shape, const std::string& token, i32 rank) : shape_(shape), token_(token), rank_(rank) {
    try {
      create_own();
    } catch (...) {
      forget_names();
      throw;
    }
  }
  ~PosixFabric() override { forget_names(); }

  ControlPage& own_page() override { return *reinterpret_cast<ControlPage*>(own_page_.data()); }

  void open_peers() override {
    const u64 num_bytes = partition_layout(shape_).num_bytes;
    for (i32 peer = 0; peer < shape_.num_ranks; ++peer) {
      if (peer == rank_) {
        pages_.push_back(reinterpret_cast<ControlPage*>(own_page_.data()));
        outbound_.push_back(inbound_[static_cast<size_t>(rank_)]);
        continue;
      }
      opened_.push_back(SharedMemory::open(page_name(peer), control_page_bytes()));
      pages_.push_back(reinterpret_cast<ControlPage*>(opened_.back().data()));
      opened_.push_back(SharedMemory::open(partition_name(peer, rank_), num_bytes));
      outbound_.push_back(opened_.back().data());
    }
  }

  void forget_names() noexcept override {
    for (const std::string& name : names_) SharedMemory::unlink(name);
    names_.clear();
  }

 private:
  void create_own() {
    own_page_ = create(page_name(rank_), control_page_bytes());
    new (own_page_.data()) ControlPage();
    for (i32 writer = 0; writer < num_partitions(shape_); ++writer) {
      own_partitions_.push_back(create(partition_name(rank_, writer), partition_layout(shape_).num_bytes));
      inbound_.push_back(own_partitions_.back().data());
    }
  }
  SharedMemory create(const std::string& name, u64 num_bytes) {
    SharedMemory memory = SharedMemory::create(name, num_bytes);
    names_.push_back(name);
    return memory;
  }
  std::string page_name(i32 rank) const { return "/fa2a-" + token_ + "-c" + std::to_string(rank); }
  std::string partition_name(i32 owner, i32 writer) const {
    return "/fa2a-" + token_ + "-w" + std::to_string(owner) + "-" + std::to_string(writer);
  }

  Shape shape_;
  std::string token_;
  i32 rank_;
  std::vector<std::string> names_;
  SharedMemory own_page_;
  std::vector<SharedMemory> own_partitions_;
  std::vector<SharedMemory> opened_;
};

}  // namespace

std::unique_ptr<SharedFabric> make_shared_fabric(const Shape& shape, const std::string& token, i32 rank) {
  return std::make_unique<PosixFabric>(shape, token, rank);
}

}  // namespace fa2a
