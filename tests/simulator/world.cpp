// The group, the faults and the clockwork of one schedule.
#include "tests/simulator/world.hpp"

#include <algorithm>

#include "host/death_word.hpp"
#include "host/doorbell.hpp"
#include "membership/two_copies.hpp"

namespace fa2a::sim {

World::World(const Schedule& schedule)
    : schedule_(schedule),
      scheduler_(schedule.seed ^ 0x5eedull, schedule.num_ranks, schedule.pace),
      links_(schedule.num_ranks, schedule.delays),
      members_(static_cast<size_t>(schedule.num_ranks)),
      struck_(schedule.faults.size(), false),
      bad_links_(static_cast<size_t>(schedule.num_ranks)) {
  scheduler = &scheduler_;
  links = &links_;
  arena.reset();
  scheduler_.next_other = [this] { return next_other(); };
  scheduler_.do_other = [this] { do_other(); };
  scheduler_.struck = [this](i32 rank) {
    const i32 fault = at(rank).armed;
    at(rank).armed = -1;
    strike(fault);
    arm(rank);
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
  config.shape.hidden_bytes = config.shape.dispatch_bytes = kHidden * static_cast<i32>(sizeof(float));
  config.format.payload_bytes = static_cast<u64>(config.shape.dispatch_bytes);
  config.num_founders = schedule_.num_ranks;
  config.rank = rank;
  config.dtype = DType::float32;
  config.beat_ms = kBeatMs;
  config.silence_ms = kSilenceMs;
  config.stall_ms = kStallMs;
  config.link_ms = kLinkMs;
  config.settle_ms = kSettleMs;
  config.agreement_timeout_ms = kAgreementMs;
  for (i32 r = 0; r < schedule_.num_ranks && schedule_.ranks_per_host > 0; ++r)
    config.host_of.push_back(r / schedule_.ranks_per_host);
  config.poison = schedule_.seed % 2 == 0;
  for (i32 expert = 0; expert < config.shape.num_experts; ++expert) {
    config.expert_rank.push_back(expert / kNumLocal);
    config.expert_local.push_back(expert % kNumLocal);
  }
  return config;
}

void World::construct() {
  const Shape shape = config_of(0).shape;
  const PartitionLayout layout = partition_layout(shape);
  group_ = std::make_shared<LocalGroup>(shape);
  for (i32 owner = 0; owner < shape.num_ranks; ++owner)
    for (i32 writer = 0; writer < shape.num_ranks; ++writer)
      links_.owns(group_->partition(owner, writer), layout.num_bytes, owner, writer, layout.progress);
  for (i32 rank = 0; rank < shape.num_ranks; ++rank) {
    at(rank).endpoint = std::make_unique<Endpoint>(config_of(rank), group_, "");
    at(rank).endpoint->create();
    at(rank).history.resize(static_cast<size_t>(schedule_.num_rounds) + 2);
    const size_t num_rows = static_cast<size_t>(kNumLocal * shape.num_ranks * schedule_.num_tokens);
    at(rank).recv.resize(num_rows * kHidden);
    for (auto& y : at(rank).y) y.resize(num_rows * kHidden);
    at(rank).counts.resize(kNumLocal);
    at(rank).offsets.resize(kNumLocal + 1);
  }
  for (i32 rank = 0; rank < shape.num_ranks; ++rank) {
    rank_in_construction = rank;
    at(rank).endpoint->open_peers();
  }
  // The rendezvous of construction: nobody begins before everybody's pulse beats and has its record on its page.
  for (i32 rank = 0; rank < shape.num_ranks; ++rank)
    while (group_page(rank).acceptor.version == 0) scheduler_.step();
  for (Member& member : members_) member.endpoint->serve();
  views_[0] = newest_view(at(0).endpoint->state().ring);
  for (i32 rank = 0; rank < shape.num_ranks; ++rank) at(rank).decision_version = group_page(rank).decision.version;
  for (size_t i = 0; i < schedule_.faults.size(); ++i)
    if (schedule_.faults[i].kind == FaultKind::foreign) strike(static_cast<i32>(i));
  for (i32 rank = 0; rank < shape.num_ranks; ++rank)
    scheduler_.spawn(begin_worker, new std::pair<World*, i32>(this, rank), rank, /*is_pulse=*/false);
}

// The next of the faults that this rank's own accesses bring about.
void World::arm(i32 rank) {
  if (at(rank).armed >= 0) return;
  for (size_t i = 0; i < schedule_.faults.size(); ++i) {
    const Fault& fault = schedule_.faults[i];
    if (struck_[i] || fault.after >= 0 || fault.rank != rank || fault.round > at(rank).round) continue;
    at(rank).armed = static_cast<i32>(i);
    scheduler_.machines[static_cast<size_t>(rank)].countdown = fault.accesses;
    return;
  }
}

void World::stand_still(const Fault& fault, i64 least_ns) {
  at(fault.rank).stood_still_ns += fault.duration_ns;
  if (fault.duration_ns >= least_ns) faulty_.add(fault.rank);
}

void World::die(i32 rank, bool is_seen) {
  faulty_.add(rank);
  if (!is_seen) silent_.add(rank);
  scheduler_.machines[static_cast<size_t>(rank)].dead = true;
  links_.writer_died(rank, schedule_.most_late_ns, scheduler_.dice.one_in(2));
  if (!is_seen) return;
  timed_.push_back({scheduler_.now() + 5 * kUs + scheduler_.dice.heavy(schedule_.exit_seen_ns), -1, rank});
}

void World::make_sick(i32 rank) {
  const ViewRing& ring = at(rank).endpoint->state().ring;
  u64* row = group_page(rank).accusations;
  sick_watcher = {row, schedule_.num_ranks, &ring};
  for (i32 peer = 0; peer < schedule_.num_ranks; ++peer)
    if (peer != rank) row[peer] = pack_accusation(newest_view(ring).epoch, Evidence::silence);
}

void World::mark_link(i32 a, i32 b) {
  bad_links_[static_cast<size_t>(a)].add(b);
  bad_links_[static_cast<size_t>(b)].add(a);
}

void World::cut(i32 a, i32 b) {
  at(a).endpoint->wire().faults.cut.add(b);
  at(b).endpoint->wire().faults.cut.add(a);
  isolated_.add(a);
  isolated_.add(b);
  mark_link(a, b);
}

void World::strike(i32 index) {
  const Fault& fault = schedule_.faults[static_cast<size_t>(index)];
  if (struck_[static_cast<size_t>(index)]) return;
  struck_[static_cast<size_t>(index)] = true;
  for (size_t i = 0; i < schedule_.faults.size(); ++i)
    if (schedule_.faults[i].after == index)
      timed_.push_back({scheduler_.now() + schedule_.faults[i].delay_ns, static_cast<i32>(i), -1});
  if (!is_alive(fault.rank)) return;
  ++report_.num_faults;
  Machine& machine = scheduler_.machines[static_cast<size_t>(fault.rank)];
  const i64 until = scheduler_.now() + fault.duration_ns;
  switch (fault.kind) {
    case FaultKind::crash:
    case FaultKind::vanish:
      return die(fault.rank, fault.kind == FaultKind::crash);
    case FaultKind::leave:
      at(fault.rank).leaves = true;
      return;
    case FaultKind::stop:
      machine.stopped_until = std::max(machine.stopped_until, until);
      return stand_still(fault, kSilenceMs * kMs / 4);
    case FaultKind::hang:
      machine.kernel_paused_until = std::max(machine.kernel_paused_until, until);
      return stand_still(fault, kStallMs * kMs / 4);
    case FaultKind::sleep:
      machine.pulse_paused_until = std::max(machine.pulse_paused_until, until);
      return stand_still(fault, kSilenceMs * kMs / 4);
    case FaultKind::cut:
      return cut(fault.rank, fault.other);
    case FaultKind::part: {
      const i32 size = schedule_.ranks_per_host, host = fault.rank / size;
      for (i32 inside = host * size; inside < (host + 1) * size; ++inside)
        for (i32 outside = 0; outside < schedule_.num_ranks; ++outside)
          if (outside / size != host) cut(inside, outside);
      return;
    }
    case FaultKind::lose:
      links_.link(fault.rank, fault.other).loses_from = scheduler_.now();
      return mark_link(fault.rank, fault.other);
    case FaultKind::accuse:
      accuser_ = fault.rank;
      faulty_.add(fault.rank);
      return make_sick(fault.rank);
    case FaultKind::lie:
      at(fault.rank).endpoint->wire().faults.lies = fault.lies;
      at(fault.rank).endpoint->wire().faults.seed = schedule_.seed;
      faulty_.add(fault.rank);
      return;
    case FaultKind::foreign: {
      auto* header = reinterpret_cast<PartitionHeader*>(group_->partition(fault.other, fault.rank));
      header->incarnation ^= 1ull << 40;
      links_.link(fault.rank, fault.other).corrupts = true;
      return mark_link(fault.rank, fault.other);
    }
  }
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
    u32* word = &group_page(one.marks).death_word;
    *word |= kOwnerDied;
    return scheduler_.wake(word);
  }
  const i32 owner = links_.land();
  if (owner >= 0) ring_doorbell(group_page(owner));
}

bool World::all_ended() const {
  for (i32 rank = 0; rank < schedule_.num_ranks; ++rank)
    if (is_alive(rank) && members_[static_cast<size_t>(rank)].end == End::running) return false;
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
    for (i32 rank = 0; rank < schedule_.num_ranks; ++rank) {
      const Machine& machine = scheduler_.machines[static_cast<size_t>(rank)];
      if (machine.dead) continue;
      changing |= at(rank).endpoint->pulse().changing();
      changing |= std::max(machine.stopped_until, machine.pulse_paused_until) > scheduler_.now();
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
  report_.last_members = views_.rbegin()->second.active;
  return report_;
}

// Everybody comes to an end in order, the dead too: what they hold is freed, and what they store is looked at by
// nobody.
void World::tear_down() {
  scheduler_.over = true;
  for (Member& member : members_) fetch_or(&member.endpoint->state().release, static_cast<u64>(release_closing));
  for (Member& member : members_) member.endpoint->close();
  for (u64 i = 0; i < scheduler_.num_strands(); ++i)
    while (!scheduler_.strand(i).fibre->ended()) scheduler_.step();
}

}  // namespace fa2a::sim
