// The group, the faults and the clockwork of one schedule.
#include "tests/simulator/world.hpp"

#include <algorithm>

#include "host/death_word.hpp"
#include "host/doorbell.hpp"
#include "tests/simulator/files.hpp"

namespace fa2a::sim {

World::World(const Schedule& schedule)
    : schedule_(schedule),
      scheduler_(schedule.seed ^ 0x5eedull, schedule.num_lives(), schedule.pace),
      links_(schedule.num_lives(), schedule.delays, config_of(0).shape),
      current_(static_cast<size_t>(schedule.num_ranks), -1),
      struck_(schedule.faults.size(), false),
      bad_links_(static_cast<size_t>(schedule.num_lives())),
      last_round_(schedule.num_rounds) {
  scheduler = &scheduler_;
  links = &links_;
  files.reset(schedule.num_lives());
  scheduler_.next_other = [this] { return next_other(); };
  scheduler_.do_other = [this] { do_other(); };
  scheduler_.struck = [this](i32 life) {
    const i32 fault = at(life).armed;
    at(life).armed = -1;
    strike(fault);
    arm(at(life));
  };
  for (Machine& machine : scheduler_.machines) {
    Dice& dice = scheduler_.dice;
    machine.access_ns = dice.one_in(4) ? dice.between(100, 400) : dice.between(5, 40);
    if (schedule.clock_skew_ns == 0) continue;
    machine.clock_offset_ns = dice.between(-schedule.clock_skew_ns, schedule.clock_skew_ns);
    machine.clock_drift_ppm = dice.between(-20000, 20000);
  }
  construct();
}

World::~World() {
  tear_down();
  members_.clear();
  scheduler = nullptr;
  links = nullptr;
  sick_watcher = SickWatcher();
}

EndpointConfig World::config_of(i32 rank) const {
  EndpointConfig config;
  config.shape.num_ranks = schedule_.num_ranks;
  config.shape.num_experts = schedule_.num_ranks * kNumLocal;
  config.shape.num_topk = kNumTopk;
  config.shape.num_max_tokens = schedule_.num_tokens;
  config.shape.num_chunk_tokens = schedule_.num_chunk_tokens;
  config.shape.max_local_experts = config.num_local_experts = kNumLocal;
  config.shape.num_spare_partitions = schedule_.num_spare_partitions;
  config.shape.hidden_bytes = config.shape.dispatch_bytes = kHidden * static_cast<i32>(sizeof(float));
  config.format.payload_bytes = static_cast<u64>(config.shape.dispatch_bytes);
  config.num_founders = schedule_.num_founders;
  config.rank = rank;
  config.dtype = DType::float32;
  config.beat_ms = kBeatMs;
  config.silence_ms = kSilenceMs;
  config.stall_ms = kStallMs;
  config.link_ms = kLinkMs;
  config.settle_ms = kSettleMs;
  config.agreement_timeout_ms = kAgreementMs;
  config.join_hold_ms = kJoinHoldMs;
  for (i32 r = 0; r < schedule_.num_ranks && schedule_.ranks_per_host > 0; ++r)
    config.host_of.push_back(r / schedule_.ranks_per_host);
  config.poison = schedule_.seed % 2 == 0;
  for (i32 expert = 0; expert < config.shape.num_experts; ++expert) {
    config.expert_rank.push_back(expert / kNumLocal);
    config.expert_local.push_back(expert % kNumLocal);
  }
  return config;
}

Member& World::begin_life(i32 rank) {
  members_.push_back(std::make_unique<Member>());
  Member& member = *members_.back();
  member.life = static_cast<i32>(members_.size()) - 1;
  member.rank = rank;
  member.begun_at = scheduler_.now();
  current_[static_cast<size_t>(rank)] = member.life;
  const size_t num_rows = static_cast<size_t>(kNumLocal * schedule_.num_ranks * schedule_.num_tokens);
  member.recv.resize(num_rows * kHidden);
  for (auto& y : member.y) y.resize(num_rows * kHidden);
  member.counts.resize(kNumLocal);
  member.offsets.resize(kNumLocal + 1);
  return member;
}

void World::construct() {
  const i32 num_founders = schedule_.num_founders;
  for (i32 rank = 0; rank < num_founders; ++rank) {
    Member& member = begin_life(rank);
    scheduler_.life_in_construction = rank;
    member.endpoint = std::make_unique<Endpoint>(config_of(rank), nullptr, "simulated");
    member.endpoint->create();
  }
  for (i32 life = 0; life < num_founders; ++life) {
    scheduler_.life_in_construction = life;
    at(life).endpoint->open_peers();
    links_.is_called(life, page_of(at(life)).incarnation);
  }
  // The rendezvous of construction: nobody begins before everybody's pulse beats and has its record on its page.
  for (i32 life = 0; life < num_founders; ++life)
    while (page_of(at(life)).acceptor.version == 0) scheduler_.step();
  for (auto& member : members_) member->endpoint->serve();
  views_[0] = newest_view(at(0).endpoint->state().ring);
  for (auto& member : members_) member->decision_version = page_of(*member).decision.version;
  for (size_t i = 0; i < schedule_.faults.size(); ++i) {
    const Fault& fault = schedule_.faults[i];
    if (fault.kind == FaultKind::foreign) strike(static_cast<i32>(i));
    if (fault.is_of_world() && fault.after < 0)
      timed_.push_back({scheduler_.now() + fault.delay_ns, static_cast<i32>(i), -1});
  }
  for (auto& member : members_) spawn_worker(*member);
}

void World::spawn_worker(Member& member) {
  scheduler_.spawn(begin_worker, new std::pair<World*, i32>(this, member.life), member.life, /*is_pulse=*/false);
}

// The next of the faults that this life's own accesses bring about.
void World::arm(Member& member) {
  if (member.armed >= 0) return;
  for (size_t i = 0; i < schedule_.faults.size(); ++i) {
    const Fault& fault = schedule_.faults[i];
    if (struck_[i] || fault.after >= 0 || fault.rank != member.rank || fault.round > member.round) continue;
    if (fault.is_of_world() || fault.moment != Moment::access) continue;
    member.armed = static_cast<i32>(i);
    machine(member.life).countdown = fault.accesses;
    return;
  }
}

Member* World::life_in(const View& view, i32 rank) const {
  for (const auto& member : members_)
    if (member->rank == rank && member->endpoint != nullptr && page_of(*member).incarnation == view.incarnations[rank])
      return member.get();
  return nullptr;
}

i64 World::next_other() const {
  i64 at = links_.next_at();
  for (const Timed& one : timed_) at = std::min(at, one.at);
  return at;
}

void World::do_other() {
  for (size_t i = 0; i < timed_.size(); ++i) {
    const Timed one = timed_[i];
    if (one.at > scheduler_.now()) continue;
    timed_.erase(timed_.begin() + static_cast<i64>(i));
    if (one.fault >= 0) return strike(one.fault);
    if (at(one.marks).endpoint == nullptr) return;
    u32* word = &page_of(at(one.marks)).death_word;
    *word |= kOwnerDied;
    marked_dead_.add(one.marks);
    return scheduler_.wake(files.one_address_of(word));
  }
  const i32 owner = links_.land();
  if (owner >= 0) ring_doorbell(page_of(at(owner)));
}

bool World::all_ended() const {
  for (const auto& member : members_)
    if (is_alive(member->life) && member->end == End::running) return false;
  return true;
}

// When all have done what they could, agreement comes to rest.
void World::cool_down() {
  const i64 latest = scheduler_.now() + 400 * kMs;
  for (i32 num_calm = 0; num_calm < 3 && scheduler_.now() < latest && report_.wrong.empty();) {
    const i64 until = scheduler_.now() + 8 * kMs;
    while (scheduler_.now() < until && report_.wrong.empty()) {
      if (!scheduler_.step()) return;  // nobody is left
      watch_all();
    }
    bool changing = !timed_.empty();
    for (const auto& member : members_) {
      const Machine& its = machine(member->life);
      if (!is_there(*member) || !member->is_in) continue;
      changing |= member->endpoint->pulse().changing();
      changing |= std::max(its.stopped_until, its.pulse_paused_until) > scheduler_.now();
    }
    num_calm = changing ? 0 : num_calm + 1;
  }
}

Report World::run() {
  constexpr i64 kLongest = 6000 * kMs;
  const i64 begun = scheduler_.now();
  while (!all_ended() && report_.wrong.empty()) {
    if (!scheduler_.step()) fail("P1: nothing will ever happen again, and somebody is in a call");
    watch_all();
    if (scheduler_.now() - begun > kLongest) fail("P1: the schedule does not end");
  }
  cool_down();
  if (report_.wrong.empty()) check_end();
  report_.num_steps = scheduler_.num_steps;
  report_.num_stores = links_.num_landed;
  report_.simulated_ns = scheduler_.now() - begun;
  report_.num_views = views_.size() - 1;
  return report_;
}

// Everybody comes to an end in order, the dead too: what they hold is freed, and what they store is looked at by
// nobody. Workers first: one that is on its way in would start a native thread that nobody ends.
void World::tear_down() {
  scheduler_.over = true;
  auto let_end = [this](bool pulses) {
    for (u64 i = 0; i < scheduler_.num_strands(); ++i)
      while ((pulses || !scheduler_.strand(i).is_pulse) && !scheduler_.strand(i).fibre->ended()) scheduler_.step();
  };
  for (auto& member : members_)
    if (member->endpoint != nullptr) fetch_or(&member->endpoint->state().release, static_cast<u64>(release_closing));
  let_end(/*pulses=*/false);
  for (auto& member : members_)
    if (member->endpoint != nullptr) member->endpoint->close();
  let_end(/*pulses=*/true);
}

}  // namespace fa2a::sim
