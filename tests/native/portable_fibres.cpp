// The way between stacks that machines other than x86-64 take, on any machine: a fibre keeps its place and its values.
#define FA2A_PORTABLE_FIBRES 1
#define twin portable_twin  // beside the core's own, which is the other way
#include "kernels/cuda/twin/fibre.cpp"
#undef twin

namespace {

fa2a::portable_twin::Fibre main_fibre, fibres[2];
int sums[2] = {};

void add_up(int which) {
  int sum = 0;
  for (int i = 1; i <= 10; ++i) {
    sum += i * (which + 1);
    sums[which] = sum;
    main_fibre.switch_from(fibres[which], /*last=*/i == 10);
  }
}

void first() {
  fibres[0].arrived(main_fibre);
  add_up(0);
}
void second() {
  fibres[1].arrived(main_fibre);
  add_up(1);
}

}  // namespace

int main() {
  static fa2a::u8 stacks[2][64 << 10];
  fibres[0].prepare(stacks[0], sizeof stacks[0], first);
  fibres[1].prepare(stacks[1], sizeof stacks[1], second);
  for (int turn = 0; turn < 10; ++turn)
    for (auto& fibre : fibres) fibre.switch_from(main_fibre);
  return sums[0] == 55 && sums[1] == 110 ? 0 : 1;
}
