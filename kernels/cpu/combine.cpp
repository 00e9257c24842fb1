// Combine on the CPU: expert rows go back to their owners, each owner sums what arrived and says exactly what did not.
#include <string.h>

#include "kernels/cpu/machine.hpp"
#include "kernels/cpu/rows.hpp"

namespace fa2a {

namespace {

struct Span {
  const Received* first;
  const Received* last;
};

Span rows_of(const OpenRound& open, i32 src) {
  const Received* all = open.received.data();
  return {all + open.received_from[static_cast<size_t>(src)], all + open.received_from[static_cast<size_t>(src) + 1]};
}

// One combine row per choice, as the expert wrote it.
u64 return_choices(Context& c, const CombineArgs& args, const OpenRound& open, i32 owner, u8* slots) {
  const auto hidden_bytes = static_cast<u64>(c.shape.hidden_bytes);
  const Span rows = rows_of(open, owner);
  u64 count = 0;
  for (const Received* row = rows.first; row != rows.last; ++row, ++count)
    c.wire->put_answer(owner, slots + c.at.row_stride * count, args.y + hidden_bytes * static_cast<u64>(row->position),
                       hidden_bytes);
  return count;
}

// One combine row per token: this rank's choices of it, weighted and summed here.
u64 return_sums(Context& c, const CombineArgs& args, const OpenRound& open, i32 owner, u8* slots, i32 hidden) {
  const auto hidden_bytes = static_cast<u64>(c.shape.hidden_bytes);
  const Span rows = rows_of(open, owner);
  std::vector<float> sum(static_cast<size_t>(hidden));
  std::vector<u8> rounded(hidden_bytes);
  u64 count = 0;
  for (const Received* row = rows.first; row != rows.last; ++count) {
    memset(sum.data(), 0, sizeof(float) * sum.size());
    for (const i32 src_row = row->src_row; row != rows.last && row->src_row == src_row; ++row)
      add_scaled_row(c.dtype, sum.data(), args.y + hidden_bytes * static_cast<u64>(row->position), row->weight, hidden);
    store_row(c.dtype, rounded.data(), sum.data(), hidden);
    c.wire->put_answer(owner, slots + c.at.row_stride * count, rounded.data(), hidden_bytes);
  }
  return count;
}

// Everybody who is active gets an answer. A source that was not taken, and any suspect, gets `declined`: without it the
// source would wait for ever, and its rows would never be free again.
void answer(Context& c, CpuMachine& machine, const CombineArgs& args, const OpenRound& open, i32 hidden) {
  machine.enter(Phase::combine_send);
  const u32 parity = open.round % kNumParities;
  const i32 n = c.shape.num_ranks;
  std::vector<i64> counts(static_cast<size_t>(n), -1);
  for (i32 step = 1; step <= n; ++step) {
    const i32 owner = (c.rank + step) % n;
    if (!open.taken.has(owner) || args.abandon || is_suspect(*c.state, owner)) continue;
    u8* slots = c.fabric->outbound(owner) + c.at.combine_rows[parity];
    counts[static_cast<size_t>(owner)] =
        static_cast<i64>(c.shape.reduce_at_expert ? return_sums(c, args, open, owner, slots, hidden)
                                                  : return_choices(c, args, open, owner, slots));
  }
  c.wire->at(Point::combine_send_rows, open.round);
  for (i32 step = 1; step <= n; ++step) {
    const i32 owner = (c.rank + step) % n;
    if (step == n / 2 + 1) c.wire->at(Point::combine_half_signalled, open.round);
    if (!open.active.has(owner)) continue;
    const i64 count = counts[static_cast<size_t>(owner)];
    if (count < 0 && !guarded(guard_one_answer)) continue;
    Signal s;
    s.round = open.round;
    s.epoch = open.epoch;
    s.declined = count < 0;
    s.count = count < 0 ? 0 : static_cast<u64>(count);
    c.wire->put_signal(owner, Context::word(c.fabric->outbound(owner), c.at.combine_signal[parity]), pack(s), true);
  }
  store_release(&c.fabric->page(c.rank).combines_signalled[parity], open.round + 1);
  c.wire->at(Point::combine_signalled, open.round);
}

// Waits for every member's answer; returns those whose rows came back whole.
Status gather(Context& c, CpuMachine& machine, const OpenRound& open, RankSet& delivered, std::vector<u64>& words) {
  machine.enter(Phase::combine_wait);
  c.wire->at(Point::combine_wait, open.round);
  const u32 parity = open.round % kNumParities;
  auto word_of = [&](i32 src) { return Context::word(c.inbound(open, src), c.at.combine_signal[parity]); };
  auto reading = [&](i32 src) { return c.read(open, src, load_acquire(word_of(src))); };
  for (i32 dst = 0; dst < c.shape.num_ranks; ++dst)
    if (open.active.has(dst) && reading(dst) == Reading::absent) machine.expect(dst);
  for (i32 dst = 0; dst < c.shape.num_ranks; ++dst) {
    if (!open.active.has(dst)) continue;
    const Waited waited = wait_for(machine, *c.state, dst, [&] { return reading(dst); });
    if (waited == Waited::released) {
      machine.expect_nobody();
      return released_status(*c.state);
    }
    if (waited != Waited::present) continue;
    const u64 word = load_acquire(word_of(dst));
    words[static_cast<size_t>(dst)] = word;
    const u64 expected = static_cast<u64>(open.answers_from[static_cast<size_t>(dst)]);
    if (signal_field::Count::unpack(word) == expected || !guarded(guard_combine_count)) delivered.add(dst);
  }
  machine.expect_nobody();
  return Status::ok;
}

// float32 sums, each rounded once per choice, so that the order of k is the order of the reference.
// `zero`: nothing that was delivered has any weight, so there is nothing to scale up.
float missing_factor(const Context& c, const OpenRound& open, const u8* codes, size_t first, bool& zero) {
  float all = 0.0f, here = 0.0f;
  bool missing = false;
  for (i32 k = 0; k < c.shape.num_topk; ++k) {
    const size_t i = first + static_cast<size_t>(k);
    if (open.dst_rank[i] < 0) continue;
    all += open.topk_weights[i];
    if (codes[i] == static_cast<u8>(Outcome::delivered)) {
      here += open.topk_weights[i];
    } else {
      missing = true;
    }
  }
  if (!missing) return 1.0f;
  zero = here == 0.0f;
  return all / here;
}

void sum_choices(const Context& c, const OpenRound& open, const u8* codes, size_t first, float* sum, i32 hidden) {
  const u64 rows_at = c.at.combine_rows[open.round % kNumParities];
  for (i32 k = 0; k < c.shape.num_topk; ++k) {
    const size_t i = first + static_cast<size_t>(k);
    if (codes[i] != static_cast<u8>(Outcome::delivered)) continue;
    const u8* row =
        c.inbound(open, open.dst_rank[i]) + rows_at + c.at.row_stride * static_cast<u64>(open.combine_row[i]);
    add_scaled_row(c.dtype, sum, row, open.topk_weights[i], hidden);
  }
}

void sum_ranks(const Context& c, const OpenRound& open, const u8* codes, size_t first, float* sum, i32 hidden) {
  const u64 rows_at = c.at.combine_rows[open.round % kNumParities];
  for (i32 dst = 0; dst < c.shape.num_ranks; ++dst) {
    for (i32 k = 0; k < c.shape.num_topk; ++k) {
      const size_t i = first + static_cast<size_t>(k);
      if (open.dst_rank[i] != dst || codes[i] != static_cast<u8>(Outcome::delivered)) continue;
      const u8* row = c.inbound(open, dst) + rows_at + c.at.row_stride * static_cast<u64>(open.combine_row[i]);
      add_scaled_row(c.dtype, sum, row, 1.0f, hidden);
      break;
    }
  }
}

i64 reduce(const Context& c, const CombineArgs& args, const OpenRound& open, const RankSet& delivered, i32 hidden) {
  const size_t k = static_cast<size_t>(c.shape.num_topk);
  const auto hidden_bytes = static_cast<u64>(c.shape.hidden_bytes);
  std::vector<float> sum(static_cast<size_t>(hidden));
  i64 num_lost = 0;
  for (size_t first = 0; first < static_cast<size_t>(open.num_tokens) * k; first += k) {
    for (size_t i = first; i < first + k; ++i) {
      const i32 dst = open.dst_rank[i];
      Outcome code = Outcome::lost;
      if (dst < 0)
        code = Outcome::none;
      else if (!open.active.has(dst))
        code = Outcome::unroutable;
      else if (delivered.has(dst))
        code = Outcome::delivered;
      if (code == Outcome::lost) ++num_lost;
      args.codes[i] = static_cast<u8>(code);
    }
    memset(sum.data(), 0, sizeof(float) * sum.size());
    if (c.shape.reduce_at_expert)
      sum_ranks(c, open, args.codes, first, sum.data(), hidden);
    else
      sum_choices(c, open, args.codes, first, sum.data(), hidden);
    bool zero = false;
    const float factor = c.renormalize ? missing_factor(c, open, args.codes, first, zero) : 1.0f;
    if (zero)
      memset(sum.data(), 0, sizeof(float) * sum.size());
    else if (factor != 1.0f)
      scale_row(sum.data(), factor, hidden);
    store_row(c.dtype, args.out + hidden_bytes * (first / k), sum.data(), hidden);
  }
  *args.lost = num_lost > 0 ? 1 : 0;
  return num_lost;
}

bool withdraw_changed(Context& c, const OpenRound& open, RankSet& delivered, const std::vector<u64>& words) {
  if (!guarded(guard_recheck)) return false;
  bool changed = false;
  for (i32 dst = 0; dst < c.shape.num_ranks; ++dst) {
    if (!delivered.has(dst)) continue;
    const u64 word = load_acquire(Context::word(c.inbound(open, dst), c.at.combine_signal[open.round % kNumParities]));
    if (word == words[static_cast<size_t>(dst)]) continue;
    delivered.remove(dst);
    ++c.stats.num_rechecks;
    changed = true;
  }
  return changed;
}

}  // namespace

CombineResult combine(Context& c, const CombineArgs& args) {
  OpenRound& open = c.rounds[args.round % kNumParities];
  if (!open.open || open.round != args.round) return {Status::bad_handle, 0};
  const i32 hidden = c.shape.hidden_bytes / (c.dtype == DType::bfloat16 ? 2 : 4);
  CombineResult result;
  CpuMachine machine(c, open.round);
  if (!guarded(guard_view_once)) open.active = newest_view(c.state->ring).active;
  c.wire->at(Point::combine_begin, open.round);
  answer(c, machine, args, open, hidden);

  RankSet delivered;
  std::vector<u64> words(static_cast<size_t>(c.shape.num_ranks), 0);
  result.status = gather(c, machine, open, delivered, words);
  if (result.status == Status::ok && !args.abandon) {
    do {
      c.wire->at(Point::combine_reduce, open.round);
      result.num_lost = reduce(c, args, open, delivered, hidden);
    } while (withdraw_changed(c, open, delivered, words));
  }
  // Only now may the round after next use these slots.
  open.open = false;
  machine.enter(Phase::closed);
  c.wire->at(Point::combine_closed, open.round);
  return result;
}

}  // namespace fa2a
