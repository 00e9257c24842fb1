// shm_open, reserve, map; and the errors a full or missing /dev/shm must end in.
#include "host/shared_memory.hpp"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <stdexcept>

namespace fa2a {

namespace {

[[noreturn]] void fail(const std::string& what, const std::string& name, const std::string& next_step) {
  throw std::runtime_error(what + " of shared memory '" + name + "' failed: " + strerror(errno) + ". " + next_step);
}

u8* map_shared(int fd, u64 num_bytes, const std::string& name) {
  void* data = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
  const int error = errno;
  ::close(fd);
  errno = error;
  if (data == MAP_FAILED) fail("mapping", name, "Free memory or lower num_max_tokens_per_rank.");
  return static_cast<u8*>(data);
}

}  // namespace

SharedMemory SharedMemory::create(const std::string& name, u64 num_bytes) {
  const int fd = shm_open(name.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
  if (fd < 0) fail("creation", name, "Check that /dev/shm is mounted and writable.");
  const int error = posix_fallocate(fd, 0, static_cast<off_t>(num_bytes));
  if (error != 0) {
    ::close(fd);
    shm_unlink(name.c_str());
    errno = error;
    fail("reservation of " + std::to_string(num_bytes) + " bytes", name,
         "Enlarge /dev/shm (docker: --shm-size) or lower num_max_tokens_per_rank.");
  }
  return SharedMemory(map_shared(fd, num_bytes, name), num_bytes);
}

SharedMemory SharedMemory::open(const std::string& name, u64 num_bytes) {
  const int fd = shm_open(name.c_str(), O_RDWR | O_CLOEXEC, 0600);
  if (fd < 0) fail("opening", name, "All ranks of a host must see the same /dev/shm.");
  struct stat status;
  if (fstat(fd, &status) != 0 || static_cast<u64>(status.st_size) != num_bytes) {
    ::close(fd);
    errno = EINVAL;
    fail("opening", name, "The peer was built with another Config; give all ranks the same one.");
  }
  return SharedMemory(map_shared(fd, num_bytes, name), num_bytes);
}

SharedMemory SharedMemory::anonymous(u64 num_bytes) {
  void* data = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) fail("mapping", "(anonymous)", "Free memory or lower num_max_tokens_per_rank.");
  return SharedMemory(static_cast<u8*>(data), num_bytes);
}

void SharedMemory::unlink(const std::string& name) noexcept { shm_unlink(name.c_str()); }

SharedMemory::SharedMemory(SharedMemory&& other) noexcept : data_(other.data_), num_bytes_(other.num_bytes_) {
  other.data_ = nullptr;
}

SharedMemory& SharedMemory::operator=(SharedMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(num_bytes_, other.num_bytes_);
  return *this;
}

SharedMemory::~SharedMemory() {
  if (data_ != nullptr) munmap(data_, num_bytes_);
}

}  // namespace fa2a
