// Dispatch on the CPU: route, send one row per (token, destination rank), take every source's rows, expand to
// expert-major.
#include <string.h>

#include "kernels/cpu/machine.hpp"

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
void route(const Context& c, const DispatchArgs& args, OpenRound& open) {
  const size_t k = static_cast<size_t>(c.shape.num_topk);
  const size_t num_choices = static_cast<size_t>(args.num_tokens) * k;
  open.num_tokens = args.num_tokens;
  open.topk_idx.resize(num_choices);
  open.dst_rank.assign(num_choices, -1);
  open.combine_row.assign(num_choices, -1);
  open.topk_weights.assign(args.topk_weights, args.topk_weights + num_choices);
  open.rows_to.assign(static_cast<size_t>(c.shape.num_ranks), 0);
  open.answers_from.assign(static_cast<size_t>(c.shape.num_ranks), 0);
  std::vector<i32> last_token(static_cast<size_t>(c.shape.num_ranks), -1);
  for (size_t i = 0; i < num_choices; ++i) {
    open.topk_idx[i] = static_cast<i32>(expert_at(args, i));
    if (open.topk_idx[i] < 0) continue;
    const i32 dst = c.expert_rank[static_cast<size_t>(open.topk_idx[i])];
    const auto d = static_cast<size_t>(dst);
    open.dst_rank[i] = dst;
    const bool new_row = last_token[d] != static_cast<i32>(i / k);
    last_token[d] = static_cast<i32>(i / k);
    if (new_row) ++open.rows_to[d];
    // reduce="expert": one answer a row, whichever choices it sums.
    open.combine_row[i] = c.shape.reduce_at_expert ? open.rows_to[d] - 1 : open.answers_from[d];
    open.answers_from[d] = c.shape.reduce_at_expert ? open.rows_to[d] : open.answers_from[d] + 1;
  }
}

void send_rows_to(Context& c, const DispatchArgs& args, const OpenRound& open, i32 dst) {
  const i32 k = c.shape.num_topk;
  const u32 parity = open.round % kNumParities;
  u8* partition = c.fabric->outbound(dst);
  const auto hidden_bytes = static_cast<u64>(c.shape.hidden_bytes);
  std::vector<RowChoice> choices(static_cast<size_t>(c.at.max_choices));
  i32 row = 0;
  for (i32 token = 0; token < open.num_tokens; ++token) {
    RowHeader header{token, 0};
    for (i32 choice = 0; choice < k; ++choice) {
      const size_t i = static_cast<size_t>(token) * k + choice;
      if (open.dst_rank[i] != dst) continue;
      const i32 local_expert = c.expert_local[static_cast<size_t>(open.topk_idx[i])];
      choices[static_cast<size_t>(header.num_choices++)] = {local_expert, choice, open.topk_weights[i]};
    }
    if (header.num_choices == 0) continue;
    auto* at =
        reinterpret_cast<RowHeader*>(partition + c.at.row_headers[parity] + c.at.header_stride * static_cast<u64>(row));
    c.wire->put_row_header(dst, at, header, choices.data());
    c.wire->put_rows(dst, partition + c.at.dispatch_rows[parity] + c.at.row_stride * static_cast<u64>(row),
                     args.x + hidden_bytes * static_cast<u64>(token), hidden_bytes);
    ++row;
    if (row * 2 >= open.rows_to[static_cast<size_t>(dst)]) c.wire->at(Point::dispatch_send_rows, open.round);
  }
}

