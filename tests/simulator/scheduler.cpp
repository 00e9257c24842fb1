// The scheduler's loop, and how a strand gives way.
#include "tests/simulator/scheduler.hpp"

#include <algorithm>

namespace fa2a::sim {

Scheduler* scheduler = nullptr;

Strand& Scheduler::spawn(Fibre::Body body, void* argument, i32 life, bool is_pulse) {
  strands_.push_back(std::make_unique<Strand>());
  Strand& strand = *strands_.back();
  strand.fibre = std::make_unique<Fibre>(body, argument);
  strand.life = life;
  strand.is_pulse = is_pulse;
  strand.ready_at = now_ + static_cast<i64>(dice.below(50 * kUs));
  strand.budget = 1;
  return strand;
}

i64 Scheduler::due(const Strand& strand) const {
  if (strand.fibre->ended()) return kNever;
  if (over) return std::min(strand.ready_at, now_ + kMs);
  const Machine& machine = machines[static_cast<size_t>(strand.life)];
  if (machine.dead) return kNever;
  const i64 paused = strand.is_pulse ? machine.pulse_paused_until : machine.kernel_paused_until;
  return std::max({strand.ready_at, machine.stopped_until, paused});
}

bool Scheduler::step() {
  Strand* next = nullptr;
  i64 at = kNever;
  for (const auto& strand : strands_) {
    const i64 when = due(*strand);
    if (when < at) at = when, next = strand.get();
  }
  const i64 other = next_other ? next_other() : kNever;
  if (next == nullptr && other == kNever) return false;
  ++num_steps;
  if (other <= at) {
    now_ = std::max(now_, other);
    do_other();
    return true;
  }
  now_ = std::max(now_, at);
  next->num_words = 0;
  next->budget = next->num_spent = dice.between(1, pace_.most_accesses);
  running_ = next;
  next->fibre->resume();
  running_ = nullptr;
  return true;
}

void Scheduler::give_way() { Fibre::yield(); }

void Scheduler::touch() {
  Strand* self = running_;
  if (self == nullptr) return;
  Machine& machine = machines[static_cast<size_t>(self->life)];
  if (!self->is_pulse && machine.countdown > 0 && --machine.countdown == 0 && !over) {
    struck(self->life);
    self->budget = 1;
  }
  if (--self->budget > 0) return;
  const i64 spent = self->num_spent * machine.access_ns;
  const i64 hiccup = dice.one_in(24) ? dice.heavy(pace_.most_hiccup_ns) : 0;
  self->ready_at = now_ + 1 + static_cast<i64>(dice.below(static_cast<u64>(2 * spent))) + hiccup;
  give_way();
}

void Scheduler::sleep_until(i64 at, const u32* const* words, i32 num_words) {
  Strand* self = running_;
  if (self == nullptr) return;
  self->ready_at = std::max(at, now_ + 1);
  self->num_words = num_words;
  for (i32 i = 0; i < num_words; ++i) self->words[i] = words[i];
  give_way();
}

void Scheduler::wake(const u32* word) {
  for (const auto& strand : strands_) {
    for (i32 i = 0; i < strand->num_words; ++i) {
      if (strand->words[i] != word) continue;
      strand->ready_at = std::min(strand->ready_at, now_ + dice.between(1 * kUs, 30 * kUs));
      strand->num_words = 0;
    }
  }
}

i64 Scheduler::local_ns() const {
  if (running_ == nullptr) return now_;
  const Machine& machine = machines[static_cast<size_t>(running_->life)];
  return now_ + now_ / 1000000 * machine.clock_drift_ppm + machine.clock_offset_ns;
}

i64 Scheduler::to_global(i64 duration_ns) const {
  if (running_ == nullptr || duration_ns >= kNever / 2) return duration_ns;
  return duration_ns - duration_ns / 1000000 * machines[static_cast<size_t>(running_->life)].clock_drift_ppm;
}

}  // namespace fa2a::sim
