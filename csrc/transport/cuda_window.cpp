// Reserving, mapping and swapping the windows of a GPU.
#include "transport/cuda_window.hpp"

#include <stdexcept>
#include <utility>

namespace fa2a {
namespace cuda {

Memory Memory::create(const Driver& driver, int device, HandleType type, u64 num_bytes) {
  const AllocationProperties properties = properties_of(device, type);
  Handle handle = 0;
  check(driver, driver.create(&handle, num_bytes, &properties, 0), "cuMemCreate");
  return Memory(driver, handle);
}

Memory Memory::import_file_descriptor(const Driver& driver, int fd) {
  Handle handle = 0;
  // By value: the driver takes the number for the pointer.
  void* from = reinterpret_cast<void*>(static_cast<i64>(fd));
  check(driver, driver.import_handle(&handle, from, kFileDescriptor), "cuMemImportFromShareableHandle");
  return Memory(driver, handle);
}

Memory::Memory(Memory&& other) noexcept : driver_(other.driver_), handle_(std::exchange(other.handle_, 0)) {}

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(driver_, other.driver_);
  std::swap(handle_, other.handle_);
  return *this;
}

Memory::~Memory() {
  if (handle_ != 0) driver_->release(handle_);
}

int Memory::export_file_descriptor() const {
  int fd = -1;
  check(*driver_, driver_->export_handle(&fd, handle_, kFileDescriptor, 0), "cuMemExportToShareableHandle");
  return fd;
}

Range::Range(const Driver& driver, int device, u64 num_bytes, u64 granule_bytes)
    : driver_(driver), device_(device), num_bytes_(num_bytes) {
  check(driver_, driver_.reserve(&address_, num_bytes_, granule_bytes, 0, 0), "cuMemAddressReserve");
}

Range::Range(const Driver& driver, int device, u64 num_bytes, u64 granule_bytes, Content first)
    : Range(driver, device, num_bytes, granule_bytes) {
  put(std::move(first));  // the destructor undoes it if it fails
}

Range::~Range() {
  unmap();
  driver_.free_address(address_, num_bytes_);
}

// Piece by piece, as it was mapped: the driver unmaps whole mappings only.
void Range::unmap() noexcept {
  for (u64 at = 0; at < num_mapped_bytes_; at += content_.num_bytes) driver_.unmap(address_ + at, content_.num_bytes);
  num_mapped_bytes_ = 0;
}

void Range::put(Content content) {
  content_ = std::move(content);
  const Handle handle = content_.memory->handle();
  while (num_mapped_bytes_ < num_bytes_) {
    check(driver_, driver_.map(address_ + num_mapped_bytes_, content_.num_bytes, 0, handle, 0), "cuMemMap");
    num_mapped_bytes_ += content_.num_bytes;
  }
  AccessDescription access;
  access.location.id = device_;
  check(driver_, driver_.set_access(address_, num_bytes_, &access, 1), "cuMemSetAccess");
}

void Range::replace(Content content, const Quiescent&) {
  Content before = content_;
  unmap();
  try {
    put(std::move(content));
  } catch (const std::runtime_error&) {
    unmap();
    put(std::move(before));
    throw;
  }
}

Windows::Windows(const Driver& driver, int device, HandleType type, const Layout& layout)
    : driver_(driver),
      device_(device),
      type_(type),
      layout_(layout),
      granule_bytes_(granule_of(driver, properties_of(device, type))),
      num_bytes_(round_up(layout.partition_bytes, granule_bytes_)),
      dummy_(std::make_shared<const Memory>(Memory::create(driver, device, type, granule_bytes_))) {
  for (i32 writer = 0; writer < layout.num_writers; ++writer) inbound_.push_back(new_range(fresh_partition()));
  for (i32 owner = 0; owner < layout.num_ranks; ++owner)
    outbound_.push_back(owner == layout.rank ? nullptr : new_range(dummy()));
}

Content Windows::fresh_partition() const {
  return {std::make_shared<const Memory>(Memory::create(driver_, device_, type_, num_bytes_)), num_bytes_};
}

std::unique_ptr<Range> Windows::new_range(Content first) const {
  return std::make_unique<Range>(driver_, device_, num_bytes_, granule_bytes_, std::move(first));
}

Range& Windows::range_in(i32 owner) const {
  return *(owner == layout_.rank ? inbound_ : outbound_)[static_cast<size_t>(owner)];
}

Range& Windows::peer_range(i32 owner) const {
  if (owner == layout_.rank) throw std::logic_error("a rank's own window is not a peer's");
  return range_in(owner);
}

int Windows::export_partition(i32 writer) const {
  return inbound_[static_cast<size_t>(writer)]->memory().export_file_descriptor();
}

void Windows::plug(i32 owner, int fd, const Quiescent& quiescent) {
  auto theirs = std::make_shared<const Memory>(Memory::import_file_descriptor(driver_, fd));
  peer_range(owner).replace({std::move(theirs), num_bytes_}, quiescent);
  plugged_.add(owner);
}

void Windows::unplug(i32 owner, const Quiescent& quiescent) {
  peer_range(owner).replace(dummy(), quiescent);
  plugged_.remove(owner);
}

void Windows::renew(i32 writer, const Quiescent& quiescent) {
  // Made before the old one is let go: without memory for it the partition stays as it was.
  inbound_[static_cast<size_t>(writer)]->replace(fresh_partition(), quiescent);
}

}  // namespace cuda
}  // namespace fa2a
