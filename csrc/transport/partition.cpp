// A fresh partition, as its owner hands it to one writer incarnation.
#include "protocol/collective.hpp"
#include "protocol/memory.hpp"
#include "transport/fabric.hpp"

namespace fa2a {

void prepare_partition(u8* partition, const Shape& shape, i32 owner, i32 writer, u64 incarnation, Beginning first) {
  const PartitionLayout at = partition_layout(shape);
  auto* header = reinterpret_cast<PartitionHeader*>(partition + at.header);
  *header = {kPartitionMagic, shape_hash(shape), incarnation, owner, writer};
  for (u32 parity = 0; parity < kNumParities; ++parity) {
    store_release(reinterpret_cast<u64*>(partition + at.collective_word[parity]),
                  fresh_collective_word(first.collective));
    for (u32 verb = 0; verb < kNumVerbs; ++verb) {
      for (u32 half = 0; half < kNumHalves; ++half)
        store_release(reinterpret_cast<u64*>(partition + at.signal[verb][parity][half]),
                      fresh_word(first.round, parity));
      store_release(reinterpret_cast<u64*>(partition + at.taken[verb][parity]), fresh_word(first.round, parity));
    }
  }
}

void forget_sent(SentWords& sent, Beginning first) {
  for (u32 kind = 0; kind < kNumWordKinds; ++kind) {
    const bool is_collective = kind == static_cast<u32>(WordKind::collective);
    for (u32 parity = 0; parity < kNumParities; ++parity)
      store_release(&sent.words[kind][parity],
                    is_collective ? fresh_collective_word(first.collective) : fresh_word(first.round, parity));
  }
}

}  // namespace fa2a
