// Combine on the CPU, the half that sends: expert rows go back to their owners, and everybody gets an answer.
#include "kernels/cpu/rows.hpp"
#include "kernels/cpu/stream.hpp"

namespace fa2a {

namespace {

// Entries of `received` that came from one source, in the order of its rows; what goes back goes in the same order.
struct Span {
  const Received* first;
  const Received* last;
};

Span rows_of(const OpenRound& open, i32 src) {
  const Received* all = open.received.data();
  return {all + open.received_from[static_cast<size_t>(src)], all + open.received_from[static_cast<size_t>(src) + 1]};
}

i32 num_answers_to(const Context& c, const OpenRound& open, i32 owner) {
  if (c.shape.reduce_at_expert) return open.in[static_cast<size_t>(owner)].num_rows;
  const Span rows = rows_of(open, owner);
  return static_cast<i32>(rows.last - rows.first);
}

// One combine row per choice, as the expert wrote it.
u64 return_choices(Context& c, const OpenRound& open, i32 owner, i32 chunk, u8* slots) {
  const auto hidden_bytes = static_cast<u64>(c.shape.hidden_bytes);
  const Span all = rows_of(open, owner);
  const Received* row = all.first + static_cast<i64>(chunk) * c.at.num_combine_rows;
  u64 count = 0;
  for (; row < all.last && count < static_cast<u64>(c.at.num_combine_rows); ++row, ++count)
    c.wire->put_answer(owner, slots + c.at.combine_stride * count,
                       open.y + hidden_bytes * static_cast<u64>(row->position), hidden_bytes, open.streamed);
  return count;
}

// One combine row per token: this rank's choices of it, weighted and summed here.
u64 return_sums(Context& c, const OpenRound& open, i32 owner, i32 chunk, u8* slots) {
  const auto hidden_bytes = static_cast<u64>(c.shape.hidden_bytes);
  const Span rows = rows_of(open, owner);
  const i32 first_row = chunk * c.at.num_combine_rows;
  // Rows of a source stand in order, so its row `first_row` is found by halving.
  const Received* row = rows.first;
  for (i64 step = rows.last - rows.first; step > 0;) {
    const i64 half = step / 2;
    if (row[half].src_row < first_row) {
      row += half + 1;
      step -= half + 1;
    } else {
      step = half;
    }
  }
  std::vector<const u8*> parts;
  std::vector<float> weights;
  std::vector<u8> sum(hidden_bytes);
  u64 count = 0;
  for (; row != rows.last && count < static_cast<u64>(c.at.num_combine_rows); ++count) {
    parts.clear();
    weights.clear();
    for (const i32 src_row = row->src_row; row != rows.last && row->src_row == src_row; ++row) {
      parts.push_back(open.y + hidden_bytes * static_cast<u64>(row->position));
      weights.push_back(c.weights_at_expert ? 1.0f : row->weight);
    }
    weighted_sum(c.dtype, sum.data(), parts.data(), weights.data(), static_cast<i32>(parts.size()), c.hidden(), 1.0f,
                 /*zero=*/false);
    c.wire->put_answer(owner, slots + c.at.combine_stride * count, sum.data(), hidden_bytes, open.streamed);
  }
  return count;
}

// Stores the rows of one chunk of the answer. Returns their number.
u64 store_answer(Context& c, const OpenRound& open, i32 owner, i32 chunk) {
  const u64 slot = static_cast<u64>(half_of(c, chunk)) * static_cast<u64>(c.at.num_combine_rows);
  u8* slots = c.fabric->outbound(owner) + c.at.combine_rows[open.round % kNumParities] + c.at.combine_stride * slot;
  return c.shape.reduce_at_expert ? return_sums(c, open, owner, chunk, slots)
                                  : return_choices(c, open, owner, chunk, slots);
}

// Everybody who is active gets an answer. A source that was not taken, and any suspect, gets `declined`: without it the
// source would wait for ever, and its rows would never be free again.
void answer(Context& c, CpuMachine& machine, OpenRound& open, bool abandoned) {
  machine.enter(Phase::combine_send);
  auto opens = [&](i32 owner) {
    if (!open.taken.has(owner) || abandoned || is_suspect(*c.state, owner)) return 0;
    return num_chunks_of(num_answers_to(c, open, owner), c.at.num_combine_rows);
  };
  begin_streams(c, open, Verb::combine,
                {Point::combine_send_rows, Point::combine_half_signalled, Point::combine_signalled}, opens,
                [&](i32 owner, i32 chunk) { return store_answer(c, open, owner, chunk); });
}

}  // namespace

bool continue_answer(Context& c, CpuMachine& machine, OpenRound& open, i32 owner) {
  return continue_stream(c, machine, open, Verb::combine, owner,
                         [&](i32 chunk) { return store_answer(c, open, owner, chunk); });
}

CombineResult combine_send(Context& c, const CombineArgs& args) {
  OpenRound& open = c.rounds[args.round % kNumParities];
  if (open.round != args.round || open.stage == Stage::closed || open.stage == Stage::answered)
    return {Status::bad_handle, 0};
  if (open.stage == Stage::sent && !args.abandon) return {Status::not_received, 0};
  CpuMachine machine(c, open.round);
  if (!guarded(guard_view_once)) open.active = newest_view(c.state->ring).active;
  c.wire->at(Point::combine_begin, open.round);
  if (open.stage == Stage::sent) give_up_dispatch(c, open);
  open.y = args.y;
  open.streamed = c.streams(open.received.size() * static_cast<u64>(c.shape.hidden_bytes));
  answer(c, machine, open, args.abandon);
  open.stage = Stage::answered;
  machine.enter(Phase::caller);
  return {};
}

}  // namespace fa2a