// Every active peer hears of every round, zero rows included, so that no word of it can ever mean "perhaps later". To a
// suspect, and to a peer that has not yet given back the slot of two rounds ago, only the control word goes.
void send(Context& c, CpuMachine& machine, const DispatchArgs& args, OpenRound& open) {
  machine.enter(Phase::dispatch_send);
  const u32 parity = open.round % kNumParities;
  const i32 n = c.shape.num_ranks;
  std::vector<u8> sent(static_cast<size_t>(n), 0);
  for (i32 step = 1; step <= n; ++step) {
    const i32 dst = (c.rank + step) % n;
    if (!open.active.has(dst) || is_suspect(*c.state, dst)) continue;
    const u64 reader_word = load_acquire(Context::word(c.inbound(open, dst), c.at.combine_signal[parity]));
    if (!slot_is_free(reader_word, open.round) && !c.wire->ignores_consent()) continue;
    send_rows_to(c, args, open, dst);
    sent[static_cast<size_t>(dst)] = 1;
  }
  c.wire->at(Point::dispatch_rows_sent, open.round);
  for (i32 step = 1; step <= n; ++step) {
    const i32 dst = (c.rank + step) % n;
    if (step == n / 2 + 1) c.wire->at(Point::dispatch_half_signalled, open.round);
    if (!open.active.has(dst)) continue;
    Signal s;
    s.round = open.round;
    s.epoch = open.epoch;
    s.count = static_cast<u64>(open.rows_to[static_cast<size_t>(dst)]);
    s.declined = sent[static_cast<size_t>(dst)] == 0;
    if (s.declined) s.count = 0;
    c.wire->put_signal(dst, Context::word(c.fabric->outbound(dst), c.at.dispatch_signal[parity]), pack(s), false);
  }
  store_release(&c.fabric->page(c.rank).dispatches_signalled, open.round + 1);
  c.wire->at(Point::dispatch_signalled, open.round);
}

// Copies a source's row headers out and checks each number in the copy: a peer that lies could change the original
// after the check. False: refused, nothing of this source is taken.
bool read_row_headers(Context& c, OpenRound& open, i32 src, u64 count) {
  const u64 max_rows = static_cast<u64>(c.at.num_dispatch_rows);
  if (count > max_rows && guarded(guard_clamp_count)) return false;
  const u8* headers = c.inbound(open, src) + c.at.row_headers[open.round % kNumParities];
  std::vector<u8> copy(c.at.header_stride);
  for (u64 row = 0; row < count; ++row) {
    memcpy(copy.data(), headers + c.at.header_stride * row, c.at.header_stride);
    RowHeader header;
    memcpy(&header, copy.data(), sizeof header);
    const bool counts = header.num_choices >= 1 && header.num_choices <= c.at.max_choices;
    if (!counts && guarded(guard_check_index)) return false;
    for (i32 j = 0; j < header.num_choices; ++j) {
      RowChoice choice;
      memcpy(&choice, copy.data() + sizeof header + sizeof choice * static_cast<u64>(j), sizeof choice);
      const bool in_range = choice.local_expert >= 0 && choice.local_expert < c.num_local_experts &&
                            choice.choice >= 0 && choice.choice < c.shape.num_topk;
      if (!in_range && guarded(guard_check_index)) return false;
      // The same expert twice in a row would overflow its share of recv.x, which counts each token once.
      for (i32 i = 0; i < j && guarded(guard_check_index); ++i)
        if (open.received[open.received.size() - 1 - static_cast<size_t>(i)].local_expert == choice.local_expert)
          return false;
      open.received.push_back(
          {-1, choice.local_expert, src, header.src_token, choice.choice, choice.weight, static_cast<i32>(row)});
    }
  }
  return true;
}

// Waits for every source in rank order. All or nothing: a source is taken with all its rows or not at all.
Status take_sources(Context& c, CpuMachine& machine, OpenRound& open, std::vector<u64>& words) {
  machine.enter(Phase::dispatch_wait);
  c.wire->at(Point::dispatch_wait, open.round);
  const u32 parity = open.round % kNumParities;
  const i32 n = c.shape.num_ranks;
  open.taken = RankSet();
  open.received.clear();
  open.received_from.assign(static_cast<size_t>(n) + 1, 0);
  auto word_of = [&](i32 src) { return Context::word(c.inbound(open, src), c.at.dispatch_signal[parity]); };
  auto reading = [&](i32 src) { return c.read(open, src, load_acquire(word_of(src))); };
  for (i32 src = 0; src < n; ++src)
    if (open.active.has(src) && reading(src) == Reading::absent) machine.expect(src);
  for (i32 src = 0; src < n; ++src) {
    const size_t before = open.received.size();
    if (open.active.has(src)) {
      const Waited waited = wait_for(machine, *c.state, src, [&] { return reading(src); });
      if (waited == Waited::released) {
        machine.expect_nobody();
        return released_status(*c.state);
      }
      const u64 word = load_acquire(word_of(src));
      const u64 count = signal_field::Count::unpack(word);
      if (waited == Waited::present) {
        words[static_cast<size_t>(src)] = word;
        if (read_row_headers(c, open, src, count)) {
          open.taken.add(src);
        } else {
          open.received.resize(before);
          ++c.stats.num_rejected;
        }
      }
    }
    open.received_from[static_cast<size_t>(src) + 1] = static_cast<i32>(open.received.size());
  }
  machine.expect_nobody();
  return Status::ok;
}

