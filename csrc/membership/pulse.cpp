// One turn of the pulse: beat, look at every member, publish what was found, agree, rest until something moves.
#include "membership/pulse.hpp"

#include <algorithm>

#include "host/clock.hpp"
#include "host/doorbell.hpp"
#include "membership/two_copies.hpp"
#include "protocol/memory.hpp"

namespace fa2a {

Pulse::Pulse(std::vector<ControlPage*> pages, RankState& state, const PulseOptions& options, const Decision& first)
    : pages_(std::move(pages)),
      state_(state),
      options_(options),
      detector_(options.agreement.num_ranks),
      reports_(pages_.size()),
      copies_(pages_.size()),
      promised_at_(pages_.size()),
      awaited_since_ns_(pages_.size(), 0),
      visitors_(pages_.size()),
      agreement_(options.agreement, first),
      ignored_until_ns_(pages_.size(), 0),
      seen_waits_(pages_.size()) {
  keep(first, now_ns());
  announced_epoch_ = first.view.epoch;
  joining_.store(options_.joining);
  // A newcomer's first is not quite what was decided: it names the newcomer's own life already.
  if (!options_.joining) publish(own().decision, first);
  for (const ControlPage* page : pages_) met_.push_back(page->incarnation);
  if (!options_.between_processes) return;
  for (const ControlPage* page : pages_) watches_.push_back(watch_of(*page));
}

// The number of a process in another namespace is a stranger's here, or nobody's, and the stranger's end would be taken
// for the rank's. Its death word tells of its own end wherever it runs.
ProcessWatch Pulse::watch_of(const ControlPage& page) const {
  const u64 here = own().process_namespace;
  const bool is_named_here = here != 0 && page.process_namespace == here;
  return is_named_here || !guarded(guard_same_namespace) ? ProcessWatch(static_cast<i32>(page.pid)) : ProcessWatch();
}

Pulse::~Pulse() { leave(); }

void Pulse::start() {
  if (!kWatched) return;
  thread_ = std::thread([this] { run(); });
}

void Pulse::leave() {
  {
    // Under the mutex: a caller of next_proposal() is either before its look at `ending_` or asleep already.
    std::lock_guard<std::mutex> lock(mutex_);
    ending_.store(true);
  }
  changed_.notify_all();
  if (!thread_.joinable()) return;
  ring_pulse(own());
  thread_.join();
}

void Pulse::vanish() {
  vanishing_.store(true);
  leave();
}

// noexcept, all signals blocked, no way out but `ending_`: the death word says that this *thread* is gone, and peers
// take that for the process.
void Pulse::run() noexcept {
  block_all_signals();
  name_thread("fa2a-pulse");
  prefer_low_latency();
  death_word_.hold(&own().death_word);
  // Not before the word is held: a record counts as frozen once the word says that its one writer is gone.
  publish(own().acceptor, agreement_.record());
  while (!ending_.load()) {
    if (options_.pause_ns != nullptr) sleep_ns(options_.pause_ns->exchange(0));
    heard_ = __atomic_load_n(&own().pulse_bell, __ATOMIC_SEQ_CST);
    const i64 now = now_ns();
    if (guarded(guard_beat)) store_release(&own().process_beat, static_cast<u64>(now));
    if (joining_.load(std::memory_order_relaxed)) {
      join_turn(now);
    } else {
      answer_knocks(now);
      look(now);
      look_for_changes(now);
      agree(now);
    }
    if (poke_) poke_peers();
    rest(now_ns());
  }
  if (vanishing_.load()) return;
  __atomic_store_n(&own().life, static_cast<u32>(Life::left), __ATOMIC_SEQ_CST);
  death_word_.let_go();
  poke_peers();
}

void Pulse::look(i64 now) {
  detector_.look(now);
  for (i32 rank = 0; rank < options_.agreement.num_ranks; ++rank) {
    if (rank == options_.agreement.rank || proven_dead_.has(rank)) continue;
    if (!newest_view(state_.ring).active.has(rank)) continue;
    const Evidence found = look_at(rank);
    if (found == Evidence::left && has_left_as_decided(rank) && guarded(guard_decided_leave)) continue;
    accuse(rank, found);
  }
}

// It was gone before this rank came to adopt the view that leaves it out, which stands on its page and is adopted in
// this very turn. To accuse it would be to take a planned leave for a fault.
bool Pulse::has_left_as_decided(i32 rank) {
  LastRead<Decision>& decision = copies_[static_cast<size_t>(rank)].decision;
  if (!decision.newest(pages_[static_cast<size_t>(rank)]->decision)) return false;
  const View& view = decision.record.view;
  return view.epoch > newest_view(state_.ring).epoch && !view.active.has(rank);
}

// By this host's clock, since when a kernel, or the host in a collective, waits for this peer; 0: nobody does. A wait
// is one value, so a new one is a new wait.
i64 Pulse::waiting_since(i32 rank) {
  const u64 said = load_relaxed(&state_.waiting_in_round.since_ns[rank]);
  const auto in_collective = static_cast<i64>(load_relaxed(&state_.waiting_in_collective.since_ns[rank]));
  SeenWait& seen = seen_waits_[static_cast<size_t>(rank)];
  if (seen.said != said) seen = {said, said == 0 ? 0 : now_ns()};
  const i64 in_round = options_.kernels_have_own_clock ? seen.at_ns : static_cast<i64>(said);
  return in_round == 0 || (in_collective != 0 && in_collective < in_round) ? in_collective : in_round;
}

// What a kernel on a CPU does itself: it suspects whom it finds stalled, and that ends its wait whatever is made of it
// as evidence. Were the wait to go on until there is some, it would have no end behind a peer that may not come, being
// held back, while there is no quorum.
void Pulse::hear_stall(i32 rank) {
  const bool is_stalled = load_acquire(&state_.stalled_in[rank]) == newest_view(state_.ring).epoch + 1;
  if (!is_stalled || is_suspect(state_, rank)) return;
  suspect(state_, rank);
  ring_doorbell(own());
}

// Has the peer promised, for the view that is due, not to begin a round that this rank is in? Then it does not come,
// and that is no stall: it waits for a view, as this rank will. Were it accused, a rank that is suspended would be
// voted out as soon as quorum is back, for having waited for it. Whoever hangs is found out in the next view.
// Not by `started`, which may count a round that the promise itself sent back to the gate.
bool Pulse::is_held_back(i32 rank, u64 progress) {
  const auto at = static_cast<size_t>(rank);
  const u64 epoch_plus_one = newest_view(state_.ring).epoch + 1;
  LastRead<Promise>& copy = copies_[at].promise;
  if (!copy.newest(pages_[at]->promise) || copy.record.epoch_plus_one != epoch_plus_one) return false;
  if (promised_at_[at].epoch_plus_one != epoch_plus_one) promised_at_[at] = {epoch_plus_one, progress};
  if (load_acquire(&state_.started) <= copy.record.limit) return false;
  // Unless it was missed before it promised, and stands where it stood then.
  const bool comes_on = has_come_on(progress, promised_at_[at].progress);
  return is_suspended(state_) || comes_on || !is_missed_by_another(rank) || !guarded(guard_late_promise);
}

// Whoever reads a promise accuses nobody, so a stall that somebody accuses this rank of is older than its promise.
// Those who come to wait a little later than that one would otherwise never say so too, and it would go alone, being
// fewer than those it misses. What the dead said stands for ever, and is not counted.
bool Pulse::is_missed_by_another(i32 rank) const {
  const View& view = newest_view(state_.ring);
  const u64 stall = pack_accusation(view.epoch, Evidence::stall);
  for (i32 other = 0; other < options_.agreement.num_ranks; ++other) {
    if (!view.active.has(other) || proven_dead_.has(other) || !readable(other)) continue;
    if (load_acquire(&pages_[static_cast<size_t>(other)]->accusations[rank]) == stall) return true;
  }
  return false;
}

Evidence Pulse::look_at(i32 rank) {
  const ControlPage& page = *pages_[static_cast<size_t>(rank)];
  PeerSample sample;
  sample.life = static_cast<Life>(__atomic_load_n(&page.life, __ATOMIC_ACQUIRE));
  sample.owner_died = owner_died(&page.death_word);
  sample.has_exited = options_.between_processes && watches_[static_cast<size_t>(rank)].has_exited();
  sample.readable = readable(rank);
  sample.process_beat = hears(rank) ? load_acquire(&page.process_beat) : 0;
  sample.progress = load_acquire(&page.progress);
  // The leave is published first and the word let go after; seen in the other order, the leave must be looked at again.
  if (sample.owner_died || sample.has_exited)
    sample.life = static_cast<Life>(__atomic_load_n(&page.life, __ATOMIC_SEQ_CST));

  OwnWait wait;
  wait.since_ns = waiting_since(rank);
  if (wait.since_ns == 0 && awaited_promises_.has(rank)) wait.since_ns = awaited_since_ns_[static_cast<size_t>(rank)];
  const u64 named = static_cast<u64>(rank) + 1;
  const bool in_round = load_relaxed(&state_.waiting_in_round.peer) == named;
  const Waiting& waiting = in_round ? state_.waiting_in_round : state_.waiting_in_collective;
  wait.absent = load_relaxed(&waiting.peer) == named;
  wait.word = load_relaxed(&waiting.word);
  wait.progress = load_relaxed(&own().progress);
  const u64 kind = signal_field::Attempt::unpack(wait.word) % kNumWordKinds;
  const u64 parity = signal_field::Round::unpack(wait.word) % kNumParities;
  sample.sent = load_acquire(&page.sent[options_.agreement.rank].words[kind][parity]);
  hear_stall(rank);
  const bool is_excused = sample.readable && is_held_back(rank, sample.progress);
  wait.kernel_suspects = is_suspect(state_, rank) && !marked_.has(rank) && !is_excused;
  const Timeouts timeouts{static_cast<i64>(load_relaxed(&state_.silence_ns[rank])), options_.link_ns,
                          static_cast<i64>(load_relaxed(&state_.stall_ns[rank]))};
  return detector_.judge(rank, sample, wait, timeouts);
}

void Pulse::accuse(i32 rank, Evidence kind) {
  u64& word = own().accusations[rank];
  const u64 epoch = newest_view(state_.ring).epoch;
  const u64 value = kind == Evidence::none ? 0 : pack_accusation(epoch, kind);
  if (is_suspect(state_, rank) && !detector_.is_waking(rank)) marked_.add(rank);
  if (load_relaxed(&word) == value) return;
  const bool new_evidence =
      kind != Evidence::none && accusation_field::Kind::unpack(load_relaxed(&word)) != static_cast<u64>(kind);
  store_release(&word, value);
  poke_ = true;
  if (kind == Evidence::none) return;
  if (kind == Evidence::exit || kind == Evidence::left) proven_dead_.add(rank);
  marked_.add(rank);
  suspect(state_, rank);
  ring_doorbell(own());
  // The kernel woke one sleeper on the death word; the others sleep until somebody wakes them too.
  if (kind == Evidence::exit) futex_wake(&pages_[static_cast<size_t>(rank)]->death_word, 0x7fffffff);
  if (!new_evidence) return;
  std::lock_guard<std::mutex> lock(mutex_);
  // Not the time at which this turn began: the thread may have slept since, and the evidence would be older than its
  // cause.
  evidence_.push_back({rank, kind, now_ns()});
}

// After look(), which says who is proven dead.
void Pulse::agree(i64 now) {
  for (i32 rank = 0; rank < options_.agreement.num_ranks; ++rank) {
    MemberReport& report = reports_[static_cast<size_t>(rank)];
    report = MemberReport();
    report.proven_dead = proven_dead_.has(rank);
    // A kernel holds for the one that wakes, and no view lifts that before it moves on: the kernel would hold again at
    // once, view after view.
    report.accused = is_suspect(state_, rank) && (marked_.has(rank) || !detector_.is_waking(rank));
    if (rank != options_.agreement.rank && !readable(rank)) continue;
    const auto at = static_cast<size_t>(rank);
    read_page(*pages_[at], options_.agreement.by_windows, copies_[at], report);
  }
  std::lock_guard<std::mutex> lock(mutex_);
  AgreementStep step = agreement_.step(reports_, now);
  apply(step, now);
}

void Pulse::apply(AgreementStep& step, i64 now) {
  const bool is_for_change = step.change.kind != ChangeKind::none && commit_hold(step.change);
  if (step.promise || is_for_change) {
    const View& view = agreement_.current().view;
    Promise promise = give_promise(state_, view.epoch, view.first_round);
    if (is_for_change) promise.change = step.change;
    agreement_.promised(promise);
    publish(own().promise, promise);
    poke_ = true;
    ring_pulse(own());  // look again at once: mine may have been the last one missing
  }
  publish_ballots(step);
  for (i32 rank = 0; rank < options_.agreement.num_ranks; ++rank)
    if (step.waits_for.has(rank) && !awaited_promises_.has(rank)) awaited_since_ns_[static_cast<size_t>(rank)] = now;
  awaited_promises_ = step.waits_for;
  if (step.propose) {
    proposal_ = step.proposal;
    changed_.notify_all();
  }
  if (step.decided || step.evicted) announce(step.decision);
  if (step.decided) install(step.decision, now);
  if (step.evicted) {
    __atomic_store_n(&own().life, static_cast<u32>(Life::evicted), __ATOMIC_SEQ_CST);
    if (views_.back().epoch != step.decision.view.epoch) keep(step.decision, now);
    fetch_or(&state_.release, release_evicted);
    hold_state_.store(static_cast<u32>(HoldState::none));
    ring_doorbell(own());
    changed_.notify_all();
  }
  const bool was_suspended = is_suspended(state_);
  if (step.quorum_lost && !was_suspended) {
    fetch_or(&state_.release, release_quorum_lost);
    ring_doorbell(own());
  } else if (!step.quorum_lost && was_suspended) {
    fetch_and(&state_.release, ~static_cast<u64>(release_quorum_lost));
  }
  changing_.store(agreement_.changing());
}

// The install may have to wait for this rank's own device (ring_has_room); the promise never does.
void Pulse::install(const Decision& decision, i64 now) {
  if (!ring_has_room(state_.ring, load_acquire(&state_.started))) return;
  install_view(state_, decision.view, proven_dead_);
  for (i32 rank = 0; rank < options_.agreement.num_ranks; ++rank)
    if (decision.view.active.has(rank) && !proven_dead_.has(rank)) marked_.remove(rank);
  agreement_.installed(decision);
  // After the decision: who finds a record of the new epoch must find on the same page what closed the old one.
  publish(own().acceptor, agreement_.record());
  detector_.new_view();
  // What stood at step starts stood so in the view before, and this thread may sleep before it looks again: a caller
  // that comes to its next step start meanwhile would fill anew the partition of the very rank that has just come in.
  if (guarded(guard_newcomer_once)) forget_changes();
  if (hold_state() == HoldState::committed) hold_state_.store(static_cast<u32>(HoldState::none));
  proposal_.reset();
  awaited_promises_ = RankSet();
  keep(decision, now);
  ring_doorbell(own());
  changed_.notify_all();
}

// As soon as it is known, not when it is installed: this rank votes no more in the epoch that is closed, so others may
// be unable to find the decision out for themselves. Also when it leaves this rank out, which may be the only one to
// know.
void Pulse::announce(const Decision& decision) {
  if (announced_epoch_ == decision.view.epoch) return;
  announced_epoch_ = decision.view.epoch;
  publish(own().decision, decision);
  poke_ = true;
}

void Pulse::publish_ballots(const AgreementStep& step) {
  if (!step.answered.empty() || step.asks) publish(own().acceptor, agreement_.record());
  if (step.asks) {
    publish(own().request, agreement_.request());
    poke_ = true;
    ring_pulse(own());  // my own vote is on its page now, and may be the one that was missing
  }
  // Only the one who counts: waking everybody for every vote would cost more than the agreement.
  for (i32 rank = 0; rank < options_.agreement.num_ranks; ++rank)
    if (step.answered.has(rank)) ring_pulse(*pages_[static_cast<size_t>(rank)]);
}

void Pulse::poke_peers() {
  poke_ = false;
  for (i32 rank = 0; rank < options_.agreement.num_ranks; ++rank)
    if (rank != options_.agreement.rank && !proven_dead_.has(rank) && readable(rank))
      ring_pulse(*pages_[static_cast<size_t>(rank)]);
}

// Sleeps until the next beat is due, a peer rings, or the kernel marks a death word. Listening to the own bell comes
// first, before the turn's look around, so that a ring during the turn is not lost.
void Pulse::rest(i64 now) {
  const i64 beat_due = static_cast<i64>(load_relaxed(&own().process_beat)) + options_.beat_ns;
  const i64 timeout_ns = guarded(guard_beat) ? beat_due - now : options_.beat_ns;
  FutexPair pairs[kMaxFutexPairs];
  i32 num_pairs = 0;
  pairs[num_pairs++] = {&own().pulse_bell, heard_};
  // A newcomer watches nobody, and a dead member's word would not let it sleep.
  bool all_words = can_wait_on_words_ && !joining_.load(std::memory_order_relaxed);
  for (i32 rank = 0; rank < options_.agreement.num_ranks && all_words; ++rank) {
    if (rank == options_.agreement.rank || proven_dead_.has(rank) || !newest_view(state_.ring).active.has(rank))
      continue;
    const u32* word = &pages_[static_cast<size_t>(rank)]->death_word;
    const u32 value = __atomic_load_n(word, __ATOMIC_ACQUIRE);
    if ((value & kOwnerDied) != 0) return;
    if (num_pairs == kMaxFutexPairs)
      all_words = false;
    else
      pairs[num_pairs++] = {word, value};
  }
  if (all_words && (can_wait_on_words_ = futex_wait_any(pairs, num_pairs, timeout_ns))) return;
  // More words than the kernel takes, or no futex_waitv: look every millisecond instead.
  futex_wait(&own().pulse_bell, heard_, std::min(timeout_ns, kNsPerMs));
}

std::optional<Decision> Pulse::next_proposal(i64 timeout_ns) {
  std::unique_lock<std::mutex> lock(mutex_);
  // Without a pulse nothing is ever proposed, and a caller that asks again and again would be a helper thread after
  // all.
  if (!kWatched) timeout_ns = 3600 * 1000 * kNsPerMs;
  if (!proposal_ && !ending_.load()) changed_.wait_for(lock, std::chrono::nanoseconds(timeout_ns));
  std::optional<Decision> out;
  out.swap(proposal_);
  return out;
}

void Pulse::learn(const Decision& decision) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    agreement_.learn(decision);
  }
  ring_pulse(own());
}

