// A door hands its file to a process of the same user, and to no other; whoever stands at a number as another is not
// asked.
#include <signal.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "host/clock.hpp"
#include "host/door.hpp"

namespace {

constexpr fa2a::u64 kNumber = 0xfa2a'd00fULL << 32;
constexpr uid_t kSomebodyElse = 65534;
constexpr fa2a::i64 kPatienceNs = 2000ll * 1000000;
constexpr char kWords[] = "what stands in the file";

int failures = 0;

void expect(bool holds, const char* what) {
  std::printf("%s: %s\n", holds ? "ok" : "FAILED", what);
  failures += holds ? 0 : 1;
}

int file_with_words() {
  const int file = memfd_create("doors", MFD_CLOEXEC);
  if (write(file, kWords, sizeof kWords) != sizeof kWords) return -1;
  return file;
}

sockaddr_un name_of(fa2a::u64 number, socklen_t& num_bytes) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const int length = std::snprintf(address.sun_path + 1, sizeof address.sun_path - 1, "fa2a-%016llx",
                                   static_cast<unsigned long long>(number));
  num_bytes = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + static_cast<size_t>(length));
  return address;
}

bool holds_the_words(int file) {
  char read_words[sizeof kWords] = {};
  return file >= 0 && pread(file, read_words, sizeof read_words, 0) == sizeof read_words &&
         memcmp(read_words, kWords, sizeof kWords) == 0;
}

// One byte with room for a file beside it. Not the door's own: this program plays those who do not use it.
struct Letter {
  char byte = '!';
  alignas(cmsghdr) char beside[CMSG_SPACE(sizeof(int))] = {};
  iovec body{&byte, 1};
  msghdr message{};

  Letter() {
    message.msg_iov = &body;
    message.msg_iovlen = 1;
    message.msg_control = beside;
    message.msg_controllen = sizeof beside;
  }
};

// Knocks as a process would that does not look who answers; the door has to look who knocks.
int ask_unchecked(fa2a::u64 number) {
  socklen_t num_bytes = 0;
  const sockaddr_un address = name_of(number, num_bytes);
  const int one = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const fa2a::i32 what = 7;
  if (connect(one, reinterpret_cast<const sockaddr*>(&address), num_bytes) != 0) return -1;
  if (send(one, &what, sizeof what, MSG_NOSIGNAL) != sizeof what) return -1;
  Letter letter;
  if (recvmsg(one, &letter.message, MSG_CMSG_CLOEXEC) != 1 || CMSG_FIRSTHDR(&letter.message) == nullptr) return -1;
  int file = -1;
  memcpy(&file, CMSG_DATA(CMSG_FIRSTHDR(&letter.message)), sizeof file);
  return file;
}

// As `user`, in a process of its own: is it handed the words?
bool is_handed_the_words(fa2a::u64 number, uid_t user) {
  const pid_t child = fork();
  if (child == 0) {
    if (user != geteuid() && setuid(user) != 0) _exit(0);  // counts as a failure of the test, which is root
    _exit(holds_the_words(ask_unchecked(number)) ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// Hands out the words as `user` at a number, whoever comes. The one who asks has to look who answers.
bool believes_an_impostor(fa2a::u64 number, uid_t user) {
  int ready[2];
  if (pipe(ready) != 0) return true;
  const pid_t child = fork();
  if (child == 0) {
    if (setuid(user) != 0) _exit(2);
    socklen_t num_bytes = 0;
    const sockaddr_un address = name_of(number, num_bytes);
    const int one = socket(AF_UNIX, SOCK_STREAM, 0);
    char byte = '!';
    if (bind(one, reinterpret_cast<const sockaddr*>(&address), num_bytes) != 0 || listen(one, 1) != 0) _exit(2);
    if (write(ready[1], &byte, 1) != 1) _exit(2);
    const int visitor = accept(one, nullptr, nullptr);
    Letter letter;
    cmsghdr* header = CMSG_FIRSTHDR(&letter.message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    const int file = file_with_words();
    memcpy(CMSG_DATA(header), &file, sizeof file);
    sendmsg(visitor, &letter.message, MSG_NOSIGNAL);
    _exit(0);
  }
  close(ready[1]);
  char byte = 0;
  const bool is_there = read(ready[0], &byte, 1) == 1;
  const int file = fa2a::Door::ask(number, 7, kPatienceNs);
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  return !is_there || file >= 0;
}

// A process that ends while it looks for the file. Who asks may have a minute for it, and needs none.
bool ends_with_its_door(fa2a::u64 number) {
  int ready[2];
  if (pipe(ready) != 0) return false;
  const pid_t child = fork();
  if (child == 0) {
    fa2a::Door door(number, [](fa2a::i32) -> fa2a::i32 { _exit(0); });
    char byte = '!';
    if (write(ready[1], &byte, 1) != 1) _exit(2);
    pause();
  }
  char byte = 0;
  if (read(ready[0], &byte, 1) != 1) return false;
  const fa2a::i64 from_ns = fa2a::now_ns();
  const int file = fa2a::Door::ask(number, 7, 30 * kPatienceNs);
  waitpid(child, nullptr, 0);
  return file == -1 && fa2a::now_ns() - from_ns < kPatienceNs;
}

}  // namespace

int main() {
  {
    fa2a::Door door(kNumber + 1, [](fa2a::i32 what) { return what == 7 ? file_with_words() : -1; });
    expect(holds_the_words(fa2a::Door::ask(kNumber + 1, 7, kPatienceNs)), "who asks for it gets the file");
    expect(is_handed_the_words(kNumber + 1, geteuid()), "another process of the same user gets it");
    expect(fa2a::Door::ask(kNumber + 1, 8, kPatienceNs) == -1, "what the door has no file for is -1");
    if (geteuid() == 0) expect(!is_handed_the_words(kNumber + 1, kSomebodyElse), "another user's process gets nothing");
  }
  expect(fa2a::Door::ask(kNumber + 1, 7, kPatienceNs) == -1, "a door that is gone gives nothing");
  expect(ends_with_its_door(kNumber + 3), "a door whose process ends keeps nobody waiting");
  if (geteuid() == 0)
    expect(!believes_an_impostor(kNumber + 2, kSomebodyElse), "another user's door is not believed");
  else
    std::printf("not root: other users were left out\n");
  return failures == 0 ? 0 : 1;
}
