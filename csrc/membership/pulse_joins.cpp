// The pulse at step starts: who knocks, what members hold for, and the turns of a newcomer until it is in.
#include "host/clock.hpp"
#include "host/doorbell.hpp"
#include "membership/pulse.hpp"
#include "protocol/memory.hpp"

namespace fa2a {

namespace {

// A newcomer whose beat stands still for so long is not waited for. It costs nobody anything: it may be back any time.
constexpr i64 kBeatsOfANewcomer = 20;
// After a hold in vain, so much longer than the hold was nobody holds for that rank again.
constexpr i64 kRestPerHold = 8;

Life life_of(const ControlPage& page) { return static_cast<Life>(__atomic_load_n(&page.life, __ATOMIC_ACQUIRE)); }

}  // namespace

// Of ranks outside the view only. A newcomer that knocks before this rank has learnt that the life before is out waits:
// the old page is still wanted, its frozen record may have to be counted. So is that of a newcomer for whom this rank
// has promised: it may be in the next view already, and dead, and another one in its place would pass for it.
void Pulse::answer_knocks(i64 now) {
  if (options_.doors == nullptr) return;
  const RankSet& active = newest_view(state_.ring).active;
  for (i32 rank = 0; rank < options_.agreement.num_ranks; ++rank) {
    if (active.has(rank) || rank == options_.agreement.rank) continue;
    const bool is_promised = hold_state() == HoldState::committed && held_.change.rank == static_cast<u64>(rank);
    if (is_promised && guarded(guard_visitor_kept)) continue;
    const u64 knock = load_acquire(&own().knocks[rank]);
    if (knock == 0) continue;
    store_release(&own().knocks[rank], 0);
    const i32 pid = static_cast<i32>(knock_field::Process::unpack(knock));
    if (!options_.doors->open_page(rank, pid, static_cast<i32>(knock_field::FilePlusOne::unpack(knock)) - 1)) continue;
    const auto at = static_cast<size_t>(rank);
    // Versions of the new page begin anew, and one that happens to be the old one's must not be taken for it.
    copies_[at] = PageCopies();
    watches_[at] = watch_of(*pages_[at]);
    visitors_[at] = {pid, true, 0, now};
    detector_.forget(rank);
    proven_dead_.remove(rank);
    std::lock_guard<std::mutex> lock(mutex_);
    ignored_until_ns_[at] = 0;
  }
}

// Alive as far as one can see, and beating: what is asked of a newcomer before anybody holds for it.
bool Pulse::is_willing(i32 rank, i64 now) {
  const auto at = static_cast<size_t>(rank);
  Visitor& visitor = visitors_[at];
  const ControlPage& page = *pages_[at];
  if (!visitor.is_known || life_of(page) != Life::joining) return false;
  if (owner_died(&page.death_word) || watches_[at].has_exited()) return visitor.is_known = false;
  const u64 beat = load_acquire(&page.process_beat);
  if (beat != visitor.beat) visitor.beat = beat, visitor.beat_since_ns = now;
  return now - visitor.beat_since_ns < kBeatsOfANewcomer * options_.beat_ns || !guarded(guard_hold_bound);
}

// What stands at a step start for this rank, if anything does and its newcomer is ready.
StepChange Pulse::change_of(i32 rank, i64 now) {
  const View& view = newest_view(state_.ring);
  const ControlPage& page = *pages_[static_cast<size_t>(rank)];
  if (now < ignored_until_ns_[static_cast<size_t>(rank)]) return StepChange();
  if (view.active.has(rank)) {
    if (load_acquire(&page.wants_to_leave) == 0 || view.active.size() == 1) return StepChange();
    return {ChangeKind::leave, static_cast<u64>(rank), view.incarnations[rank]};
  }
  if (rank == options_.agreement.rank || !is_willing(rank, now)) return StepChange();
  if (load_acquire(&page.ready_for) != view.epoch + 1) return StepChange();
  return {ChangeKind::join, static_cast<u64>(rank), page.incarnation};
}

// One change at a time, the lowest rank's first: members that know of several must mean the same one.
void Pulse::look_for_changes(i64 now) {
  std::lock_guard<std::mutex> lock(mutex_);
  const View& view = newest_view(state_.ring);
  i32 visitor = kMaxRanks;
  StepChange ready;
  for (i32 rank = 0; rank < options_.agreement.num_ranks; ++rank) {
    const bool is_visitor = !view.active.has(rank) && rank != options_.agreement.rank && is_willing(rank, now);
    if (is_visitor && visitor == kMaxRanks) visitor = rank;
    if (is_visitor && visitor != rank) continue;
    if (ready.kind == ChangeKind::none) ready = change_of(rank, now);
  }
  newcomer_.reset();
  if (visitor != kMaxRanks) {
    const ControlPage& page = *pages_[static_cast<size_t>(visitor)];
    newcomer_ = Newcomer{visitor, visitors_[static_cast<size_t>(visitor)].pid, static_cast<i32>(page.window_fd),
                         page.incarnation, view};
  }
  ready_change_ = ready;
  change_waits_.store(newcomer_.has_value() || ready.kind != ChangeKind::none);
  update_hold();
}

// With the mutex held.
void Pulse::forget_changes() {
  newcomer_.reset();
  ready_change_ = StepChange();
  change_waits_.store(false);
}

std::optional<Newcomer> Pulse::newcomer() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return newcomer_;
}

