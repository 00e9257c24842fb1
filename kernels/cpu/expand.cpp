// Dispatch on the CPU, the half that receives: takes every source's chunks as they come and expands rows to
// expert-major.
#include <string.h>

#include "kernels/cpu/stream.hpp"

namespace fa2a {

namespace {

// One receive. Sources announce how many rows each expert gets; once all have (or are out), every row has its place and
// is copied there as its chunk comes. A source that fails later leaves a gap, which is closed at the end.
class Expansion {
 public:
  Expansion(Context& c, CpuMachine& machine, OpenRound& open, const ReceiveArgs& args)
      : c_(c), machine_(machine), open_(open), args_(args), n_(c.shape.num_ranks), num_experts_(c.num_local_experts) {}

  Status run();
  // Closes the gaps and fills in the counts. Returns the number of rows.
  i32 finish();

 private:
  size_t at(i32 src, i32 expert) const {
    return static_cast<size_t>(src) * static_cast<size_t>(num_experts_) + static_cast<size_t>(expert);
  }
  InStream& in(i32 src) { return open_.in[static_cast<size_t>(src)]; }

  bool pump();
  Reading read(i32 src);
  bool hear_claims(i32 src);
  bool claims_fit(i32 src) const;
  void assign_places();
  bool take_chunk(i32 src);
  bool claims_are_met(i32 src) const;
  bool take_rows(i32 src, i32 chunk, u64 count);
  bool take_row(i32 src, const u8* header, const u8* row);
  void copy_out(const u8* row, i32 position, float weight);
  void move_rows(i32 to, i32 from, i32 num_rows);
  void end_source(i32 src, bool whole);
  bool awaits_signal(i32 peer) const;
  bool awaits(i32 peer) const;
  void look_for_word_of(i32 peer);

