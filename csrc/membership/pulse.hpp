// The pulse: the one native thread of a rank that beats, watches its peers, and carries membership. It never takes the
// GIL.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "host/death_word.hpp"
#include "host/process.hpp"
#include "membership/agreement.hpp"
#include "membership/detector.hpp"
#include "membership/doors.hpp"
#include "membership/page_copies.hpp"
#include "protocol/rank_state.hpp"

namespace fa2a {

struct PulseOptions {
  AgreementOptions agreement;
  i64 beat_ns = 10 * 1000000;
  i64 link_ns = 5000ll * 1000000;
  i64 join_hold_ns = 500ll * 1000000;  // nobody waits longer at one step start
  bool between_processes = true;
  Doors* doors = nullptr;                // nullptr: nobody can join
  bool kernels_have_own_clock = false;   // when a kernel began to wait, it tells by a clock that only it can read
  bool joining = false;                  // this rank is a newcomer, and the first decision is the members' without it
  const RankSet* unreadable = nullptr;   // test build: peers to whom every path is lost
  const RankSet* unheard = nullptr;      // test build: peers whose beat seems to stand still
  std::atomic<i64>* pause_ns = nullptr;  // test build: the thread sleeps this long, once, as if it were stopped
};

struct EvidenceRecord {
  i32 rank;
  Evidence kind;
  i64 at_ns;
};

// What is kept of a view for as long as this rank lives, and it may live through any number of them: a Decision has
// room for the largest group, some 15 KB.
struct ViewRecord {
  ViewRecord(const Decision& decision, i32 num_ranks, i64 now_ns);

  u64 epoch;
  u64 first_round;
  std::vector<i32> active;
  std::vector<u64> incarnations;
  std::string reason;
  i64 installed_at_ns;
};

// A process that has knocked, and that the members have not let in yet.
struct Newcomer {
  i32 rank = 0;
  i32 pid = 0;
  i32 window_fd = 0;
  u64 incarnation = 0;
  View members;  // the view of this rank, in which the newcomer is not
};

enum class HoldState : u32 { none, holding, committed };

class Pulse {
 public:
  Pulse(std::vector<ControlPage*> pages, RankState& state, const PulseOptions& options, const Decision& first);
  ~Pulse();
  Pulse(const Pulse&) = delete;
  Pulse& operator=(const Pulse&) = delete;

  void start();
  // Publishes `left`, lets the death word go, ends the thread. Bounded: waits for nobody but this thread.
  void leave();
  // Test build, virtual ranks: the thread just ends, as if the process had died.
  void vanish();

  // For the arbiter's caller: blocks until this rank has a proposal, a view changed, it leaves, or the time is over.
  std::optional<Decision> next_proposal(i64 timeout_ns);
  void learn(const Decision& decision);
  void proposal_failed();

  // Step starts and joins (pulse_joins.cpp). Of a member:
  bool change_waits() const { return change_waits_.load(std::memory_order_relaxed); }
  std::optional<Newcomer> newcomer() const;  // for whom a partition must be ready before anybody can hold
  StepChange ready_change() const;           // what a hold could be for now; kind none: nothing
  // From a step start, in whatever epoch. False: there is nothing to hold for. Until hold_state() is none again; after
  // `committed` only a view or a release ends it.
  bool hold(const StepHold& where);
  HoldState hold_state() const { return static_cast<HoldState>(hold_state_.load()); }
  void end_hold(bool timed_out);
  void ask_to_leave();
  // Of a newcomer:
  bool joining() const { return joining_.load(); }
  void reached_all(u64 epoch);  // it has mapped whatever the members of that view keep for it

  // But for the first `num_known`, and for views before `from_epoch`: who asks again and again gets what is new. This
  // thread waits while they are copied.
  std::vector<EvidenceRecord> evidence(size_t num_known = 0) const;
  std::vector<ViewRecord> views(u64 from_epoch = 0) const;
  Decision current() const;
  bool changing() const { return changing_.load(); }
  bool ending() const { return ending_.load(); }