StepChange Pulse::ready_change() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return ready_change_;
}

bool Pulse::hold(const StepHold& where) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    // Rounds below the view's first would still run without the newcomer, and where they end need be no step start.
    if (!(where.change == ready_change_) || where.round < newest_view(state_.ring).first_round) return false;
    held_ = where;
    hold_state_.store(static_cast<u32>(HoldState::holding));
  }
  ring_pulse(own());
  return true;
}

void Pulse::end_hold(bool timed_out) {
  std::lock_guard<std::mutex> lock(mutex_);
  u32 holding = static_cast<u32>(HoldState::holding);
  if (!hold_state_.compare_exchange_strong(holding, static_cast<u32>(HoldState::none))) return;
  if (timed_out) ignored_until_ns_[held_.change.rank] = now_ns() + kRestPerHold * options_.join_hold_ns;
  ring_pulse(own());
}

// With the mutex held, so that the caller cannot go on between the look at its word and the promise.
bool Pulse::commit_hold(const StepChange& change) {
  u32 holding = static_cast<u32>(HoldState::holding);
  return held_.change == change && hold_state_.compare_exchange_strong(holding, static_cast<u32>(HoldState::committed));
}

// With the mutex held. What stands on the page is where the caller is: nowhere, or at this step start in this epoch.
void Pulse::update_hold() {
  StepHold next;
  if (hold_state() == HoldState::committed) {
    next = published_hold_;
  } else if (hold_state() == HoldState::holding) {
    if (held_.change == ready_change_) {
      next = held_;
      next.epoch_plus_one = newest_view(state_.ring).epoch + 1;
    } else {
      hold_state_.store(static_cast<u32>(HoldState::none));
      ring_doorbell(own());
    }
  }
  if (next == published_hold_) return;
  published_hold_ = next;
  publish(own().hold, next);
  poke_ = true;
}

void Pulse::ask_to_leave() {
  store_release(&own().wants_to_leave, 1);
  for (ControlPage* page : pages_) ring_pulse(*page);
}

// -- of a newcomer ----------------------------------------------------------------------------------------------------

const Decision* Pulse::newest_decision() {
  const Decision* newest = nullptr;
  for (i32 rank = 0; rank < options_.agreement.num_ranks; ++rank) {
    LastRead<Decision>& copy = copies_[static_cast<size_t>(rank)].decision;
    if (rank == options_.agreement.rank || !copy.newest(pages_[static_cast<size_t>(rank)]->decision)) continue;
    if (newest == nullptr || copy.record.view.epoch > newest->view.epoch) newest = &copy.record;
  }
  return newest;
}

