// One schedule being run: real endpoints on strands, the faults that strike them, and what is watched after every step.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings/endpoint.hpp"
#include "tests/simulator/schedule.hpp"
#include "tests/simulator/work.hpp"

namespace fa2a::sim {

// What a life did in a round, for the history that no output may contradict.
struct Entry {
  bool begun = false, received = false;
  u64 epoch = 0;
  RankSet active, taken;
};

enum class End { running, finished, evicted, suspended, left, not_let_in };

// Sets of lives: there are never more of them than ranks may be.
using LifeSet = RankSet;

// One life of a rank as the world sees it. Founders' lives have the numbers of their ranks.
struct Member {
  i32 life = 0, rank = 0;
  std::unique_ptr<Endpoint> endpoint;
  End end = End::running;
  bool leaves = false, retires = false;
  bool ever_hung = false;
  bool must_go = false;     // it stood still for so long that the others must have missed it
  bool comes_back = false;  // it takes the place of a former life of the same process, once that is out
  bool is_in = true;        // false: on its way in
  i64 begun_at = 0;
  i32 round = 0;  // of its worker
  u64 entered_at = 0;
  const char* call = nullptr;
  i64 call_began = 0, stood_still_ns = 0, blind_since = 0;
  bool holds_here = false;  // in begin_step, or past it with nothing begun yet
  i32 armed = -1;           // which fault its accesses count down to
  RankSet suspects;
  u64 newest = 0, decision_version = 0;
  std::vector<const void*> addresses;
  std::deque<Entry> history;
  Batch batches[kNumParities];
  std::vector<float> recv, y[kNumParities];
  std::vector<i32> counts, offsets;

  const Entry& entry(u64 of_round) const {
    static const Entry none;
    return of_round < history.size() ? history[of_round] : none;
  }
};

inline std::string name_of(const Member& member) {
  const std::string text = "rank " + std::to_string(member.rank);
  return member.life == member.rank ? text : text + " (life " + std::to_string(member.life) + ")";
}

struct Report {
  std::string wrong;  // empty: every promise held
  std::string ranks;  // what each was doing when one was broken
  u64 num_steps = 0, num_stores = 0;
  i64 simulated_ns = 0;
  u64 num_views = 0, num_lost = 0, num_delivered = 0, num_faults = 0, num_joined = 0, num_retired = 0;
};

class World {
 public:
  explicit World(const Schedule& schedule);
  ~World();
  Report run();

 private:
  struct Timed {
    i64 at;
    i32 fault;  // -1: the death of `marks` comes to light
    i32 marks;  // a life
  };

  // world.cpp: the group, time and faults.
  EndpointConfig config_of(i32 rank) const;
  void construct();
  Member& begin_life(i32 rank);
  void spawn_worker(Member& member);
  void arm(Member& member);
  void make_sick(Member& member);
  void mark_link(i32 life, i32 other);
  void cut(i32 life, i32 other);
  void die(i32 life, bool is_seen);
  i64 next_other() const;
  void do_other();
  bool all_ended() const;
  void cool_down();
  void tear_down();
  ControlPage& page_of(const Member& member) const { return member.endpoint->fabric().page(member.rank); }
  Machine& machine(i32 life) { return scheduler_.machines[static_cast<size_t>(life)]; }
  bool is_alive(i32 life) const { return !scheduler_.machines[static_cast<size_t>(life)].dead; }
  // A life that never had an endpoint has nothing to look at.
  bool is_there(const Member& member) const { return member.endpoint != nullptr && is_alive(member.life); }
  Member& at(i32 life) { return *members_[static_cast<size_t>(life)]; }
  const Member& at(i32 life) const { return *members_[static_cast<size_t>(life)]; }
  // Which life of a rank a view means; nullptr: none that there was.
  Member* life_in(const View& view, i32 rank) const;

  // strike.cpp
  void strike(i32 fault);
  void strike_promised(const Member& member);
  void stand_still(Member& member, const Fault& fault, i64 least_ns);
  bool is_missed(const Member& member, const Fault& fault) const;
  void part(i32 rank);

  // worker.cpp: what a life does.
  static void* begin_worker(void* argument);
  void work(Member& member);
  Status dispatch(Member& member, i32 round);
  Status combine(Member& member, i32 round);
  template <class Call>
  Status patiently(Call call);
  Status begin_step(Member& member);
  bool goes_on(i32 round);
  void end_work(Member& member, Status status);
  void compute();
  void run_experts(Member& member, u64 round, const OpenRound& open);
  template <class Call>
  auto timed(Member& member, const char* name, Call call);

  // joins.cpp: a life on its way in.
  void begin_joining(i32 rank, bool comes_back);
  bool come_in(Member& member);
  bool former_is_out(const Member& member) const;
  void open_life(Member& newcomer, i32 rank, u64 incarnation);

  // checks.cpp: P1 to P7 while calls run.
  void fail(const std::string& what);
  std::string describe_ranks() const;
  void watch_all();
  void watch(Member& member);
  void watch_suspects(Member& member);
  void watch_calls();
  void watch_deaths(Member& member);
  void check_hold(const Member& member, const RankSet& suspects_before, u64 newest_before);
  void check_distance(const Member& member);
  void check_end();
  void check_end_of(const Member& member, const View& newest);
  bool excuses(const Member& a, const Member& b) const;

  // check_rows.cpp: P2 and P3, of what a call returned.
  void check_taken_early(const Member& member, u64 round);
  void check_received(Member& member, u64 round, const OpenRound& open);
  void check_rows_of(Member& member, const Member& src, u64 round, const OpenRound& open);
  void check_combined(Member& member, u64 round, bool lost);
  bool lies(const Member& member) const;
  bool misleads(const Member& member, const Member& peer) const;

  // check_views.cpp: P6, P8 and who may go.
  void watch_views(Member& member);
  void watch_addresses(Member& member);
  void watch_decision(const View& view);
  void watch_promises(const View& before, const View& view);
  void watch_newcomers(const View& before, const View& view);
  bool may_go(const Member& member, const View& next) const;

  Schedule schedule_;
  Scheduler scheduler_;
  Links links_;
  std::vector<std::unique_ptr<Member>> members_;  // by life
  std::vector<i32> current_;                      // the newest life of each rank; -1: none yet
  std::vector<bool> struck_;
  std::vector<Timed> timed_;
  std::map<u64, View> views_;  // by epoch, as first seen
  LifeSet faulty_, suspended_, evicted_, isolated_, silent_, marked_dead_;
  std::vector<LifeSet> bad_links_;  // of each life
  i32 last_round_ = 0;              // one more than the last; later while somebody is on its way in
  bool is_ending_ = false;          // somebody has come to it
  i32 accuser_ = -1;                // a rank
  Report report_;
};

}  // namespace fa2a::sim