void Pulse::proposal_failed() {
  std::lock_guard<std::mutex> lock(mutex_);
  agreement_.proposal_failed(now_ns());
}

ViewRecord::ViewRecord(const Decision& decision, i32 num_ranks, i64 now_ns)
    : epoch(decision.view.epoch),
      first_round(decision.view.first_round),
      incarnations(decision.view.incarnations, decision.view.incarnations + num_ranks),
      reason(decision.reason),
      installed_at_ns(now_ns) {
  for (i32 rank = 0; rank < num_ranks; ++rank)
    if (decision.view.active.has(rank)) active.push_back(rank);
}

void Pulse::keep(const Decision& decision, i64 now) {
  views_.emplace_back(decision, options_.agreement.num_ranks, now);
}

std::vector<EvidenceRecord> Pulse::evidence(size_t num_known) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto known = static_cast<i64>(std::min(num_known, evidence_.size()));
  return {evidence_.begin() + known, evidence_.end()};
}

std::vector<ViewRecord> Pulse::views(u64 from_epoch) const {
  std::lock_guard<std::mutex> lock(mutex_);
  auto from = views_.end();
  while (from != views_.begin() && (from - 1)->epoch >= from_epoch) --from;
  return {from, views_.end()};
}

Decision Pulse::current() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return agreement_.current();
}

}  // namespace fa2a
