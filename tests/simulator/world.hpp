// One schedule being run: real endpoints on strands, the faults that strike them, and what is watched after every step.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings/endpoint.hpp"
#include "tests/simulator/schedule.hpp"
#include "tests/simulator/work.hpp"
#include "transport/local.hpp"

namespace fa2a::sim {

// What a rank did in a round, for the history that no output may contradict.
struct Entry {
  bool begun = false, received = false;
  u64 epoch = 0;
  RankSet active, taken;
};

enum class End { running, finished, evicted, suspended, left };

// One rank as the world sees it.
struct Member {
  std::unique_ptr<Endpoint> endpoint;
  End end = End::running;
  bool leaves = false;
  i32 round = 0;  // of its worker
  const char* call = nullptr;
  i64 call_began = 0, stood_still_ns = 0;
  i32 armed = -1;  // which fault its accesses count down to
  RankSet suspects;
  u64 newest = 0, decision_version = 0;
  std::vector<Entry> history;
  Batch batches[kNumParities];
  std::vector<float> recv, y[kNumParities];
  std::vector<i32> counts, offsets;
};

struct Report {
  std::string wrong;  // empty: every promise held
  std::string ranks;  // what each was doing when one was broken
  u64 num_steps = 0, num_stores = 0;
  i64 simulated_ns = 0;
  u64 num_views = 0, num_lost = 0, num_delivered = 0, num_faults = 0;
  RankSet last_members;
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
    i32 marks;
  };

  // world.cpp: the group, time and faults.
  EndpointConfig config_of(i32 rank) const;
  void construct();
  void arm(i32 rank);
  void strike(i32 fault);
  void make_sick(i32 rank);
  void mark_link(i32 a, i32 b);
  void cut(i32 a, i32 b);
  void stand_still(const Fault& fault, i64 least_ns);
  void die(i32 rank, bool is_seen);
  i64 next_other() const;
  void do_other();
  bool all_ended() const;
  void watch_all();
  ControlPage& group_page(i32 rank) {
    return *reinterpret_cast<ControlPage*>(group_->pages[static_cast<size_t>(rank)].data());
  }
  void cool_down();
  void tear_down();
  bool is_alive(i32 rank) const { return !scheduler_.machines[static_cast<size_t>(rank)].dead; }
  Member& at(i32 rank) { return members_[static_cast<size_t>(rank)]; }

  // worker.cpp: what a rank does.
  static void* begin_worker(void* argument);
  void work(i32 rank);
  Status dispatch(i32 rank, i32 round);
  Status combine(i32 rank, i32 round);
  void compute();
  void run_experts(i32 rank, u64 round, const OpenRound& open);
  template <class Call>
  auto timed(i32 rank, const char* name, Call call);

  // checks.cpp: P1 to P7.
  void fail(const std::string& what);
  std::string describe_ranks() const;
  void watch(i32 rank);
  void watch_suspects(i32 rank);
  void watch_views(i32 rank);
  void watch_decision(const View& view);
  bool may_go(i32 rank, const View& next) const;
  void watch_calls();
  void check_hold(i32 rank, const RankSet& suspects_before, u64 newest_before);
  void check_distance(i32 rank);
  void check_taken_early(i32 rank, u64 round);
  void check_received(i32 rank, u64 round, const OpenRound& open);
  void check_combined(i32 rank, u64 round, bool lost);
  void check_end();
  bool excuses(i32 a, i32 b) const;
  bool lies(i32 rank) const;
  bool misleads(i32 rank, i32 peer) const;

  Schedule schedule_;
  Scheduler scheduler_;
  Links links_;
  std::shared_ptr<LocalGroup> group_;
  std::vector<Member> members_;
  std::vector<bool> struck_;
  std::vector<Timed> timed_;
  std::map<u64, View> views_;  // by epoch, as first seen
  RankSet faulty_, suspended_, evicted_, isolated_, silent_;
  std::vector<RankSet> bad_links_;
  i32 accuser_ = -1;
  Report report_;
};

}  // namespace fa2a::sim
