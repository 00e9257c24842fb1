// Dispatch on a GPU, the half that sends: one block begins and routes the round, all blocks store one row per (token,
// destination rank), and the last of them tells the peers.
#include "kernels/cuda/grid.cuh"
#include "kernels/cuda/machine.cuh"
#include "kernels/cuda/route.cuh"
#include "kernels/cuda/send_rows.cuh"

namespace fa2a {
namespace device {

// Waits until the round may begin, publishes that it has, and finds the view it uses. By one thread.
FA2A_DEVICE Status begin_round(DeviceRank& r, u64 number, const View*& view) {
  for (;;) {
    DeviceMachine machine(r, number, Phase::gate, WordKind::dispatch_signal);
    const Waited waited = wait_for(machine, *r.state, kNobody,
                                   [&] { return gate_is_open(*r.state, number) ? Reading::present : Reading::absent; });
    if (waited == Waited::released) {
      // ok: quorum came back between the two looks, and this round has not begun.
      const Status why = released_status(*r.state);
      if (why != Status::ok) return why;
      continue;
    }
    if (start_round(*r.state, number)) break;
  }
  view = &view_for_round(r.state->ring, number);
  return Status::ok;
}

// The one copy of the view that this round goes by, from here to its last sum. By all threads.
FA2A_DEVICE void keep_view(DeviceRank& r, u64 number, const View& view, DeviceRound& round) {
  if (thread_idx() == 0) {
    round.round = number;
    round.epoch = view.epoch;
    round.active = view.active;
    round.trusted = round.opened = round.taken = round.shunned = round.answered = RankSet();
  }
  sync_block();
  for (i32 src = thread_idx(); src < r.shape.num_ranks; src += num_threads()) {
    round.partitions[src] = view.partitions[src];
    const auto* header = reinterpret_cast<const PartitionHeader*>(inbound(r, round, src) + r.at.header);
    if (header->incarnation == view.incarnations[src] || !guarded(guard_incarnation)) add_rank(round.trusted, src);
  }
  sync_block();
}

// Every active peer hears of every round. To a suspect, and to a peer that has not yet given back the slot of two
// rounds ago, only the control word goes.
FA2A_DEVICE bool may_open(const DeviceRank& r, const DeviceRound& round, i32 dst) {
  if (!round.active.has(dst) || is_suspect(*r.state, dst)) return false;
  // Its answer comes when it has copied all of mine.
  return slot_is_free(load_signal(r, round, Verb::combine, dst), round.round) || ignores_consent(r.host);
}

struct BeginShared {
  u32 first_bad;
  Status status;
  u64 round;
  const View* view;
};

// Checks, waits at the gate, begins the round and routes it. One block.
FA2A_KERNEL dispatch_route(DeviceRank* rank, RouteArgs args, DeviceHandle* handle) {
  DeviceRank& r = *rank;
  BeginShared& shared = block_shared<BeginShared>();
  if (thread_idx() == 0) {
    shared.first_bad = kNothingBad;
    shared.round = r.next_round;
  }
  sync_block();
  find_bad_choice(r, args, shared.first_bad);
  sync_block();
  DeviceRound& round = r.rounds[shared.round % kNumParities];
  if (thread_idx() == 0) {
    const i64 bad = shared.first_bad;
    const bool is_bad = shared.first_bad != kNothingBad;
    shared.status = is_bad ? check_choice(r, args, bad) : Status::ok;
    // "Fewer than two open" is not the rule: with rounds r and r + 2 open, their rows share slots.
    if (!is_bad && round.step != static_cast<u64>(Step::closed) && guarded(guard_third_round))
      shared.status = Status::third_round;
    handle->round = shared.round;
    handle->status = shared.status;
    handle->ended = Status::ok;
    handle->token = is_bad ? static_cast<i32>(bad / r.shape.num_topk) : 0;
    handle->choice = is_bad ? static_cast<i32>(bad % r.shape.num_topk) : 0;
    handle->value = is_bad ? expert_at(args, bad) : 0;
  }
  sync_block();
  if (shared.status != Status::ok) return;
  if (thread_idx() == 0) point(r.host, Point::dispatch_gate, shared.round);
  enter(r, shared.round, Phase::gate);
  clear_claims(r, round);
  sync_block();
  if (thread_idx() == 0) handle->status = shared.status = begin_round(r, shared.round, shared.view);
  sync_block();
  if (shared.status != Status::ok) return;
  keep_view(r, shared.round, *shared.view, round);
  if (thread_idx() == 0) {
    point(r.host, Point::dispatch_started, shared.round);
    round.num_tokens = args.num_tokens;
    round.num_arrived = 0;
    set_step(round, Step::routed);
    store_relaxed(&r.next_round, shared.round + 1);
  }
  enter(r, shared.round, Phase::dispatch_send);
  sync_block();
  route_choices(r, args, round);
  for (i32 dst = thread_idx(); dst < r.shape.num_ranks; dst += num_threads())
    if (may_open(r, round, dst)) add_rank(round.opened, dst);
}

// Lists the places of one token and makes their headers. By the first warp, a lane a choice.
FA2A_DEVICE void list_places(const DeviceRank& r, const DeviceRound& round, i32 token, SendShared& shared) {
  const i32 k = r.shape.num_topk;
  const i64 first = static_cast<i64>(token) * k;
  const i32 dst = lane() < k ? round.dst_rank[first + lane()] : -1;
  const bool goes = dst >= 0 && round.opened.has(dst);
  i32 before = 0, all = 0;  // choices of this token for the same rank
  for (i32 choice = 0; choice < k && goes; ++choice) {
    if (round.dst_rank[first + choice] != dst) continue;
    before += choice < lane() ? 1 : 0;
    ++all;
  }
  const bool makes_row = goes && before == 0;
  const u32 rows = ballot(makes_row);
  const u64 used_bytes = sizeof(RowHeader) + sizeof(RowChoice) * static_cast<u64>(all);
  const i32 num_words = makes_row ? static_cast<i32>(round_up(used_bytes, sizeof(Vector16)) / sizeof(u32)) : 0;
  const i32 end = warp_prefix(num_words);
  const i32 place = count_bits(rows & lanes_below());
  if (makes_row) {
    u8* partition = r.outbound[dst];
    const auto slot = static_cast<u64>(round.dispatch_row[first + lane()]);
    shared.rows[place] = partition + r.at.dispatch_rows[parity_of(round)] + r.at.dispatch_stride * slot;
    shared.headers[place] = partition + r.at.row_headers[parity_of(round)] + r.at.header_stride * slot;
    shared.header_words[place] = end - num_words;
    u32* words = shared.words + end - num_words;
    words[0] = static_cast<u32>(token);
    words[1] = static_cast<u32>(all);
    i32 at = 2;
    for (i32 choice = lane(); choice < k; ++choice) {
      if (round.dst_rank[first + choice] != dst) continue;
      words[at] = static_cast<u32>(r.expert_local[round.expert[first + choice]]);
      words[at + 1] = static_cast<u32>(choice);
      words[at + 2] = bits_of(round.weights[first + choice]);
      at += 3;
    }
    for (; at < num_words; ++at) words[at] = 0;
  }
  const i32 total = shuffle(end, kWarpLanes - 1);
  if (lane() == 0) {
    shared.num_places = count_bits(rows);
    shared.header_words[count_bits(rows)] = total;
  }
}

// Tells every active peer.
FA2A_DEVICE void signal_rows(DeviceRank& r, const DeviceRound& round) {
  if (thread_idx() == 0) point(r.host, Point::dispatch_rows_sent, round.round);
  sync_block();
  tell_peers(r, round, Point::dispatch_half_signalled, [&](i32 dst) {
    if (!round.active.has(dst)) return;
    const bool opened = round.opened.has(dst);
    if (opened) point(r.host, Point::dispatch_chunk, round.round);
    signal(r, round, Verb::dispatch, dst, opened ? static_cast<u64>(round.rows_to[dst]) : 0, !opened);
  });
  if (thread_idx() == 0) point(r.host, Point::dispatch_signalled, round.round);
}

// Stores rows and tells. Any number of blocks; a token at a time.
FA2A_KERNEL dispatch_send(DeviceRank* rank, SendArgs args, const DeviceHandle* handle) {
  DeviceRank& r = *rank;
  SendShared& shared = block_shared<SendShared>();
  DeviceRound* found = round_at(r, *handle, Step::routed);
  if (found == nullptr) return;
  DeviceRound& round = *found;
  put_claims(r, round);
  for (i32 token = block_idx(); token < round.num_tokens; token += num_blocks()) {
    if (warp() == 0) list_places(r, round, token, shared);
    if (!planted(Plant::no_list_barrier)) sync_block();
    put_headers(shared);
    put_token(r, args, token, shared);
    if (thread_idx() == 0 && 2 * (token + 1) >= round.num_tokens && shared.num_places > 0)
      point(r.host, Point::dispatch_send_rows, round.round);
    sync_block();  // the list is made anew
  }
  if (!is_last_block(round, shared.is_last)) return;
  signal_rows(r, round);
  end_half(r, round, Phase::caller, Step::sent);
}

}  // namespace device
}  // namespace fa2a