  Context& c_;
  CpuMachine& machine_;
  OpenRound& open_;
  const ReceiveArgs& args_;
  const i32 n_;
  const i32 num_experts_;
  bool placed_ = false;
  bool streamed_ = false;
  size_t num_copied_ = 0;
  std::vector<i32> claims_;  // [src][expert]
  std::vector<i32> first_;   // [src][expert]: row of recv.x of its first row
  std::vector<i32> next_;    // [src][expert]: of its next one
  std::vector<i32> filled_;  // [src]: entries of `received`
  std::vector<u8> header_;
};

Status Expansion::run() {
  machine_.enter(Phase::dispatch_wait);
  c_.wire->at(Point::dispatch_wait, open_.round);
  const auto cells = static_cast<size_t>(n_) * static_cast<size_t>(num_experts_);
  claims_.assign(cells, 0);
  first_.assign(cells, 0);
  filled_.assign(static_cast<size_t>(n_), 0);
  header_.resize(c_.at.header_stride);
  open_.taken = RankSet();
  open_.received.clear();
  open_.received_from.assign(static_cast<size_t>(n_) + 1, 0);
  open_.in.assign(static_cast<size_t>(n_), InStream());
  for (i32 src = 0; src < n_; ++src)
    if (!open_.active.has(src)) in(src).stage = InStream::Stage::out;
  return serve_peers(
      machine_, *c_.state, n_, [&] { return pump(); }, [&](i32 peer) { return awaits(peer); },
      [&](i32 peer) { look_for_word_of(peer); });
}

// Moves whatever can be moved without waiting. True: something did.
bool Expansion::pump() {
  bool moved = false;
  for (i32 peer = 0; peer < n_; ++peer) moved |= continue_dispatch(c_, machine_, open_, peer);
  if (!placed_) {
    bool all_heard = true;
    for (i32 src = 0; src < n_; ++src) {
      moved |= hear_claims(src);
      all_heard &= in(src).stage != InStream::Stage::silent;
    }
    if (!all_heard) return moved;
    assign_places();
    placed_ = true;
  }
  for (i32 src = 0; src < n_; ++src) moved |= take_chunk(src);
  return moved;
}

// What the next chunk's word says; a source that declines, or is suspected and has nothing there, is out.
Reading Expansion::read(i32 src) {
  // In this order: a signal that arrived whole before the suspicion is worth having from anybody.
  const bool suspected = is_suspect(*c_.state, src);
  Reading reading = read_chunk(c_, open_, Verb::dispatch, src, in(src).next_chunk);
  if (reading == Reading::absent && suspected) reading = Reading::declined;
  if (reading == Reading::declined) end_source(src, /*whole=*/false);
  return reading;
}

// The first signal of a source comes with its claims.
bool Expansion::hear_claims(i32 src) {
  if (in(src).stage != InStream::Stage::silent) return false;
  const Reading reading = read(src);
  if (reading != Reading::present) return reading == Reading::declined;
  // Copied out first and checked in the copy: a peer that lies could change the original after the check.
  memcpy(claims_.data() + at(src, 0), c_.inbound(open_, src) + c_.at.claims[open_.round % kNumParities],
         sizeof(i32) * static_cast<size_t>(num_experts_));
  if (claims_fit(src) || !guarded(guard_clamp_count)) {
    in(src).stage = InStream::Stage::flowing;
    return true;
  }
  ++c_.stats.num_rejected;
  end_source(src, /*whole=*/false);
  return true;
}

bool Expansion::claims_fit(i32 src) const {
  i64 total = 0;
  for (i32 expert = 0; expert < num_experts_; ++expert) {
    const i32 claim = claims_[at(src, expert)];
    if (claim < 0 || claim > c_.shape.num_max_tokens) return false;
    total += claim;
  }
  return total <= static_cast<i64>(c_.shape.num_max_tokens) * c_.at.max_choices;
}

// Experts in order, within one by source rank; within that rows come in the order of the source's tokens.
void Expansion::assign_places() {
  i32 position = 0;
  for (i32 expert = 0; expert < num_experts_; ++expert) {
    if (!c_.packed) position = expert * c_.capacity();
    for (i32 src = 0; src < n_; ++src) {
      first_[at(src, expert)] = position;
      if (in(src).stage == InStream::Stage::flowing) position += claims_[at(src, expert)];
    }
  }
  next_ = first_;
  for (i32 src = 0; src < n_; ++src) {
    i32 num_rows = 0;
    for (i32 expert = 0; expert < num_experts_ && in(src).stage == InStream::Stage::flowing; ++expert)
      num_rows += claims_[at(src, expert)];
    open_.received_from[static_cast<size_t>(src) + 1] = open_.received_from[static_cast<size_t>(src)] + num_rows;
  }
  open_.received.resize(static_cast<size_t>(open_.received_from.back()));
  streamed_ = c_.streams(open_.received.size() * c_.format.payload_bytes);
  if (open_.received.empty()) c_.wire->at(Point::dispatch_copy, open_.round);
}

// All or nothing: a source is taken with all its rows or not at all, so whatever is wrong with one chunk ends it.
bool Expansion::take_chunk(i32 src) {
  InStream& stream = in(src);
  if (stream.stage != InStream::Stage::flowing) return false;
  const Reading reading = read(src);
  if (reading != Reading::present) return reading == Reading::declined;
  const u64 word = load_signal(c_, open_, Verb::dispatch, src, stream.next_chunk);
  const bool last = signal_field::Last::unpack(word) != 0;
  const bool refused = !take_rows(src, stream.next_chunk, signal_field::Count::unpack(word)) ||
                       (last && !claims_are_met(src) && guarded(guard_claims_met));
  // A word that moved while its rows were copied was stored without consent: the rows may be torn.
  const bool torn = load_signal(c_, open_, Verb::dispatch, src, stream.next_chunk) != word && guarded(guard_recheck);
  c_.stats.num_rejected += refused ? 1 : 0;
  c_.stats.num_rechecks += torn ? 1 : 0;
  if (refused || torn) {
    end_source(src, /*whole=*/false);
    return true;
  }
  c_.wire->at(Point::dispatch_chunk_taken, open_.round);
  if (last) {
    end_source(src, /*whole=*/true);
    return true;
  }
  tell_taken(c_, open_, Verb::dispatch, src, stream.next_chunk);
  ++stream.next_chunk;
  machine_.advance();
  return true;
}

bool Expansion::claims_are_met(i32 src) const {
  for (i32 expert = 0; expert < num_experts_; ++expert)
    if (next_[at(src, expert)] - first_[at(src, expert)] != claims_[at(src, expert)]) return false;
  return true;
}

bool Expansion::take_rows(i32 src, i32 chunk, u64 count) {
  if (count > static_cast<u64>(c_.at.num_dispatch_rows) && guarded(guard_clamp_count)) return false;
  const u32 parity = open_.round % kNumParities;
  const u64 slot = static_cast<u64>(half_of(c_, chunk)) * static_cast<u64>(c_.at.num_dispatch_rows);
  const u8* partition = c_.inbound(open_, src);
  for (u64 row = 0; row < count; ++row) {
    memcpy(header_.data(), partition + c_.at.row_headers[parity] + c_.at.header_stride * (slot + row),
           c_.at.header_stride);
    if (!take_row(src, header_.data(), partition + c_.at.dispatch_rows[parity] + c_.at.dispatch_stride * (slot + row)))
      return false;
    ++in(src).num_rows;
  }
  return true;
}

// A peer's index never addresses memory unchecked; nor does a row go beyond what its source has announced.
bool Expansion::take_row(i32 src, const u8* header_bytes, const u8* row) {
  RowHeader header;
  memcpy(&header, header_bytes, sizeof header);
  const bool counts = header.num_choices >= 1 && header.num_choices <= c_.at.max_choices;
  if (!counts && guarded(guard_check_index)) return false;
  Received* received = open_.received.data() + open_.received_from[static_cast<size_t>(src)];
  i32& filled = filled_[static_cast<size_t>(src)];
  for (i32 j = 0; j < header.num_choices; ++j) {
    RowChoice choice;
    memcpy(&choice, header_bytes + sizeof header + sizeof choice * static_cast<u64>(j), sizeof choice);
    const bool in_range = choice.local_expert >= 0 && choice.local_expert < num_experts_ && choice.choice >= 0 &&
                          choice.choice < c_.shape.num_topk;
    if (!in_range && guarded(guard_check_index)) return false;
    const size_t cell = at(src, choice.local_expert);
    if (next_[cell] - first_[cell] >= claims_[cell] && guarded(guard_check_index)) return false;
    // The same expert twice in a row of a source would be two rows of one token there.
    for (i32 i = 0; i < j && guarded(guard_check_index); ++i)
      if (received[filled - 1 - i].local_expert == choice.local_expert) return false;
    const i32 position = next_[cell]++;
    received[filled++] = {position,      choice.local_expert, src, header.src_token, choice.choice,
                          choice.weight, in(src).num_rows};
    if (num_copied_++ == open_.received.size() / 4) c_.wire->at(Point::dispatch_copy, open_.round);
    copy_out(row, position, choice.weight);
  }
  return true;
}

void Expansion::copy_out(const u8* row, i32 position, float weight) {
  const auto at_row = static_cast<u64>(position);
  u8* to = args_.recv_x + c_.format.payload_bytes * at_row;
  if (streamed_)
    stream_row(to, row, c_.format.payload_bytes);
  else
    copy_row(to, row, c_.format.payload_bytes);
  if (args_.recv_scales != nullptr)
    memcpy(args_.recv_scales + c_.format.scale_bytes * at_row, row + c_.format.scales_at, c_.format.scale_bytes);
  if (args_.recv_weights != nullptr) args_.recv_weights[position] = weight;
}

void Expansion::move_rows(i32 to, i32 from, i32 num_rows) {
  auto move = [&](u8* rows, u64 row_bytes) {
    if (rows != nullptr)
      memmove(rows + row_bytes * static_cast<u64>(to), rows + row_bytes * static_cast<u64>(from),
              row_bytes * static_cast<u64>(num_rows));
  };
  move(args_.recv_x, c_.format.payload_bytes);
  move(args_.recv_scales, c_.format.scale_bytes);
  move(reinterpret_cast<u8*>(args_.recv_weights), sizeof(float));
}

void Expansion::end_source(i32 src, bool whole) {
  InStream& stream = in(src);
  stream.stage = whole ? InStream::Stage::whole : InStream::Stage::out;
  SourceStats& stats = c_.sources[static_cast<size_t>(src)];
  add_to(stats.num_rows, static_cast<u64>(stream.num_rows));
  add_to(stats.num_bytes, static_cast<u64>(stream.num_rows) * static_cast<u64>(c_.shape.dispatch_bytes));
  if (!whole) add_to(stats.num_failures, 1);
  if (whole)
    open_.taken.add(src);
  else
    refuse(c_, open_, Verb::dispatch, src, stream.next_chunk);
}

// Before rows have their places, only the signals of silent sources are missing: the others' are there, and wait for
// us.
bool Expansion::awaits_signal(i32 peer) const {
  const InStream& stream = open_.in[static_cast<size_t>(peer)];
  return placed_ ? stream.unfinished() : stream.stage == InStream::Stage::silent;
}

bool Expansion::awaits(i32 peer) const { return awaits_signal(peer) || open_.out[static_cast<size_t>(peer)].open; }

void Expansion::look_for_word_of(i32 peer) {
  if (awaits_signal(peer))
    machine_.look_for(WordKind::dispatch_signal, in(peer).next_chunk);
  else
    machine_.look_for(WordKind::dispatch_taken, open_.out[static_cast<size_t>(peer)].next_chunk - c_.at.num_halves);
}

i32 Expansion::finish() {
  finish_copies();
  std::vector<i32> moved_by(first_.size(), 0);
  i32 packed_end = 0;
  for (i32 expert = 0; expert < num_experts_; ++expert) {
    const i32 begin = c_.packed ? packed_end : expert * c_.capacity();
    i32 position = begin;
    for (i32 src = 0; src < n_; ++src) {
      if (!open_.taken.has(src)) continue;
      const size_t cell = at(src, expert);
      const i32 num_rows = claims_[cell];
      moved_by[cell] = first_[cell] - position;
      if (moved_by[cell] != 0 && num_rows != 0) move_rows(position, first_[cell], num_rows);
      position += num_rows;
    }
    args_.num_tokens_per_expert[expert] = position - begin;
    args_.offsets[expert] = packed_end;
    packed_end += position - begin;
  }
  args_.offsets[num_experts_] = packed_end;
  for (i32 src = 0; src < n_; ++src) {
    if (!open_.taken.has(src)) continue;
    for (i32 i = open_.received_from[static_cast<size_t>(src)]; i < open_.received_from[static_cast<size_t>(src) + 1];
         ++i) {
      Received& row = open_.received[static_cast<size_t>(i)];
      row.position -= moved_by[at(src, row.local_expert)];
    }
  }
  return packed_end;
}

}  // namespace

DispatchResult dispatch_receive(Context& c, const ReceiveArgs& args) {
  OpenRound& open = c.rounds[args.round % kNumParities];
  DispatchResult result;
  result.round = args.round;
  if (open.round != args.round || open.stage != Stage::sent) {
    result.status = Status::bad_handle;
    return result;
  }
  CpuMachine machine(c, open.round);
  Expansion expansion(c, machine, open, args);
  result.status = expansion.run();
  if (result.status != Status::ok) {
    // A closing rank still owes its peers an answer to this round; close() sends it.
    if (result.status != Status::closed) open.stage = Stage::closed;
    return result;
  }
  result.num_received = expansion.finish();
  open.stage = Stage::received;
  open.x = nullptr;
  ++c.stats.num_rounds;
  machine.enter(Phase::caller);
  c.wire->at(Point::dispatch_taken, open.round);
  return result;
}

}  // namespace fa2a
