// Memory objects, who has them open, and where each life has them mapped, as the operating system of the simulated host
// keeps them. Real mappings: what is put in the place of something else is seen there by that life, and by no other.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "protocol/compiler.hpp"

namespace fa2a::sim {

// Never 0, which no process has.
constexpr i32 process_of(i32 life) { return life + 100; }
constexpr i32 life_of_process(i32 pid) { return pid - 100; }

struct Object {
  u64 first = 0;  // where it begins in the one file that holds all objects
  u64 num_bytes = 0;
  i32 creator = 0;  // a life
};

class Files {
 public:
  void reset(i32 num_lives);  // between two schedules: no objects, and all memory is zero again

  i32 create(u64 num_bytes, const std::string& name = "");
  i32 find(const std::string& name) const;  // -1: nothing is called that
  void forget(const std::string& name) { names_.erase(name); }

  // Numbers of open files are a life's own, the lowest free one first, so that a stale one may be another file's.
  i32 open(i32 life, i32 object);
  void close(i32 life, i32 fd);
  i32 object_of(i32 life, i32 fd) const;  // -1: it has nothing open under this number

  u8* map(i32 object);
  void map_over(u8* address, u64 num_bytes, i32 object, u64 offset);

  const Object& object(i32 id) const { return objects_[static_cast<size_t>(id)]; }
  i32 object_at(const void* one_address) const;  // -1: no shared memory
  // The same for all mappings of a byte; what lies outside shared memory has one address anyway.
  template <class T>
  T* one_address_of(T* at) const {
    const auto* address = reinterpret_cast<const u8*>(at);
    if (address < views_ || address >= views_ + used_view_) return at;
    const auto from_views = static_cast<u64>(address - views_);
    return reinterpret_cast<T*>(file_ + page_in_file_[from_views / kPageBytes] * kPageBytes + from_views % kPageBytes);
  }
  u8* begin_of(i32 object) const { return file_ + objects_[static_cast<size_t>(object)].first; }

 private:
  static constexpr u64 kPageBytes = 4096;
  void lay(u64 view_page, u64 file_page, u64 num_pages);

  u8* file_ = nullptr;   // all objects, one after the other
  u8* views_ = nullptr;  // addresses at which lives have them
  i32 descriptor_ = -1;
  u64 used_file_ = 0, used_view_ = 0;
  std::vector<Object> objects_;
  std::vector<i32> object_of_page_;  // of the file
  std::vector<u64> page_in_file_;    // of each page of the views
  std::map<std::string, i32> names_;
  std::vector<std::vector<i32>> open_;  // of each life: objects by number; -1: closed
};
extern Files files;

}  // namespace fa2a::sim
