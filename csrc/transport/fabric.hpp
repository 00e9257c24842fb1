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
  // A life that ends or begins while this rank runs (docs/membership.md): what is mapped changes, addresses stay.
  // False: nothing changed; virtual ranks cannot. All but the first need a moment in which no kernel of this rank runs.
  //   open_page      maps the control page that a process has open in the place of `rank`'s;
  //   renew_inbound  puts fresh memory where a partition of my window is, beyond the reach of whoever stored into the
  //                  old one, and returns the descriptor of it for its new writer, -1 on failure;
  //   open_outbound  maps my partition in the window of `owner`: so much of the file, from `offset` on.
  virtual bool open_page(i32 /*rank*/, i32 /*pid*/, i32 /*fd*/) noexcept { return false; }
  virtual i32 renew_inbound(i32 /*partition*/) noexcept { return -1; }
  virtual bool open_outbound(i32 /*owner*/, i32 /*pid*/, i32 /*fd*/, u64 /*offset*/) noexcept { return false; }
  virtual i32 page_fd() const { return -1; }  // of my own control page

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
// `num_founders`: the lowest ranks, which construct the group; the others may come later, and have a place only.
std::unique_ptr<SharedFabric> make_shared_fabric(const Shape& shape, const std::string& token, i32 rank,
                                                 i32 num_founders);
// Of a rank that comes later: its control page and its window, each one unnamed object, and a place for everything that
// belongs to the members. `partition` is the one it will have in every window, its own included.
class NewcomerFabric : public Fabric {
 public:
  virtual i32 window_fd() const = 0;
  virtual void take_partition(i32 partition) = 0;
  bool between_processes() const override { return true; }
};
std::unique_ptr<NewcomerFabric> make_newcomer_fabric(const Shape& shape, i32 rank);

// Where a life begins: the number of its first round and of its first small collective.
struct Beginning {
  u64 round = 0;
  u64 collective = 0;
};

// Fills a partition so that no word in it is special: declined signals of the two rounds before the first.
void prepare_partition(u8* partition, const Shape& shape, i32 owner, i32 writer, u64 incarnation, Beginning first);
// What a rank says it has stored for a peer's life that begins there: nothing.
void forget_sent(SentWords& sent, Beginning first);

}  // namespace fa2a
