// Reserving, mapping and swapping the windows of a GPU.
#include "transport/cuda_window.hpp"

#include <stdexcept>
#include <utility>

namespace fa2a {
namespace cuda {

namespace {

AllocationProperties properties_of(int device, HandleType type) {
  AllocationProperties properties;
  properties.handle_types = type;
  properties.location.id = device;
  return properties;
}

}  // namespace

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
    : driver_(driver), device_(device), num_bytes_(num_bytes), granule_bytes_(granule_bytes) {
  check(driver_, driver_.reserve(&address_, num_bytes_, granule_bytes_, 0, 0), "cuMemAddressReserve");
}

Range::~Range() {
  unmap();
  driver_.free_address(address_, num_bytes_);
}

// Piece by piece, as it was mapped: the driver unmaps whole mappings only.
void Range::unmap() noexcept {
  for (u64 at = 0; at < num_mapped_bytes_; at += piece_bytes_) driver_.unmap(address_ + at, piece_bytes_);
  num_mapped_bytes_ = 0;
  memory_.reset();
}

void Range::map_piece(Address at, u64 num_bytes, Handle handle) {
  check(driver_, driver_.map(at, num_bytes, 0, handle, 0), "cuMemMap");
  piece_bytes_ = num_bytes;
  num_mapped_bytes_ += num_bytes;
}

void Range::open_access() {
  AccessDescription access;
  access.location.id = device_;
  check(driver_, driver_.set_access(address_, num_bytes_, &access, 1), "cuMemSetAccess");
}

void Range::map(Memory memory) {
  if (num_mapped_bytes_ != 0) throw std::logic_error("memory lies at this address already; replace it");
  map_piece(address_, num_bytes_, memory.handle());
  memory_ = std::make_unique<Memory>(std::move(memory));
  open_access();
}

void Range::replace(Memory memory, const Quiescent&) {
  unmap();
  map(std::move(memory));
}

void Range::replace_by_dummy(const Memory& dummy, const Quiescent&) {
  unmap();
  for (u64 at = 0; at < num_bytes_; at += granule_bytes_) map_piece(address_ + at, granule_bytes_, dummy.handle());
  open_access();
}

Windows::Windows(const Driver& driver, int device, HandleType type, const Layout& layout)
    : driver_(driver), device_(device), type_(type), layout_(layout) {
  const AllocationProperties properties = properties_of(device, type);
  size_t granule = 0;
  check(driver_, driver_.get_granularity(&granule, &properties, /*minimum*/ 0), "cuMemGetAllocationGranularity");
  granule_bytes_ = granule;
  num_bytes_ = round_up(layout.partition_bytes, granule_bytes_);
  dummy_ = std::make_unique<Memory>(new_memory(granule_bytes_));
  for (i32 writer = 0; writer < layout.num_writers; ++writer) {
    inbound_.push_back(std::make_unique<Range>(driver_, device_, num_bytes_, granule_bytes_));
    inbound_.back()->map(new_memory(num_bytes_));
  }
  for (i32 owner = 0; owner < layout.num_ranks; ++owner)
    outbound_.push_back(owner == layout.rank ? nullptr
                                             : std::make_unique<Range>(driver_, device_, num_bytes_, granule_bytes_));
}

Range& Windows::range_in(i32 owner) const {
  return *(owner == layout_.rank ? inbound_ : outbound_)[static_cast<size_t>(owner)];
}

Range& Windows::peer_range(i32 owner) const {
  if (owner == layout_.rank) throw std::logic_error("a rank's own window is not a peer's");
  return range_in(owner);
}

int Windows::export_partition(i32 writer) const {
  return inbound_[static_cast<size_t>(writer)]->memory()->export_file_descriptor();
}

void Windows::open(i32 owner, int fd) { peer_range(owner).map(Memory::import_file_descriptor(driver_, fd)); }

void Windows::unplug(i32 owner, const Quiescent& quiescent) { peer_range(owner).replace_by_dummy(*dummy_, quiescent); }

void Windows::plug(i32 owner, int fd, const Quiescent& quiescent) {
  peer_range(owner).replace(Memory::import_file_descriptor(driver_, fd), quiescent);
}

void Windows::renew(i32 writer, const Quiescent& quiescent) {
  // Made before the old one is let go: without memory for it the partition stays as it was.
  Memory fresh = new_memory(num_bytes_);
  inbound_[static_cast<size_t>(writer)]->replace(std::move(fresh), quiescent);
}

}  // namespace cuda
}  // namespace fa2a
