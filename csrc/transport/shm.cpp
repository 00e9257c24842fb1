// POSIX shared memory between processes: one object per (owner, writer), so that a partition can be swapped at its
// address, and one control page per rank.
#include <new>

#include "transport/swappable.hpp"

namespace fa2a {

namespace {

// With the guard of fresh partitions out, the test build hands out the old memory, so it keeps that open.
#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS
constexpr bool kKeepsOpen = true;
#else
constexpr bool kKeepsOpen = false;
#endif

class PosixFabric : public Swappable<SharedFabric> {
 public:
  PosixFabric(const Shape& shape, const std::string& token, i32 rank, i32 num_founders)
      : Swappable<SharedFabric>(shape), token_(token), rank_(rank), num_founders_(num_founders) {
    try {
      create_own();
    } catch (...) {
      forget_names();
      throw;
    }
  }
  ~PosixFabric() override { forget_names(); }

  i32 page_fd() const override { return own_page_.fd(); }
  ControlPage& own_page() override { return *reinterpret_cast<ControlPage*>(own_page_.data()); }

  void open_peers() override {
    for (i32 peer = 0; peer < shape_.num_ranks; ++peer) {
      if (peer == rank_) {
        pages_.push_back(reinterpret_cast<ControlPage*>(own_page_.data()));
        outbound_.push_back(inbound_[static_cast<size_t>(rank_)]);
        continue;
      }
      const bool is_here = peer < num_founders_;
      opened_.push_back(is_here ? SharedMemory::open(page_name(peer), control_page_bytes())
                                : SharedMemory::anonymous(control_page_bytes()));
      pages_.push_back(reinterpret_cast<ControlPage*>(opened_.back().data()));
      opened_.push_back(is_here ? SharedMemory::open(partition_name(peer, rank_), partition_bytes_)
                                : SharedMemory::anonymous(partition_bytes_));
      outbound_.push_back(opened_.back().data());
    }
  }

  void forget_names() noexcept override {
    for (const std::string& name : names_) SharedMemory::unlink(name);
    names_.clear();
  }

 private:
  void create_own() {
    own_page_ = create(page_name(rank_), control_page_bytes(), /*keep_open=*/true);
    new (own_page_.data()) ControlPage();
    for (i32 writer = 0; writer < num_partitions(shape_); ++writer) {
      const bool comes_later = writer >= num_founders_ && writer < shape_.num_ranks;
      own_partitions_.push_back(comes_later ? SharedMemory::anonymous(partition_bytes_)
                                            : create(partition_name(rank_, writer), partition_bytes_, kKeepsOpen));
      inbound_.push_back(own_partitions_.back().data());
    }
  }
  SharedMemory create(const std::string& name, u64 num_bytes, bool keep_open) {
    SharedMemory memory = SharedMemory::create(name, num_bytes, keep_open);
    names_.push_back(name);
    return memory;
  }
  std::string page_name(i32 rank) const { return "/fa2a-" + token_ + "-c" + std::to_string(rank); }
  std::string partition_name(i32 owner, i32 writer) const {
    return "/fa2a-" + token_ + "-w" + std::to_string(owner) + "-" + std::to_string(writer);
  }

  i32 first_fd(i32 partition) const override { return own_partitions_[static_cast<size_t>(partition)].fd(); }

  std::string token_;
  i32 rank_;
  i32 num_founders_;
  std::vector<std::string> names_;
  SharedMemory own_page_;
  std::vector<SharedMemory> own_partitions_;
  std::vector<SharedMemory> opened_;
};

// Nothing of it has a name: members open it through this process, and it opens theirs through them.
class UnnamedFabric : public Swappable<NewcomerFabric> {
 public:
  UnnamedFabric(const Shape& shape, i32 rank) : Swappable<NewcomerFabric>(shape), rank_(rank) {
    own_page_ = SharedMemory::create_unnamed(control_page_bytes());
    new (own_page_.data()) ControlPage();
    window_ = SharedMemory::create_unnamed(window_bytes(shape));
    for (i32 writer = 0; writer < num_partitions(shape); ++writer)
      inbound_.push_back(window_.data() + partition_bytes_ * static_cast<u64>(writer));
    for (i32 peer = 0; peer < shape.num_ranks; ++peer) {
      places_.push_back(SharedMemory::anonymous(control_page_bytes()));
      pages_.push_back(reinterpret_cast<ControlPage*>(peer == rank ? own_page_.data() : places_.back().data()));
      places_.push_back(SharedMemory::anonymous(partition_bytes_));
      outbound_.push_back(places_.back().data());
    }
  }

  i32 page_fd() const override { return own_page_.fd(); }
  i32 window_fd() const override { return window_.fd(); }
  void take_partition(i32 partition) override { outbound_[static_cast<size_t>(rank_)] = inbound(partition); }

 private:
  i32 first_fd(i32) const override { return -1; }

  i32 rank_;
  SharedMemory own_page_;
  SharedMemory window_;
  std::vector<SharedMemory> places_;  // addresses that what members own is mapped over
};

}  // namespace

std::unique_ptr<SharedFabric> make_shared_fabric(const Shape& shape, const std::string& token, i32 rank,
                                                 i32 num_founders) {
  return std::make_unique<PosixFabric>(shape, token, rank, num_founders);
}

std::unique_ptr<NewcomerFabric> make_newcomer_fabric(const Shape& shape, i32 rank) {
  return std::make_unique<UnnamedFabric>(shape, rank);
}

}  // namespace fa2a
