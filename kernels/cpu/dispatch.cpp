// Dispatch on the CPU, the half that sends: check, begin the round, route, and one row per (token, destination rank).
#include <string.h>

#include "kernels/cpu/quantize.hpp"
#include "kernels/cpu/stream.hpp"

namespace fa2a {

namespace {

i64 expert_at(const DispatchArgs& args, size_t i) {
  return args.idx_is_64_bit ? static_cast<const i64*>(args.topk_idx)[i] : static_cast<const i32*>(args.topk_idx)[i];
}

// Everything that depends on the values is checked before the round begins: after that, peers count on us.
DispatchResult check_choices(const Context& c, const DispatchArgs& args) {
  DispatchResult bad;
  const i32 k = c.shape.num_topk;
  for (i32 token = 0; token < args.num_tokens; ++token) {
    for (i32 choice = 0; choice < k; ++choice) {
      const i64 expert = expert_at(args, static_cast<size_t>(token) * k + choice);
      bad.token = token;
      bad.choice = choice;
      bad.value = expert;
      if (expert < -1 || expert >= c.shape.num_experts) {
        bad.status = Status::bad_expert;
        return bad;
      }
      for (i32 before = 0; expert >= 0 && before < choice; ++before) {
        if (expert_at(args, static_cast<size_t>(token) * k + before) != expert) continue;
        bad.status = Status::repeated_expert;
        return bad;
      }
    }
  }
  return {};
}

// Waits until the round may begin, publishes that it has, and keeps the view it uses.
Status begin_round(Context& c, CpuMachine& machine, u64 round, OpenRound& open) {
  for (;;) {
    const Waited waited = wait_for(machine, *c.state, kNobody,
                                   [&] { return gate_is_open(*c.state, round) ? Reading::present : Reading::absent; });
    if (waited == Waited::released) {
      // ok: quorum came back between the two looks, and this round has not begun.
      const Status why = released_status(*c.state);
      if (why != Status::ok) return why;
      continue;
    }
    if (start_round(*c.state, round)) break;
  }
  const View& view = view_for_round(c.state->ring, round);
  open.round = round;
  open.epoch = view.epoch;
  open.active = view.active;
  open.partitions.assign(view.partitions, view.partitions + c.shape.num_ranks);
  open.trusted = RankSet();
  for (i32 src = 0; src < c.shape.num_ranks; ++src) {
    const auto* header = reinterpret_cast<const PartitionHeader*>(c.inbound(open, src) + c.at.header);
    if (header->incarnation == view.incarnations[src] || !guarded(guard_incarnation)) open.trusted.add(src);
  }
  return Status::ok;
}

// Which rank each choice goes to, and which of that rank's combine rows will answer it.
void route_choices(const Context& c, const DispatchArgs& args, OpenRound& open) {
  const size_t k = static_cast<size_t>(c.shape.num_topk);
  const size_t num_choices = static_cast<size_t>(args.num_tokens) * k;
  const auto n = static_cast<size_t>(c.shape.num_ranks);
  open.num_tokens = args.num_tokens;
  open.topk_idx.resize(num_choices);
  open.dst_rank.assign(num_choices, -1);
  open.combine_row.assign(num_choices, -1);
  open.topk_weights.assign(args.topk_weights, args.topk_weights + num_choices);
  open.rows_to.assign(n + 1, 0);
  open.answers_from.assign(n, 0);
  open.rows_of_expert.assign(c.expert_rank.size(), 0);
  std::vector<i32> last_token(n, -1);
  for (size_t i = 0; i < num_choices; ++i) {
    open.topk_idx[i] = static_cast<i32>(expert_at(args, i));
    if (open.topk_idx[i] < 0) continue;
    const i32 dst = c.expert_rank[static_cast<size_t>(open.topk_idx[i])];
    const auto d = static_cast<size_t>(dst);
    open.dst_rank[i] = dst;
    ++open.rows_of_expert[static_cast<size_t>(open.topk_idx[i])];
    const bool new_row = last_token[d] != static_cast<i32>(i / k);
    last_token[d] = static_cast<i32>(i / k);
    if (new_row) ++open.rows_to[d + 1];
    // reduce="expert": one answer a row, whichever choices it sums.
    open.combine_row[i] = c.shape.reduce_at_expert ? open.rows_to[d + 1] - 1 : open.answers_from[d];
    open.answers_from[d] = c.shape.reduce_at_expert ? open.rows_to[d + 1] : open.answers_from[d] + 1;
  }
}

// The tokens of each destination's rows, in order: a chunk is a stretch of them.
void list_rows(const Context& c, OpenRound& open) {
  const size_t k = static_cast<size_t>(c.shape.num_topk);
  const auto n = static_cast<size_t>(c.shape.num_ranks);
  for (size_t dst = 0; dst < n; ++dst) open.rows_to[dst + 1] += open.rows_to[dst];
  open.row_tokens.resize(static_cast<size_t>(open.rows_to[n]));
  std::vector<i32> next(open.rows_to.begin(), open.rows_to.end() - 1);
  std::vector<i32> last_token(n, -1);
  for (size_t i = 0; i < open.dst_rank.size(); ++i) {
    if (open.dst_rank[i] < 0) continue;
    const auto dst = static_cast<size_t>(open.dst_rank[i]);
    const auto token = static_cast<i32>(i / k);
    if (last_token[dst] == token) continue;
    last_token[dst] = token;
    open.row_tokens[static_cast<size_t>(next[dst]++)] = token;
  }
}

// How many rows each of the destination's experts will get: it places the first row before the last has come.
void store_claims(Context& c, const OpenRound& open, i32 dst) {
  std::vector<i32> claims(static_cast<size_t>(c.shape.max_local_experts), 0);
  for (size_t expert = 0; expert < c.expert_rank.size(); ++expert)
    if (c.expert_rank[expert] == dst) claims[static_cast<size_t>(c.expert_local[expert])] = open.rows_of_expert[expert];
  c.wire->put_claims(dst, c.fabric->outbound(dst) + c.at.claims[open.round % kNumParities], claims.data(),
                     c.shape.max_local_experts);
}

// Every row is quantised once, however many ranks it goes to.
void quantize(const Context& c, const DispatchArgs& args, OpenRound& open) {
  const bool is_float32 = c.format.quantize == WireFormat::Quantize::float32;
  const u64 row_bytes = static_cast<u64>(c.shape.dispatch_bytes);
  open.quantized.resize(static_cast<size_t>(args.num_tokens) * row_bytes);
  for (i32 token = 0; token < args.num_tokens; ++token) {
    u8* row = open.quantized.data() + row_bytes * static_cast<u64>(token);
    quantize_row(c.dtype, is_float32 ? ScaleFormat::float32 : ScaleFormat::ue8m0, row, row + c.format.scales_at,
                 args.x + static_cast<u64>(c.shape.hidden_bytes) * static_cast<u64>(token), c.hidden());
  }
  open.x = open.quantized.data();
}

void put_token(Context& c, const OpenRound& open, i32 dst, u8* to, i32 token) {
  const auto row_bytes = static_cast<u64>(c.shape.dispatch_bytes);
  const auto row = static_cast<u64>(token);
  if (open.scales == nullptr) return c.wire->put_row(dst, to, open.x + row_bytes * row, row_bytes, open.streamed);
  c.wire->put_row(dst, to, open.x + c.format.payload_bytes * row, c.format.payload_bytes, open.streamed);
  c.wire->put_row(dst, to + c.format.scales_at, open.scales + c.format.scale_bytes * row, c.format.scale_bytes,
                  /*streamed=*/false);
}

// Stores the rows of one chunk; nothing tells of them yet. Returns their number.
u64 store_chunk(Context& c, const OpenRound& open, i32 dst, i32 chunk) {
  const i32 k = c.shape.num_topk;
  const u32 parity = open.round % kNumParities;
  u8* partition = c.fabric->outbound(dst);
  const i32 first = open.rows_to[static_cast<size_t>(dst)] + chunk * c.at.num_dispatch_rows;
  const i32 end = open.rows_to[static_cast<size_t>(dst) + 1];
  const i32 last = end - first < c.at.num_dispatch_rows ? end : first + c.at.num_dispatch_rows;
  u64 slot = static_cast<u64>(half_of(c, chunk)) * static_cast<u64>(c.at.num_dispatch_rows);
  std::vector<RowChoice> choices(static_cast<size_t>(c.at.max_choices));
  for (i32 row = first; row < last; ++row, ++slot) {
    const i32 token = open.row_tokens[static_cast<size_t>(row)];
    RowHeader header{token, 0};
    for (i32 choice = 0; choice < k; ++choice) {
      const size_t i = static_cast<size_t>(token) * k + choice;
      if (open.dst_rank[i] != dst) continue;
      const i32 local_expert = c.expert_local[static_cast<size_t>(open.topk_idx[i])];
      choices[static_cast<size_t>(header.num_choices++)] = {local_expert, choice, open.topk_weights[i]};
    }
    auto* at = reinterpret_cast<RowHeader*>(partition + c.at.row_headers[parity] + c.at.header_stride * slot);
    c.wire->put_row_header(dst, at, header, choices.data());
    put_token(c, open, dst, partition + c.at.dispatch_rows[parity] + c.at.dispatch_stride * slot, token);
    if (2 * (row - first + 1) >= last - first) c.wire->at(Point::dispatch_send_rows, open.round);
  }
  return static_cast<u64>(last - first);
}

// Every active peer hears of every round, zero rows included, so that no word of it can ever mean "perhaps later". To a
// suspect, and to a peer that has not yet given back the slot of two rounds ago, only the control word goes.
void send_first_chunks(Context& c, CpuMachine& machine, OpenRound& open) {
  machine.enter(Phase::dispatch_send);
  auto opens = [&](i32 dst) {
    if (!open.active.has(dst) || is_suspect(*c.state, dst)) return 0;
    // Its answer begins with its first chunk, and by then it had copied all of mine.
    if (!slot_is_free(load_signal(c, open, Verb::combine, dst, 0), open.round) && !c.wire->ignores_consent()) return 0;
    store_claims(c, open, dst);
    return num_chunks_of(open.num_rows_to(dst), c.at.num_dispatch_rows);
  };
  begin_streams(c, open, Verb::dispatch,
                {Point::dispatch_rows_sent, Point::dispatch_half_signalled, Point::dispatch_signalled}, opens,
                [&](i32 dst, i32 chunk) { return store_chunk(c, open, dst, chunk); });
}

}  // namespace

bool continue_dispatch(Context& c, CpuMachine& machine, OpenRound& open, i32 dst) {
  return continue_stream(c, machine, open, Verb::dispatch, dst,
                         [&](i32 chunk) { return store_chunk(c, open, dst, chunk); });
}

void give_up_dispatch(Context& c, OpenRound& open) {
  open.taken = RankSet();
  open.received.clear();
  open.received_from.assign(static_cast<size_t>(c.shape.num_ranks) + 1, 0);
  stop_streams(c, open, Verb::dispatch);
  for (i32 peer = 0; peer < c.shape.num_ranks; ++peer)
    if (open.active.has(peer)) refuse(c, open, Verb::dispatch, peer, 0);
}

DispatchResult dispatch_send(Context& c, const DispatchArgs& args) {
  DispatchResult result = check_choices(c, args);
  if (result.status != Status::ok) return result;
  const u64 round = c.next_round;
  OpenRound& open = c.rounds[round % kNumParities];
  // "Fewer than two open" is not the rule: with rounds r and r + 2 open, their rows share slots.
  if (open.stage != Stage::closed && guarded(guard_third_round)) return {Status::third_round, round, 0, 0, 0, 0};

  CpuMachine machine(c, round);
  c.wire->at(Point::dispatch_gate, round);
  machine.enter(Phase::gate);
  result.status = begin_round(c, machine, round, open);
  if (result.status != Status::ok) return result;
  c.wire->at(Point::dispatch_started, round);
  open.stage = Stage::sent;
  open.x = args.x;
  open.scales = args.scales;
  ++c.next_round;
  route_choices(c, args, open);
  list_rows(c, open);
  if (c.format.quantize != WireFormat::Quantize::never && args.scales == nullptr) quantize(c, args, open);
  open.streamed = c.streams(open.row_tokens.size() * static_cast<u64>(c.shape.dispatch_bytes));
  send_first_chunks(c, machine, open);
  machine.enter(Phase::caller);
  result.round = round;
  return result;
}

}  // namespace fa2a
