// What the faults of the test build do to rows and signals on their way.
#include "transport/faults.hpp"

#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS

#include <signal.h>
#include <string.h>

#include "host/clock.hpp"
#include "host/process.hpp"
#include "protocol/memory.hpp"
#include "protocol/signal.hpp"

namespace fa2a {

u64 Faults::next_random() {  // splitmix64, public domain, Sebastiano Vigna
  u64 z = (seed += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

bool Faults::put_row(i32 dst, u8* to, const u8* from, u64 num_bytes) {
  if (cut.has(dst)) return true;
  if (slow_row_ns <= 0) return false;
  // In two halves, so that a reader without its guard finds a torn row and not only a late one.
  memcpy(to, from, num_bytes / 2);
  sleep_ns(static_cast<i64>(next_random() % static_cast<u64>(slow_row_ns)));
  memcpy(to + num_bytes / 2, from + num_bytes / 2, num_bytes - num_bytes / 2);
  return true;
}

bool Faults::put_signal(i32 dst, u64* word, u64 value, bool combine) {
  if (cut.has(dst) || drop_signals.has(dst)) return false;
  if (late_signal_ns > 0) sleep_ns(static_cast<i64>(next_random() % static_cast<u64>(late_signal_ns)));
  Signal s = unpack(value);
  if (lies != 0 && !s.declined && s.round >= lies_from_round) {
    if (lying(lie_count) && !combine) s.count = signal_field::Count::max - next_random() % 7;
    if (lying(lie_combine_count) && combine && lost_one_.has(dst)) s.count -= 1;
    if (combine) lost_one_.remove(dst);
    if (lying(lie_old_round)) s.round -= 2;
    if (lying(lie_old_epoch)) s.epoch -= 1;
    if (lying(lie_future)) s.round += 1000;
    num_faults.fetch_add(1);
  }
  store_release(word, pack(s));
  return true;
}

bool Faults::loses_answer(i32 dst) {
  if (!lying(lie_combine_count) || lost_one_.has(dst)) return false;
  lost_one_.add(dst);
  return true;
}

void Faults::lie_about(RowHeader* stored) {
  if (lies == 0) return;
  auto* choices = reinterpret_cast<RowChoice*>(stored + 1);
  const i32 wild = (next_random() & 1) != 0 ? -1 - static_cast<i32>(next_random() % 1000) : 1 << 20;
  if (lying(lie_expert)) choices[0].local_expert = wild;
  if (lying(lie_choice)) choices[0].choice = wild;
  if (lying(lie_twice) && stored->num_choices > 1) choices[1].local_expert = choices[0].local_expert;
  if (lying(lie_num_choices)) stored->num_choices = wild;
}

void Faults::lie_about_claims(i32* claims, i32 num_experts) {
  if (!lying(lie_claims)) return;
  const i32 wrong[] = {claims[0] + 1, claims[0] - 1, -7, 1 << 30};
  claims[next_random() % static_cast<u64>(num_experts)] = wrong[next_random() % 4];
  num_faults.fetch_add(1);
}

void Faults::at(Point point, u64 round, Fabric& fabric) {
  for (Armed& one : armed) {
    if (one.action == Action::none || one.point != point || one.round != round) continue;
    if (one.skip-- > 0) continue;
    const Armed fault = one;
    one.action = Action::none;
    num_faults.fetch_add(1);
    store_release(&fabric.page(rank).fault_at_ns, static_cast<u64>(now_ns()));
    if (fault.action == Action::sleep) sleep_ns(fault.value * kNsPerUs);
    if (fault.action == Action::kill) signal_self(SIGKILL);
    if (fault.action == Action::stop) signal_self(SIGSTOP);
    if (fault.action == Action::crash) throw Crashed();
  }
}

}  // namespace fa2a

#endif
