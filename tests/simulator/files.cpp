// Shared memory and open files, as csrc/host offers them to transport, out of one file that the simulator maps.
#include "tests/simulator/files.hpp"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>

#include "host/shared_memory.hpp"
#include "tests/simulator/scheduler.hpp"

namespace fa2a::sim {

Files files;

namespace {

constexpr u64 kFileBytes = 64ull << 20, kViewBytes = 256ull << 20;
constexpr u64 kUnmapped = ~0ull;

u8* map_whole(u64 num_bytes, int protection, int flags, int descriptor) {
  void* at = mmap(nullptr, num_bytes, protection, flags, descriptor, 0);
  if (at == MAP_FAILED) throw std::runtime_error("no addresses are left for the simulated memory");
  return static_cast<u8*>(at);
}

}  // namespace

void Files::reset(i32 num_lives) {
  if (file_ == nullptr) {
    descriptor_ = memfd_create("simulated", MFD_CLOEXEC);
    if (descriptor_ < 0 || ftruncate(descriptor_, static_cast<off_t>(kFileBytes)) != 0)
      throw std::runtime_error("no memory is left for the simulated one");
    file_ = map_whole(kFileBytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor_);
    views_ = map_whole(kViewBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
    page_in_file_.assign(kViewBytes / kPageBytes, kUnmapped);
  }
  memset(file_, 0, used_file_);
  used_file_ = used_view_ = 0;
  objects_.clear();
  object_of_page_.clear();
  names_.clear();
  open_.assign(static_cast<size_t>(num_lives), {});
}

i32 Files::create(u64 num_bytes, const std::string& name) {
  const u64 num_pages = (num_bytes + kPageBytes - 1) / kPageBytes;
  const auto id = static_cast<i32>(objects_.size());
  objects_.push_back({used_file_, num_bytes, scheduler->running_life()});
  object_of_page_.insert(object_of_page_.end(), num_pages, id);
  used_file_ += num_pages * kPageBytes;
  if (used_file_ > kFileBytes) throw std::runtime_error("the simulated memory is too small for this shape");
  if (!name.empty()) names_[name] = id;
  return id;
}

i32 Files::find(const std::string& name) const {
  const auto found = names_.find(name);
  return found == names_.end() ? -1 : found->second;
}

i32 Files::open(i32 life, i32 object) {
  std::vector<i32>& mine = open_[static_cast<size_t>(life)];
  auto free = std::find(mine.begin(), mine.end(), -1);
  if (free == mine.end()) free = mine.insert(mine.end(), -1);
  *free = object;
  return static_cast<i32>(free - mine.begin());
}

void Files::close(i32 life, i32 fd) { open_[static_cast<size_t>(life)][static_cast<size_t>(fd)] = -1; }

i32 Files::object_of(i32 life, i32 fd) const {
  if (life < 0 || life >= static_cast<i32>(open_.size())) return -1;
  const std::vector<i32>& its = open_[static_cast<size_t>(life)];
  return fd < 0 || fd >= static_cast<i32>(its.size()) ? -1 : its[static_cast<size_t>(fd)];
}

// Many schedules lay out the same; what lies there already need not be mapped again.
void Files::lay(u64 view_page, u64 file_page, u64 num_pages) {
  bool lies = true;
  for (u64 i = 0; i < num_pages; ++i) lies &= page_in_file_[view_page + i] == file_page + i;
  if (lies) return;
  void* at = mmap(views_ + view_page * kPageBytes, num_pages * kPageBytes, PROT_READ | PROT_WRITE,
                  MAP_SHARED | MAP_FIXED | MAP_POPULATE, descriptor_, static_cast<off_t>(file_page * kPageBytes));
  if (at == MAP_FAILED) throw std::runtime_error("the simulated memory cannot be mapped");
  for (u64 i = 0; i < num_pages; ++i) page_in_file_[view_page + i] = file_page + i;
}

u8* Files::map(i32 id) {
  const Object& whole = object(id);
  const u64 num_pages = (whole.num_bytes + kPageBytes - 1) / kPageBytes;
  u8* at = views_ + used_view_;
  used_view_ += num_pages * kPageBytes;
  if (used_view_ > kViewBytes) throw std::runtime_error("too few addresses for this shape");
  lay(static_cast<u64>(at - views_) / kPageBytes, whole.first / kPageBytes, num_pages);
  return at;
}

void Files::map_over(u8* address, u64 num_bytes, i32 id, u64 offset) {
  lay(static_cast<u64>(address - views_) / kPageBytes, (object(id).first + offset) / kPageBytes,
      (num_bytes + kPageBytes - 1) / kPageBytes);
}

i32 Files::object_at(const void* one_address) const {
  const auto* at = static_cast<const u8*>(one_address);
  if (at < file_ || at >= file_ + used_file_) return -1;
  return object_of_page_[static_cast<u64>(at - file_) / kPageBytes];
}

}  // namespace fa2a::sim

namespace fa2a {

using sim::files;
using sim::scheduler;

SharedMemory SharedMemory::create(const std::string& name, u64 num_bytes, bool keep_open) {
  const i32 object = files.create(num_bytes, name);
  return SharedMemory(files.map(object), num_bytes, keep_open ? files.open(scheduler->running_life(), object) : -1);
}

SharedMemory SharedMemory::create_unnamed(u64 num_bytes) { return create("", num_bytes, /*keep_open=*/true); }

SharedMemory SharedMemory::open(const std::string& name, u64 num_bytes) {
  const i32 object = files.find(name);
  if (object < 0) throw std::runtime_error("nothing is called " + name);
  return SharedMemory(files.map(object), num_bytes);
}

SharedMemory SharedMemory::anonymous(u64 num_bytes) { return create("", num_bytes); }
void SharedMemory::unlink(const std::string& name) noexcept { files.forget(name); }

// What is mapped stays, as long as the schedule: a life that is gone may have stores under way.
SharedMemory::~SharedMemory() = default;
SharedMemory::SharedMemory(SharedMemory&& other) noexcept
    : data_(other.data_), num_bytes_(other.num_bytes_), fd_(other.fd_) {}
SharedMemory& SharedMemory::operator=(SharedMemory&& other) noexcept {
  data_ = other.data_;
  num_bytes_ = other.num_bytes_;
  fd_ = other.fd_;
  return *this;
}

OpenFile::~OpenFile() {
  if (fd_ >= 0 && scheduler != nullptr && scheduler->running() != nullptr) files.close(scheduler->running_life(), fd_);
}
OpenFile& OpenFile::operator=(OpenFile&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

// Of a process that is gone there is nothing to open.
OpenFile OpenFile::of_process(i32 pid, i32 fd) noexcept {
  const i32 life = sim::life_of_process(pid), object = files.object_of(life, fd);
  if (object < 0 || scheduler->machines[static_cast<size_t>(life)].dead) return OpenFile();
  return OpenFile(files.open(scheduler->running_life(), object));
}

OpenFile OpenFile::fresh_memory(u64 num_bytes) noexcept {
  return OpenFile(files.open(scheduler->running_life(), files.create(num_bytes)));
}

u64 OpenFile::num_bytes() const noexcept {
  const i32 object = files.object_of(scheduler->running_life(), fd_);
  return object < 0 ? 0 : files.object(object).num_bytes;
}

bool map_over(u8* address, u64 num_bytes, const OpenFile& file, u64 offset) noexcept {
  if (file.num_bytes() < offset + num_bytes) return false;
  files.map_over(address, num_bytes, files.object_of(scheduler->running_life(), file.fd()), offset);
  return true;
}

}  // namespace fa2a
