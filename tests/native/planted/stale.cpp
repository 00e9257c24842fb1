// A planted stale read: a row is used after its window is gone. AddressSanitizer must report it.
#include <memory>

int main() {
  auto window = std::make_unique<int[]>(16);
  volatile int* row = window.get();
  window.reset();
  return row[3];
}
