// Combine on the CPU, the half that receives: each owner sums what came back, and says exactly what did not.
#include <algorithm>

#include "kernels/cpu/rows.hpp"
#include "kernels/cpu/stream.hpp"

namespace fa2a {

namespace {

// One reduction. Tokens are summed in order, as soon as every row that they need has come or is lost. A chunk is given
// back once all its rows are summed, so the choices of one token may come in different chunks.
class Reduction {
 public:
  // `args` nullptr: the round was abandoned here; answers are waited for and not looked at.
  Reduction(Context& c, CpuMachine& machine, OpenRound& open, const ReduceArgs* args)
      : c_(c),
        machine_(machine),
        open_(open),
        args_(args),
        n_(c.shape.num_ranks),
        num_topk_(static_cast<size_t>(c.shape.num_topk)) {}

  Status run();
  i64 num_lost() const { return num_lost_; }

 private:
  InStream& in(i32 dst) { return open_.in[static_cast<size_t>(dst)]; }
  const InStream& in(i32 dst) const { return open_.in[static_cast<size_t>(dst)]; }
  i32 expected_from(i32 dst) const { return open_.answers_from[static_cast<size_t>(dst)]; }

  bool pump();
  bool hear(i32 dst);
  void end(i32 dst, InStream::Stage stage);
  bool sum_batch();
  bool is_ready(size_t token) const;
  bool withdraw_changed();
  void give_back(i32 dst);
  i64 set_codes(size_t token);
  void sum_token(size_t token);
  void list_choices(size_t first);
  void list_sums(size_t first);
  float missing_factor(size_t first, bool& zero) const;
  const u8* row_at(i32 dst, i32 row) const;
  bool has_room_for(const InStream& stream) const;
  bool awaits(i32 peer) const;
  void look_for_word_of(i32 peer);

