// The planted bug for AddressSanitizer on a fibre, where the CUDA kernels' twin runs: a write behind an array on its
// stack, after it has been left and entered again.
#include "kernels/cuda/twin/fibre.cpp"

namespace {

fa2a::twin::Fibre main_fibre, other;
volatile int behind = 8;

void work() {
  other.arrived(main_fibre);
  int values[8] = {};
  main_fibre.switch_from(other);
  values[behind] = 1;
  behind = values[0];
  main_fibre.switch_from(other, /*last=*/true);
}

}  // namespace

int main() {
  static fa2a::u8 stack[64 << 10];
  other.prepare(stack, sizeof stack, work);
  for (int turn = 0; turn < 2; ++turn) other.switch_from(main_fibre);
  return 0;
}
