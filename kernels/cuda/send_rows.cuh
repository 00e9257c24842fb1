// One token's row on its way out, its headers, and the claims that go before: by all threads of a block.
#pragma once

#include "kernels/cuda/quantize.cuh"

namespace fa2a {
namespace device {

struct SendShared {
  u8* rows[kMaxTopk];     // where the token goes, one place a rank
  u8* headers[kMaxTopk];  // and their headers
  i32 header_words[kMaxTopk + 1];
  u32 words[8 * kMaxTopk];  // the headers themselves, one behind the other
  i32 num_places;
  u32 is_last;
};

FA2A_DEVICE void put_headers(const SendShared& shared) {
  for (i32 place = warp(); place < shared.num_places; place += num_warps()) {
    const i32 first = shared.header_words[place], end = shared.header_words[place + 1];
    for (i32 at = first + 4 * lane(); at < end; at += 4 * kWarpLanes) {
      const Vector16 value{{shared.words[at], shared.words[at + 1], shared.words[at + 2], shared.words[at + 3]}};
      put(shared.headers[place] + sizeof(u32) * static_cast<u64>(at - first), value);
    }
  }
}

// The claims that go with the first signal: how many rows each of the destination's experts will get.
FA2A_DEVICE void put_claims(const DeviceRank& r, const DeviceRound& round) {
  const i32 num_experts = r.shape.max_local_experts;
  for (i32 dst = block_idx(); dst < r.shape.num_ranks; dst += num_blocks()) {
    if (!round.opened.has(dst)) continue;
    u8* to = r.outbound[dst] + r.at.claims[parity_of(round)];
    for (i32 expert = thread_idx(); expert < num_experts; expert += num_threads())
      put(to + sizeof(i32) * static_cast<u64>(expert), static_cast<u32>(round.claims_to[dst * num_experts + expert]));
  }
}

FA2A_DEVICE void put_token(const DeviceRank& r, const SendArgs& args, i32 token, const SendShared& shared) {
  const auto row = static_cast<u64>(token);
  if (args.scales == nullptr && r.format.quantize != WireFormat::Quantize::never)
    return quantize_row(r, shared.rows, shared.num_places, args.x + static_cast<u64>(r.shape.hidden_bytes) * row);
  put_row(shared.rows, shared.num_places, args.x + r.format.payload_bytes * row, r.format.payload_bytes);
  if (args.scales == nullptr) return;
  u8* at_scales[1];
  for (i32 place = 0; place < shared.num_places; ++place) {
    at_scales[0] = shared.rows[place] + r.format.scales_at;
    put_row(at_scales, 1, args.scales + r.format.scale_bytes * row, r.format.scale_bytes);
  }
}

}  // namespace device
}  // namespace fa2a
