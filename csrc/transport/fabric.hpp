// How bytes reach a peer: the addresses of everybody's control page and of the partitions that one rank reads and
// writes.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "protocol/control_page.hpp"
#include "protocol/layout.hpp"

namespace fa2a {

// Owns the mappings of one rank. The addresses stay the same for its whole life; what is mapped there may be swapped.
class Fabric {
 public:
  virtual ~Fabric() = default;

  ControlPage& page(i32 rank) const { return *pages_[static_cast<size_t>(rank)]; }
  // A partition of my own window: memory that I read and its one writer stores into.
  u8* inbound(i32 partition) const { return inbound_[static_cast<size_t>(partition)]; }
  // My partition in the window of `owner`.
  u8* outbound(i32 owner) const { return outbound_[static_cast<size_t>(owner)]; }
  i32 num_ranks() const { return static_cast<i32>(pages_.size()); }
  // Do peers live in processes of their own, which the operating system can report dead?
  virtual bool between_processes() const = 0;

 protected:
  std::vector<ControlPage*> pages_;
  std::vector<u8*> inbound_;
  std::vector<u8*> outbound_;
};

// Virtual ranks: all windows of a group in this process. The group is shared by the fabrics of its ranks.
class LocalGroup;
std::unique_ptr<Fabric> make_local_fabric(std::shared_ptr<LocalGroup> group, i32 rank);

// POSIX shared memory between the processes of one host, in two steps with the caller's rendezvous in between:
// create what I own; when all have, open what they own. `forget_names` then leaves nothing behind that a crash could
// leak.
class SharedFabric : public Fabric {
 public:
  virtual ControlPage& own_page() = 0;  // before the peers' are open
  virtual void open_peers() = 0;
  virtual void forget_names() noexcept = 0;
  bool between_processes() const override { return true; }
};
std::unique_ptr<SharedFabric> make_shared_fabric(const Shape& shape, const std::string& token, i32 rank);

// Fills a partition so that no word in it is special: declined signals of the two rounds before `first_round`.
void prepare_partition(u8* partition, const Shape& shape, i32 owner, i32 writer, u64 incarnation, u64 first_round);

}  // namespace fa2a