void Pulse::reached_all(u64 epoch) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (reached_epoch_plus_one_ == epoch + 1) return;
  reached_epoch_plus_one_ = epoch + 1;
  ring_pulse(own());
}

// Do all members hold for this newcomer, at one round? What it then publishes is all the promise that it can give: it
// has begun nothing, and begins nothing but what a decision with it says.
bool Pulse::all_hold_for_me(StepHold& where) {
  const View& members = agreement_.current().view;
  const StepChange me{ChangeKind::join, static_cast<u64>(options_.agreement.rank), own().incarnation};
  bool is_first = true;
  for (i32 rank = 0; rank < options_.agreement.num_ranks; ++rank) {
    if (!members.active.has(rank)) continue;
    LastRead<StepHold>& copy = copies_[static_cast<size_t>(rank)].hold;
    if (!copy.newest(pages_[static_cast<size_t>(rank)]->hold)) return false;
    const StepHold& hold = copy.record;
    if (!(hold.change == me) || hold.epoch_plus_one != members.epoch + 1) return false;
    if (!is_first && !(hold == where)) return false;
    where = hold;
    is_first = false;
  }
  return !is_first;
}

// A newcomer opens the page of every rank that can be found, and again where another life has taken the place of one
// before this rank was in. What was read of the page before is that life's, and so is the process: it may end any time,
// and would be taken for a member that has died.
void Pulse::meet_members() {
  if (!guarded(guard_members_anew)) return;
  for (size_t at = 0; at < pages_.size(); ++at) {
    const ControlPage& page = *pages_[at];
    if (met_[at] == page.incarnation) continue;
    met_[at] = page.incarnation;
    copies_[at] = PageCopies();
    if (options_.between_processes) watches_[at] = watch_of(page);
  }
}

void Pulse::join_turn(i64 now) {
  meet_members();
  const Decision* newest = newest_decision();
  if (newest == nullptr) return;
  std::lock_guard<std::mutex> lock(mutex_);
  const i32 me = options_.agreement.rank;
  const View& view = newest->view;
  if (view.epoch > agreement_.current().view.epoch) {
    Decision base = *newest;
    if (view.incarnations[me] == own().incarnation) {
      if (view.active.has(me)) return come_in(base, now);
      // Let in, and out again before it ever knew.
      fetch_or(&state_.release, release_evicted);
      return;
    }
    base.view.incarnations[me] = own().incarnation;
    state_.ring.views[0] = base.view;
    agreement_ = Agreement(options_.agreement, base);
    views_.clear();
    keep(base, now);
    store_release(&own().ready_for, 0);
  }
  const u64 epoch = agreement_.current().view.epoch;
  if (reached_epoch_plus_one_ != epoch + 1) return;
  if (load_relaxed(&own().ready_for) != epoch + 1) {
    store_release(&own().ready_for, epoch + 1);
    poke_ = true;
  }
  StepHold where;
  if (!all_hold_for_me(where) || where == published_hold_) return;
  options_.doors->fill_window(agreement_.current().view, where.round, where.collective);
  published_hold_ = where;
  publish(own().hold, published_hold_);
  poke_ = true;
}

// With the mutex held. From here on this rank is a member like any other.
void Pulse::come_in(const Decision& decision, i64 now) {
  const View& view = decision.view;
  state_.started = view.first_round;
  state_.ring.views[0] = view;
  agreement_ = Agreement(options_.agreement, decision);
  views_.clear();
  keep(decision, now);
  announced_epoch_ = view.epoch;
  store_release(&own().progress, pack_progress(view.first_round - 1, Phase::idle, 0));
  publish(own().decision, decision);
  publish(own().acceptor, agreement_.record());
  published_hold_ = StepHold();
  publish(own().hold, published_hold_);
  __atomic_store_n(&own().life, static_cast<u32>(Life::running), __ATOMIC_SEQ_CST);
  joining_.store(false);
  poke_ = true;
  changed_.notify_all();
}

}  // namespace fa2a