  Context& c_;
  CpuMachine& machine_;
  OpenRound& open_;
  const ReduceArgs* args_;
  const i32 n_;
  const size_t num_topk_;
  size_t next_token_ = 0;
  i64 num_lost_ = 0;
  std::vector<const u8*> rows_;
  std::vector<float> weights_;
};

Status Reduction::run() {
  machine_.enter(Phase::combine_wait);
  c_.wire->at(Point::combine_wait, open_.round);
  open_.in.assign(static_cast<size_t>(n_), InStream());
  for (i32 dst = 0; dst < n_; ++dst)
    if (!open_.active.has(dst)) in(dst).stage = InStream::Stage::out;
  if (args_ == nullptr) next_token_ = static_cast<size_t>(open_.num_tokens);
  const Status status = serve_peers(
      machine_, *c_.state, n_, [&] { return pump(); }, [&](i32 peer) { return awaits(peer); },
      [&](i32 peer) { look_for_word_of(peer); });
  if (open_.num_tokens == 0) {
    c_.wire->at(Point::combine_reduce, open_.round);
    c_.wire->at(Point::combine_chunk_taken, open_.round);
  }
  return status;
}

// Moves whatever can be moved without waiting. True: something did.
bool Reduction::pump() {
  bool moved = false;
  for (i32 peer = 0; peer < n_; ++peer) moved |= continue_answer(c_, machine_, open_, peer);
  for (i32 dst = 0; dst < n_; ++dst) moved |= hear(dst);
  return sum_batch() || moved;
}

// Takes note of the next chunk of an answer. It counts only with as many rows as were asked for.
bool Reduction::hear(i32 dst) {
  InStream& stream = in(dst);
  if (!has_room_for(stream)) return false;
  const bool suspected = is_suspect(*c_.state, dst);
  Reading reading = read_chunk(c_, open_, Verb::combine, dst, stream.next_chunk);
  if (reading == Reading::absent && !suspected) return false;
  const u64 word = load_signal(c_, open_, Verb::combine, dst, stream.next_chunk);
  const i32 missing = expected_from(dst) - stream.num_rows;
  const i32 wanted = missing < c_.at.num_combine_rows ? missing : c_.at.num_combine_rows;
  const bool whole = signal_field::Count::unpack(word) == static_cast<u64>(wanted) || !guarded(guard_combine_count);
  if (reading != Reading::present || !whole || args_ == nullptr) {
    end(dst, InStream::Stage::out);
    return true;
  }
  stream.stage = InStream::Stage::flowing;
  stream.words[half_of(c_, stream.next_chunk)] = word;
  stream.num_rows += wanted;
  ++stream.next_chunk;
  if (stream.num_rows == expected_from(dst)) end(dst, InStream::Stage::whole);
  return true;
}

void Reduction::end(i32 dst, InStream::Stage stage) {
  in(dst).stage = stage;
  SourceStats& stats = c_.sources[static_cast<size_t>(dst)];
  add_to(stats.num_rows, static_cast<u64>(in(dst).num_rows));
  add_to(stats.num_bytes, static_cast<u64>(in(dst).num_rows) * static_cast<u64>(c_.shape.hidden_bytes));
  if (stage == InStream::Stage::out) add_to(stats.num_failures, 1);
  if (stage == InStream::Stage::out) refuse(c_, open_, Verb::combine, dst, in(dst).next_chunk);
}

// Sums the tokens that are ready, and only then looks whether a row moved meanwhile: a batch with such a row is summed
// again without its source, whose earlier tokens stay delivered.
bool Reduction::sum_batch() {
  const size_t num_tokens = static_cast<size_t>(open_.num_tokens);
  if (next_token_ == num_tokens || !is_ready(next_token_)) return false;
  size_t end_token = next_token_;
  i64 num_lost = 0;
  do {
    c_.wire->at(Point::combine_reduce, open_.round);
    num_lost = 0;
    for (end_token = next_token_; end_token < num_tokens && is_ready(end_token); ++end_token) {
      num_lost += set_codes(end_token);
      sum_token(end_token);
    }
  } while (withdraw_changed());
  c_.wire->at(Point::combine_chunk_taken, open_.round);
  num_lost_ += num_lost;
  u64 num_unroutable = 0;
  for (size_t i = next_token_ * num_topk_; i < end_token * num_topk_; ++i) {
    const i32 dst = open_.dst_rank[i];
    if (args_->codes[i] == static_cast<u8>(Outcome::unroutable)) ++num_unroutable;
    if (dst >= 0 && open_.active.has(dst) && in(dst).num_summed <= open_.combine_row[i])
      in(dst).num_summed = open_.combine_row[i] + 1;
  }
  add_to(c_.stats.num_lost, static_cast<u64>(num_lost));
  add_to(c_.stats.num_unroutable, num_unroutable);
  next_token_ = end_token;
  for (i32 dst = 0; dst < n_; ++dst) give_back(dst);
  machine_.advance();
  return true;
}

bool Reduction::is_ready(size_t token) const {
  for (size_t i = token * num_topk_; i < (token + 1) * num_topk_; ++i) {
    const i32 dst = open_.dst_rank[i];
    if (dst < 0 || !open_.active.has(dst)) continue;
    if (open_.combine_row[i] >= in(dst).num_rows && in(dst).unfinished()) return false;
  }
  return true;
}

// A word that moved since its chunk was noted: its writer stored without consent, and its rows may be torn.
bool Reduction::withdraw_changed() {
  if (!guarded(guard_recheck)) return false;
  bool changed = false;
  for (i32 dst = 0; dst < n_; ++dst) {
    InStream& stream = in(dst);
    const i32 first_chunk = stream.num_summed / c_.at.num_combine_rows;
    for (i32 chunk = first_chunk; chunk < stream.next_chunk; ++chunk) {
      const bool same = load_signal(c_, open_, Verb::combine, dst, chunk) == stream.words[half_of(c_, chunk)];
      if (same) continue;
      // What is summed already was looked at in its turn; the rest of the chunk is not looked at again.
      stream.num_rows = std::max(chunk * c_.at.num_combine_rows, stream.num_summed);
      stream.next_chunk = chunk;
      end(dst, InStream::Stage::out);
      ++c_.stats.num_rechecks;
      changed = true;
      break;
    }
  }
  return changed;
}

// Chunks whose rows are all summed may be overwritten.
void Reduction::give_back(i32 dst) {
  InStream& stream = in(dst);
  if (stream.stage != InStream::Stage::flowing) return;
  const i32 num_free = stream.num_summed / c_.at.num_combine_rows;
  if (num_free > stream.num_told) tell_taken(c_, open_, Verb::combine, dst, num_free - 1);
  stream.num_told = num_free;
}

i64 Reduction::set_codes(size_t token) {
  i64 num_lost = 0;
  for (size_t i = token * num_topk_; i < (token + 1) * num_topk_; ++i) {
    const i32 dst = open_.dst_rank[i];
    Outcome code = Outcome::lost;
    if (dst < 0)
      code = Outcome::none;
    else if (!open_.active.has(dst))
      code = Outcome::unroutable;
    else if (open_.combine_row[i] < in(dst).num_rows)
      code = Outcome::delivered;
    if (code == Outcome::lost) ++num_lost;
    args_->codes[i] = static_cast<u8>(code);
  }
  return num_lost;
}

void Reduction::sum_token(size_t token) {
  const size_t first = token * num_topk_;
  rows_.clear();
  weights_.clear();
  if (c_.shape.reduce_at_expert)
    list_sums(first);
  else
    list_choices(first);
  bool zero = false;
  const float factor = c_.renormalize ? missing_factor(first, zero) : 1.0f;
  weighted_sum(c_.dtype, args_->out + static_cast<u64>(c_.shape.hidden_bytes) * token, rows_.data(), weights_.data(),
               static_cast<i32>(rows_.size()), c_.hidden(), factor, zero);
}

const u8* Reduction::row_at(i32 dst, i32 row) const {
  const i32 chunk = row / c_.at.num_combine_rows;
  const i32 slot = half_of(c_, chunk) * c_.at.num_combine_rows + row % c_.at.num_combine_rows;
  return c_.inbound(open_, dst) + c_.at.combine_rows[open_.round % kNumParities] +
         c_.at.combine_stride * static_cast<u64>(slot);
}

void Reduction::list_choices(size_t first) {
  for (size_t i = first; i < first + num_topk_; ++i) {
    if (args_->codes[i] != static_cast<u8>(Outcome::delivered)) continue;
    rows_.push_back(row_at(open_.dst_rank[i], open_.combine_row[i]));
    weights_.push_back(c_.weights_at_expert ? 1.0f : open_.topk_weights[i]);
  }
}

// One row a rank, by ascending rank.
void Reduction::list_sums(size_t first) {
  for (i32 dst = 0; dst < n_; ++dst) {
    for (size_t i = first; i < first + num_topk_; ++i) {
      if (open_.dst_rank[i] != dst || args_->codes[i] != static_cast<u8>(Outcome::delivered)) continue;
      rows_.push_back(row_at(dst, open_.combine_row[i]));
      weights_.push_back(1.0f);
      break;
    }
  }
}

// float32 sums, each rounded once per choice, so that the order of k is the order of the reference.
// `zero`: nothing that was delivered has any weight, so there is nothing to scale up.
float Reduction::missing_factor(size_t first, bool& zero) const {
  float all = 0.0f, here = 0.0f;
  bool missing = false;
  for (size_t i = first; i < first + num_topk_; ++i) {
    if (open_.dst_rank[i] < 0) continue;
    all += open_.topk_weights[i];
    if (args_->codes[i] == static_cast<u8>(Outcome::delivered)) {
      here += open_.topk_weights[i];
    } else {
      missing = true;
    }
  }
  if (!missing) return 1.0f;
  zero = here == 0.0f;
  return all / here;
}

// Not beyond the chunks that I have given back: a writer that overwrites one I still sum must be found out by its word.
bool Reduction::has_room_for(const InStream& stream) const {
  return stream.unfinished() && stream.next_chunk < stream.num_told + c_.at.num_halves;
}

bool Reduction::awaits(i32 peer) const { return has_room_for(in(peer)) || open_.out[static_cast<size_t>(peer)].open; }

void Reduction::look_for_word_of(i32 peer) {
  if (has_room_for(in(peer)))
    machine_.look_for(WordKind::combine_signal, in(peer).next_chunk);
  else
    machine_.look_for(WordKind::combine_taken, open_.out[static_cast<size_t>(peer)].next_chunk - c_.at.num_halves);
}

// Only after it may the round after next use the slots.
CombineResult close_round(Context& c, OpenRound& open, const ReduceArgs* args) {
  CpuMachine machine(c, open.round);
  if (args != nullptr && args->topk_weights != nullptr)
    open.topk_weights.assign(args->topk_weights, args->topk_weights + open.topk_weights.size());
  Reduction reduction(c, machine, open, args);
  CombineResult result;
  result.status = reduction.run();
  result.num_lost = reduction.num_lost();
  if (args != nullptr) *args->lost = result.num_lost > 0 ? 1 : 0;
  open.stage = Stage::closed;
  open.y = nullptr;
  machine.enter(Phase::closed);
  c.wire->at(Point::combine_closed, open.round);
  return result;
}

}  // namespace

CombineResult combine_receive(Context& c, const ReduceArgs& args) {
  OpenRound& open = c.rounds[args.round % kNumParities];
  if (open.round != args.round || open.stage != Stage::answered) return {Status::bad_handle, 0};
  return close_round(c, open, &args);
}

CombineResult abandon(Context& c, u64 round) {
  OpenRound& open = c.rounds[round % kNumParities];
  if (open.stage == Stage::closed || open.round != round) return {Status::bad_handle, 0};
  if (open.stage != Stage::answered) {
    const CombineResult sent = combine_send(c, {nullptr, round, /*abandon=*/true});
    if (sent.status != Status::ok) return sent;
  }
  // Nothing more of a stream: whoever dropped its hook dropped the rows as well.
  stop_streams(c, open, Verb::combine);
  return close_round(c, open, nullptr);
}

}  // namespace fa2a
