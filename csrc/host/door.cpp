// Sockets in the abstract namespace, and files that travel beside one byte.
#include "host/door.hpp"

#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <stdexcept>
#include <string>

#include "host/clock.hpp"

namespace fa2a {

namespace {

constexpr i64 kPatienceNs = 1000ll * 1000000;  // with a visitor that says nothing
constexpr i64 kPauseNs = 10ll * 1000000;       // while this process has no number for another file

struct Address {
  sockaddr_un socket{};
  socklen_t num_bytes = 0;
};

// A name that begins with a zero stands in no folder.
Address address_of(u64 number) {
  Address address;
  address.socket.sun_family = AF_UNIX;
  char* name = address.socket.sun_path + 1;
  const int length =
      snprintf(name, sizeof address.socket.sun_path - 1, "fa2a-%016llx", static_cast<unsigned long long>(number));
  address.num_bytes = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + static_cast<size_t>(length));
  return address;
}

void set_patience(i32 socket, i64 timeout_ns) {
  const timeval patience{static_cast<time_t>(timeout_ns / 1000000000),
                         static_cast<suseconds_t>(timeout_ns / 1000 % 1000000)};
  setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
  setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
}

// Of the process at the other end. A name in the abstract namespace has no owner and no mode: whoever sees
// /proc/net/unix can knock, or be there first under a number that it has read on a page.
bool is_same_user(i32 socket) {
  ucred other{};
  socklen_t num_bytes = sizeof other;
  return getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &other, &num_bytes) == 0 && other.uid == geteuid();
}

// One message of one byte with room for a file beside it.
struct Letter {
  char byte = '!';
  iovec body{&byte, 1};
  alignas(cmsghdr) char beside[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};

  Letter() {
    message.msg_iov = &body;
    message.msg_iovlen = 1;
    message.msg_control = beside;
    message.msg_controllen = sizeof beside;
  }
};

void send_file(i32 socket, i32 file) {
  Letter letter;
  if (file < 0) letter.message.msg_controllen = 0;
  if (cmsghdr* header = CMSG_FIRSTHDR(&letter.message); header != nullptr) {
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &file, sizeof file);
  }
  sendmsg(socket, &letter.message, MSG_NOSIGNAL);
}

i32 receive_file(i32 socket) {
  Letter letter;
  if (recvmsg(socket, &letter.message, MSG_CMSG_CLOEXEC) != 1) return -1;
  const cmsghdr* header = CMSG_FIRSTHDR(&letter.message);
  if (header == nullptr || header->cmsg_type != SCM_RIGHTS || header->cmsg_len != CMSG_LEN(sizeof(int))) return -1;
  int file = -1;
  memcpy(&file, CMSG_DATA(header), sizeof file);
  return file;
}

}  // namespace

Door::Door(u64 number, std::function<i32(i32)> give)
    : give_(std::move(give)), socket_(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
  const Address address = address_of(number);
  if (socket_ < 0 || bind(socket_, reinterpret_cast<const sockaddr*>(&address.socket), address.num_bytes) != 0 ||
      listen(socket_, 128) != 0) {
    const std::string why = strerror(errno);
    if (socket_ >= 0) ::close(socket_);
    throw std::runtime_error("no socket to hand a window over by: " + why + "; look at the limit of open files");
  }
  thread_ = std::thread(&Door::serve, this);
}

Door::~Door() {
  shutdown(socket_, SHUT_RDWR);  // wakes the thread
  thread_.join();
  ::close(socket_);
}

void Door::serve() {
  for (;;) {
    const i32 visitor = accept4(socket_, nullptr, nullptr, SOCK_CLOEXEC);
    if (visitor < 0 && errno == EINVAL) return;
    if (visitor < 0) {
      if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) sleep_ns(kPauseNs);
      continue;  // it left again, or waits until there is room
    }
    answer(visitor);
    ::close(visitor);
  }
}

void Door::answer(i32 visitor) {
  if (!is_same_user(visitor)) return;
  set_patience(visitor, kPatienceNs);
  i32 what = -1;
  if (recv(visitor, &what, sizeof what, MSG_WAITALL) != sizeof what) return;
  const i32 file = give_(what);
  send_file(visitor, file);
  if (file >= 0) ::close(file);
}

i32 Door::ask(u64 number, i32 what, i64 timeout_ns) noexcept {
  const i32 socket = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (socket < 0) return -1;
  set_patience(socket, timeout_ns);
  const Address address = address_of(number);
  i32 file = -1;
  if (connect(socket, reinterpret_cast<const sockaddr*>(&address.socket), address.num_bytes) == 0 &&
      is_same_user(socket) && send(socket, &what, sizeof what, MSG_NOSIGNAL) == sizeof what)
    file = receive_file(socket);
  ::close(socket);
  return file;
}

}  // namespace fa2a
