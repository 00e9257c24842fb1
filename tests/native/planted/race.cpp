// A planted race: a row is published by a plain store. ThreadSanitizer must report it, or its silence says nothing.
#include <thread>

int row = 0;
bool published = false;

int main() {
  std::thread writer([] {
    row = 1;
    published = true;
  });
  const int seen = published ? row : 0;
  writer.join();
  return seen > 1;
}