// Where each row goes: experts in order, within one by source rank and then by token. Returns how many rows there are.
i32 place_rows(const Context& c, OpenRound& open, const DispatchArgs& args) {
  const auto num_experts = static_cast<size_t>(c.num_local_experts);
  std::vector<i32> next(num_experts, 0);
  for (const Received& row : open.received)
    if (open.taken.has(row.src_rank)) ++next[static_cast<size_t>(row.local_expert)];
  i32 total = 0;
  for (size_t e = 0; e < num_experts; ++e) {
    const i32 num_rows = next[e];
    args.num_tokens_per_expert[e] = num_rows;
    args.offsets[e] = total;
    next[e] = c.packed ? total : static_cast<i32>(e) * c.capacity();
    total += num_rows;
  }
  args.offsets[num_experts] = total;
  for (Received& row : open.received)
    if (open.taken.has(row.src_rank)) row.position = next[static_cast<size_t>(row.local_expert)]++;
  return total;
}

void copy_rows(Context& c, const OpenRound& open, const DispatchArgs& args) {
  size_t num_seen = 0;
  if (open.received.empty()) c.wire->at(Point::dispatch_copy, open.round);
  const auto hidden_bytes = static_cast<u64>(c.shape.hidden_bytes);
  for (const Received& row : open.received) {
    if (num_seen++ == open.received.size() / 4) c.wire->at(Point::dispatch_copy, open.round);
    if (!open.taken.has(row.src_rank)) continue;
    const u8* rows = c.inbound(open, row.src_rank) + c.at.dispatch_rows[open.round % kNumParities];
    memcpy(args.recv_x + hidden_bytes * static_cast<u64>(row.position),
           rows + c.at.row_stride * static_cast<u64>(row.src_row), hidden_bytes);
  }
}

// A source whose word moved while its rows were copied wrote without consent: its rows may be torn, so it was not
// taken.
bool withdraw_changed(Context& c, OpenRound& open, const std::vector<u64>& words) {
  if (!guarded(guard_recheck)) return false;
  bool changed = false;
  for (i32 src = 0; src < c.shape.num_ranks; ++src) {
    if (!open.taken.has(src)) continue;
    const u64 word = load_acquire(Context::word(c.inbound(open, src), c.at.dispatch_signal[open.round % kNumParities]));
    if (word == words[static_cast<size_t>(src)]) continue;
    open.taken.remove(src);
    ++c.stats.num_rechecks;
    changed = true;
  }
  return changed;
}

}  // namespace

DispatchResult dispatch(Context& c, const DispatchArgs& args) {
  DispatchResult result = check_choices(c, args);
  if (result.status != Status::ok) return result;
  const u64 round = c.next_round;
  OpenRound& open = c.rounds[round % kNumParities];
  // "Fewer than two open" is not the rule: with rounds r and r + 2 open, their rows share slots.
  if (open.open && guarded(guard_third_round)) return {Status::third_round, round, 0, 0, 0, 0};

  CpuMachine machine(c, round);
  c.wire->at(Point::dispatch_gate, round);
  machine.enter(Phase::gate);
  result.status = begin_round(c, machine, round, open);
  if (result.status != Status::ok) return result;
  c.wire->at(Point::dispatch_started, round);
  open.open = true;
  ++c.next_round;
  route(c, args, open);
  send(c, machine, args, open);

  std::vector<u64> words(static_cast<size_t>(c.shape.num_ranks), 0);
  result.status = take_sources(c, machine, open, words);
  if (result.status != Status::ok) {
    // A closing rank still owes its peers an answer to this round; close() sends it.
    open.open = result.status == Status::closed;
    return result;
  }
  do {
    result.num_received = place_rows(c, open, args);
    copy_rows(c, open, args);
  } while (withdraw_changed(c, open, words));
  result.round = round;
  ++c.stats.num_rounds;
  machine.enter(Phase::experts);
  c.wire->at(Point::dispatch_taken, round);
  return result;
}

}  // namespace fa2a
