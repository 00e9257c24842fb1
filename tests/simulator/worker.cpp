// What every life does: steps of rounds, one after the other or two open, each call timed and each answer checked.
#include <algorithm>

#include "tests/simulator/world.hpp"

namespace fa2a::sim {

void* World::begin_worker(void* argument) {
  std::unique_ptr<std::pair<World*, i32>> own(static_cast<std::pair<World*, i32>*>(argument));
  own->first->work(own->first->at(own->second));
  return nullptr;
}

template <class Call>
auto World::timed(Member& member, const char* name, Call call) {
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

void World::run_experts(Member& member, u64 round, const OpenRound& open) {
  for (const Received& row : open.received) {
    if (!open.taken.has(row.src_rank)) continue;
    for (i32 h = 0; h < kHidden; ++h) {
      const size_t i = static_cast<size_t>(row.position) * kHidden + static_cast<size_t>(h);
      member.y[round % kNumParities][i] = returned_value(member.recv[i], member.life, row.local_expert);
    }
  }
}

Status World::dispatch(Member& member, i32 number) {
  const auto round = static_cast<u64>(number);
  Batch& batch = member.batches[round % kNumParities];
  batch = Batch(schedule_, member.life, round);
  DispatchArgs sent{};
  sent.x = reinterpret_cast<const u8*>(batch.x.data());
  sent.topk_idx = batch.experts.data();
  sent.idx_is_64_bit = true;
  sent.topk_weights = batch.weights.data();
  sent.num_tokens = batch.num_tokens;
  const RankState& state = member.endpoint->state();
  const RankSet suspects = state.suspects;
  const u64 newest = state.ring.newest;
  DispatchResult got = timed(member, "dispatch_send", [&] { return member.endpoint->dispatch_send(sent); });
  if (got.status != Status::ok || scheduler_.over) return got.status;
  if (got.round != round) fail("P1: a round was jumped or repeated");
  const OpenRound& open = member.endpoint->context().rounds[round % kNumParities];
  member.holds_here = false;
  if (member.history.size() <= round) member.history.resize(round + 1);
  Entry& entry = member.history[round];
  entry = {true, false, open.epoch, open.active, RankSet()};
  check_hold(member, suspects, newest);
  check_distance(member);
  check_taken_early(member, round);
  if (scheduler_.dice.one_in(3)) compute();
  const ReceiveArgs received{
      round, reinterpret_cast<u8*>(member.recv.data()), nullptr, nullptr, member.counts.data(), member.offsets.data()};
  got = timed(member, "dispatch_receive", [&] { return member.endpoint->dispatch_receive(received); });
  if (got.status != Status::ok || scheduler_.over) return got.status;
  run_experts(member, round, open);
  check_received(member, round, open);
  entry.received = true;
  entry.taken = open.taken;
  return Status::ok;
}

Status World::combine(Member& member, i32 number) {
  const auto round = static_cast<u64>(number);
  Batch& batch = member.batches[round % kNumParities];
  compute();
  const CombineArgs back{reinterpret_cast<const u8*>(member.y[round % kNumParities].data()), round, /*abandon=*/false};
  u8 lost = 0;
  const ReduceArgs reduced{round, reinterpret_cast<u8*>(batch.out.data()), batch.codes.data(), &lost};
  CombineResult done = timed(member, "combine_send", [&] { return member.endpoint->combine_send(back); });
  if (done.status != Status::ok || scheduler_.over) return done.status;
  if (scheduler_.dice.one_in(3)) compute();
  done = timed(member, "combine_receive", [&] { return member.endpoint->combine_receive(reduced); });
  if (done.status != Status::ok || scheduler_.over) return done.status;
  check_combined(member, round, lost != 0);
  return Status::ok;
}

// Who is suspended may be so for a while only.
template <class Call>
Status World::patiently(Call call) {
  constexpr i32 kMostSuspended = 12;
  for (i32 attempt = 0;; ++attempt) {
    const Status status = call();
    if (status != Status::quorum_lost || attempt == kMostSuspended || scheduler_.over) return status;
    scheduler_.sleep_until(scheduler_.now() + 20 * kMs, nullptr, 0);
  }
}

Status World::begin_step(Member& member) {
  member.holds_here = true;
  bool is_out = false;
  if (member.retires) member.endpoint->ask_to_leave();
  const Status status =
      patiently([&] { return timed(member, "begin_step", [&] { return member.endpoint->begin_step(is_out); }); });
  if (status != Status::ok || scheduler_.over) return status;
  const bool is_alone = newest_view(member.endpoint->state().ring).active.size() == 1;
  if (!member.retires || !(is_out || is_alone)) return Status::ok;
  member.endpoint->close();
  member.end = End::left;
  return Status::closed;
}

// All run the same rounds. While somebody is on its way in, or one that was replaced is still to wake, the end is put
// off by a step; once anybody has come to it, it stands for all.
bool World::goes_on(i32 round) {
  if (round < last_round_) return true;
  bool waits = false;
  for (size_t i = 0; i < schedule_.faults.size(); ++i) {
    const Fault& fault = schedule_.faults[i];
    const bool will_come =
        fault.after < 0 || (fault.after != static_cast<i32>(i) && struck_[static_cast<size_t>(fault.after)]);
    waits |= fault.is_of_world() && !struck_[i] && will_come;
  }
  for (const auto& member : members_) {
    if (!is_alive(member->life)) continue;
    const i32 current = current_[static_cast<size_t>(member->rank)];
    const bool is_replaced = current != member->life && at(current).is_in;
    waits |= member->end == End::running && (!member->is_in || is_replaced);
  }
  is_ending_ |= !waits || schedule_.rounds_per_step == 0;
  if (is_ending_) return false;
  last_round_ += schedule_.rounds_per_step;
  scheduler_.sleep_until(scheduler_.now() + 2 * kMs, nullptr, 0);
  return true;
}

void World::end_work(Member& member, Status status) {
  if (status == Status::ok) {
    member.end = End::finished;
  } else if (status == Status::quorum_lost) {
    member.end = End::suspended;
  } else if (status == Status::evicted) {
    // Who comes back ends its former life first, and so does who is told that it is out.
    if (schedule_.rounds_per_step > 0 && !scheduler_.over) member.endpoint->close();
    member.end = End::evicted;
  } else if (member.end == End::running && !scheduler_.over) {
    fail("P1: a call ended with status " + std::to_string(static_cast<u32>(status)));
  }
}

void World::work(Member& member) {
  if (!member.is_in && !come_in(member)) return;
  Status status = Status::ok;
  auto combined = [&](i32 round) { return (status = combine(member, round)) == Status::ok && !scheduler_.over; };
  const auto first = static_cast<i32>(member.endpoint->state().started);
  i32 closes = first;
  for (i32 round = first; status == Status::ok && !scheduler_.over; ++round) {
    if (member.leaves && (!schedule_.two_open || round == 0)) {
      member.endpoint->close();
      member.end = End::left;
      return;
    }
    const bool is_step_start = schedule_.rounds_per_step > 0 && round % schedule_.rounds_per_step == 0;
    while (is_step_start && closes < round && combined(closes)) ++closes;
    if (status != Status::ok || scheduler_.over) break;
    const bool is_last = !goes_on(round);
    member.round = round;
    if (!is_last) arm(member);
    if (!is_last && is_step_start && (status = begin_step(member)) != Status::ok) break;
    if (!is_last && (status = patiently([&] { return dispatch(member, round); })) != Status::ok) break;
    while (closes < round + (schedule_.two_open || is_last ? 0 : 1) && combined(closes)) ++closes;
    if (status != Status::ok) break;
    if (scheduler_.dice.one_in(4)) compute();
    if (is_last) break;
  }
  end_work(member, status);
}

}  // namespace fa2a::sim
