// What every rank does: rounds, one after the other or two open, each call of it timed and each answer checked.
#include <algorithm>

#include "tests/simulator/world.hpp"

namespace fa2a::sim {

void* World::begin_worker(void* argument) {
  std::unique_ptr<std::pair<World*, i32>> own(static_cast<std::pair<World*, i32>*>(argument));
  own->first->work(own->second);
  return nullptr;
}

template <class Call>
auto World::timed(i32 rank, const char* name, Call call) {
  Member& member = at(rank);
  member.call = name;
  member.call_began = scheduler_.now();
  member.stood_still_ns = 0;
  auto result = call();
  member.call = nullptr;
  return result;
}

// Experts, and whatever else a caller does between two calls.
void World::compute() {
  const i64 duration = scheduler_.dice.heavy(schedule_.most_compute_ns);
  if (duration > 0 && !scheduler_.over) scheduler_.sleep_until(scheduler_.now() + duration, nullptr, 0);
}

void World::run_experts(i32 rank, u64 round, const OpenRound& open) {
  Member& member = at(rank);
  for (const Received& row : open.received) {
    if (!open.taken.has(row.src_rank)) continue;
    for (i32 h = 0; h < kHidden; ++h) {
      const size_t i = static_cast<size_t>(row.position) * kHidden + static_cast<size_t>(h);
      member.y[round % kNumParities][i] = returned_value(member.recv[i], rank * kNumLocal + row.local_expert);
    }
  }
}

Status World::dispatch(i32 rank, i32 number) {
  Member& member = at(rank);
  const auto round = static_cast<u64>(number);
  Batch& batch = member.batches[round % kNumParities];
  batch = Batch(schedule_, rank, round);
  DispatchArgs sent{};
  sent.x = reinterpret_cast<const u8*>(batch.x.data());
  sent.topk_idx = batch.experts.data();
  sent.idx_is_64_bit = true;
  sent.topk_weights = batch.weights.data();
  sent.num_tokens = batch.num_tokens;
  const RankState& state = member.endpoint->state();
  const RankSet suspects = state.suspects;
  const u64 newest = state.ring.newest;
  DispatchResult got = timed(rank, "dispatch_send", [&] { return member.endpoint->dispatch_send(sent); });
  if (got.status != Status::ok || scheduler_.over) return got.status;
  if (got.round != round) fail("P1: a round was jumped or repeated");
  const OpenRound& open = member.endpoint->context().rounds[round % kNumParities];
  Entry& entry = member.history[round];
  entry = {true, false, open.epoch, open.active, RankSet()};
  check_hold(rank, suspects, newest);
  check_distance(rank);
  check_taken_early(rank, round);
  if (scheduler_.dice.one_in(3)) compute();
  const ReceiveArgs received{
      round, reinterpret_cast<u8*>(member.recv.data()), nullptr, nullptr, member.counts.data(), member.offsets.data()};
  got = timed(rank, "dispatch_receive", [&] { return member.endpoint->dispatch_receive(received); });
  if (got.status != Status::ok || scheduler_.over) return got.status;
  run_experts(rank, round, open);
  check_received(rank, round, open);
  entry.received = true;
  entry.taken = open.taken;
  return Status::ok;
}

Status World::combine(i32 rank, i32 number) {
  Member& member = at(rank);
  const auto round = static_cast<u64>(number);
  Batch& batch = member.batches[round % kNumParities];
  compute();
  const CombineArgs back{reinterpret_cast<const u8*>(member.y[round % kNumParities].data()), round, /*abandon=*/false};
  u8 lost = 0;
  const ReduceArgs reduced{round, reinterpret_cast<u8*>(batch.out.data()), batch.codes.data(), &lost};
  CombineResult done = timed(rank, "combine_send", [&] { return member.endpoint->combine_send(back); });
  if (done.status != Status::ok || scheduler_.over) return done.status;
  if (scheduler_.dice.one_in(3)) compute();
  done = timed(rank, "combine_receive", [&] { return member.endpoint->combine_receive(reduced); });
  if (done.status != Status::ok || scheduler_.over) return done.status;
  check_combined(rank, round, lost != 0);
  return Status::ok;
}

void World::work(i32 rank) {
  constexpr i32 kMostSuspended = 12;
  Member& member = at(rank);
  Status status = Status::ok;
  auto dispatched = [&](i32 round) {
    member.round = round;
    arm(rank);
    for (i32 attempt = 0;; ++attempt) {
      status = dispatch(rank, round);
      if (status != Status::quorum_lost || attempt == kMostSuspended || scheduler_.over) return status == Status::ok;
      scheduler_.sleep_until(scheduler_.now() + 20 * kMs, nullptr, 0);
    }
  };
  auto combined = [&](i32 round) { return (status = combine(rank, round)) == Status::ok; };
  const i32 n = schedule_.num_rounds;
  for (i32 round = 0; round <= n && status == Status::ok && !scheduler_.over; ++round) {
    if (member.leaves && (!schedule_.two_open || round == 0)) {
      member.endpoint->close();
      member.end = End::left;
      return;
    }
    if (round < n && !dispatched(round)) break;
    const i32 closes = schedule_.two_open ? round - 1 : round;
    if (closes >= 0 && closes < n && !combined(closes)) break;
    if (scheduler_.dice.one_in(4)) compute();
  }
  member.end = status == Status::ok            ? End::finished
               : status == Status::evicted     ? End::evicted
               : status == Status::quorum_lost ? End::suspended
                                               : End::running;
  if (member.end == End::running && !scheduler_.over)
    fail("P1: a call ended with status " + std::to_string(static_cast<u32>(status)));
}

}  // namespace fa2a::sim
