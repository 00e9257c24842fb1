// shm_open and memfd_create, reserve, map; and the errors a full or missing /dev/shm must end in.
#include "host/shared_memory.hpp"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
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

u8* map_shared(int fd, u64 num_bytes, const std::string& name, bool keep_open) {
  void* data = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
  const int error = errno;
  if (!keep_open || data == MAP_FAILED) ::close(fd);
  errno = error;
  if (data == MAP_FAILED) fail("mapping", name, "Free memory or lower num_max_tokens_per_rank.");
  return static_cast<u8*>(data);
}

}  // namespace

SharedMemory SharedMemory::create(const std::string& name, u64 num_bytes, bool keep_open) {
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
  return SharedMemory(map_shared(fd, num_bytes, name, keep_open), num_bytes, keep_open ? fd : -1);
}

SharedMemory SharedMemory::create_unnamed(u64 num_bytes) {
  const char* name = "(unnamed)";
  const int fd = memfd_create("fa2a", MFD_CLOEXEC);
  if (fd < 0) fail("creation", name, "The process has too many open files, or memory is short.");
  const int error = posix_fallocate(fd, 0, static_cast<off_t>(num_bytes));
  if (error != 0) {
    ::close(fd);
    errno = error;
    fail("reservation of " + std::to_string(num_bytes) + " bytes", name,
         "Free memory or lower num_max_tokens_per_rank.");
  }
  return SharedMemory(map_shared(fd, num_bytes, name, /*keep_open=*/true), num_bytes, fd);
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
  return SharedMemory(map_shared(fd, num_bytes, name, /*keep_open=*/false), num_bytes);
}

SharedMemory SharedMemory::anonymous(u64 num_bytes) {
  void* data = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) fail("mapping", "(anonymous)", "Free memory or lower num_max_tokens_per_rank.");
  return SharedMemory(static_cast<u8*>(data), num_bytes);
}

void SharedMemory::unlink(const std::string& name) noexcept { shm_unlink(name.c_str()); }

SharedMemory::SharedMemory(SharedMemory&& other) noexcept
    : data_(other.data_), num_bytes_(other.num_bytes_), fd_(other.fd_) {
  other.data_ = nullptr;
  other.fd_ = -1;
}

SharedMemory& SharedMemory::operator=(SharedMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(num_bytes_, other.num_bytes_);
  std::swap(fd_, other.fd_);
  return *this;
}

SharedMemory::~SharedMemory() {
  if (data_ != nullptr) munmap(data_, num_bytes_);
  if (fd_ >= 0) ::close(fd_);
}

OpenFile::~OpenFile() {
  if (fd_ >= 0) ::close(fd_);
}

OpenFile& OpenFile::operator=(OpenFile&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

OpenFile OpenFile::of_process(i32 pid, i32 fd) noexcept {
  char path[64];
  snprintf(path, sizeof path, "/proc/%d/fd/%d", pid, fd);
  return OpenFile(::open(path, O_RDWR | O_CLOEXEC));
}

OpenFile OpenFile::fresh_memory(u64 num_bytes) noexcept {
  OpenFile file(memfd_create("fa2a", MFD_CLOEXEC));
  if (file.fd() < 0 || posix_fallocate(file.fd(), 0, static_cast<off_t>(num_bytes)) != 0) return OpenFile();
  return file;
}

u64 OpenFile::num_bytes() const noexcept {
  struct stat status;
  return fd_ >= 0 && fstat(fd_, &status) == 0 ? static_cast<u64>(status.st_size) : 0;
}

bool map_over(u8* address, u64 num_bytes, const OpenFile& file, u64 offset) noexcept {
  // Beyond the file's end a store would be a SIGBUS.
  if (file.num_bytes() < offset + num_bytes) return false;
  // Elsewhere first: what can fail, and what takes long, is over before anything is replaced.
  void* fresh = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file.fd(),
                     static_cast<off_t>(offset));
  if (fresh == MAP_FAILED) return false;
  if (mremap(fresh, num_bytes, num_bytes, MREMAP_MAYMOVE | MREMAP_FIXED, address) != MAP_FAILED) return true;
  munmap(fresh, num_bytes);
  return false;
}

}  // namespace fa2a