 private:
  void run() noexcept;
  void look(i64 now);
  void hear_stall(i32 rank);
  bool is_held_back(i32 rank, u64 progress);
  bool is_missed_by_another(i32 rank) const;
  Evidence look_at(i32 rank);
  i64 waiting_since(i32 rank);
  bool has_left_as_decided(i32 rank);
  void accuse(i32 rank, Evidence kind);
  void agree(i64 now);
  void apply(AgreementStep& step, i64 now);
  void install(const Decision& decision, i64 now);
  void keep(const Decision& decision, i64 now);
  void announce(const Decision& decision);
  void publish_ballots(const AgreementStep& step);
  void rest(i64 now);
  void poke_peers();
  ProcessWatch watch_of(const ControlPage& page) const;
  void answer_knocks(i64 now);
  void look_for_changes(i64 now);
  bool is_willing(i32 rank, i64 now);
  StepChange change_of(i32 rank, i64 now);
  void update_hold();
  void forget_changes();
  bool commit_hold(const StepChange& change);
  void join_turn(i64 now);
  void meet_members();
  const Decision* newest_decision();
  bool all_hold_for_me(StepHold& where);
  void come_in(const Decision& decision, i64 now);
  bool readable(i32 rank) const { return options_.unreadable == nullptr || !options_.unreadable->has(rank); }
  bool hears(i32 rank) const { return options_.unheard == nullptr || !options_.unheard->has(rank); }
  ControlPage& own() const { return *pages_[static_cast<size_t>(options_.agreement.rank)]; }

  std::vector<ControlPage*> pages_;
  RankState& state_;
  PulseOptions options_;
  Detector detector_;
  std::vector<ProcessWatch> watches_;
  std::vector<u64> met_;  // of a newcomer: whose page it was that the watch and the copies are of
  DeathWordHolder death_word_;
  std::thread thread_;
  std::atomic<bool> ending_{false};
  std::atomic<bool> vanishing_{false};
  std::atomic<bool> changing_{false};
  bool can_wait_on_words_ = true;

  // Only the thread touches these.
  std::vector<MemberReport> reports_;
  std::vector<PageCopies> copies_;  // of every rank's page, this one's included
  RankSet marked_;                  // suspicions already accounted for
  RankSet proven_dead_;
  struct PromisedAt {
    u64 epoch_plus_one = 0;
    u64 progress = 0;  // where it stood when this rank first read its promise of that epoch
  };
  std::vector<PromisedAt> promised_at_;
  RankSet awaited_promises_;
  std::vector<i64> awaited_since_ns_;  // of each rank in awaited_promises_
  bool poke_ = false;
  u64 announced_epoch_ = 0;  // of the decision on this rank's page
  u32 heard_ = 0;            // the bell as it stood before this turn's look around
  struct Visitor {           // a rank that is not in, or wants to go
    i32 pid = 0;
    bool is_known = false;
    u64 beat = 0;
    i64 beat_since_ns = 0;
  };
  std::vector<Visitor> visitors_;
  StepHold published_hold_;

  mutable std::mutex mutex_;  // what callers and the thread share
  std::condition_variable changed_;
  Agreement agreement_;
  std::optional<Decision> proposal_;
  std::vector<EvidenceRecord> evidence_;
  std::vector<ViewRecord> views_;
  std::atomic<bool> change_waits_{false};
  std::atomic<bool> joining_{false};
  std::atomic<u32> hold_state_{0};
  StepHold held_;  // what the caller holds for; its epoch is the thread's to say
  std::optional<Newcomer> newcomer_;
  StepChange ready_change_;
  std::vector<i64> ignored_until_ns_;  // of each rank: a hold for it was in vain
  // Of each rank: what a kernel last said of when it began to wait for it, and when this thread first saw that.
  struct SeenWait {
    u64 said = 0;
    i64 at_ns = 0;
  };
  std::vector<SeenWait> seen_waits_;
  u64 reached_epoch_plus_one_ = 0;
};

}  // namespace fa2a
