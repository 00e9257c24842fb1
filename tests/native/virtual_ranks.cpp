// Four virtual ranks run rounds and collectives; one leaves, one dies in mid-combine, and the rest agree by windows, by
// an arbiter, and with the CUDA kernels on their twin. The survivors' sums are exact, and sanitizers look on.
#include <stdio.h>
#include <string.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "bindings/endpoint.hpp"
#include "tests/native/sanitized.hpp"
#include "transport/local.hpp"

using namespace fa2a;

namespace {

constexpr i32 kNumRanks = 4, kNumExperts = 8, kNumTopk = 3, kNumMaxTokens = 6, kHidden = 16;
constexpr i32 kLeaver = 3, kVictim = 2;
constexpr u8 kDelivered = static_cast<u8>(Outcome::delivered), kLost = static_cast<u8>(Outcome::lost);

std::atomic<i32> num_failures{0};

void expect(bool holds, const char* what, i32 rank, u64 round) {
  if (holds) return;
  ++num_failures;
  fprintf(stderr, "rank %d, round %llu: %s\n", rank, round, what);
}

// One group: who decides its views, and who runs its kernels.
struct Plan {
  bool by_windows;
  bool cuda_host;  // the CUDA kernels on their twin, stores held back
  i32 num_rounds;
  i32 num_chunk_tokens;  // 2: so that most batches are streams
  i32 leaves_at() const { return num_rounds / 3; }
  i32 dies_at() const { return 2 * num_rounds / 3; }
};

EndpointConfig config_of(i32 rank, const Plan& plan) {
  EndpointConfig config;
  config.shape.num_ranks = config.num_founders = kNumRanks;
  config.shape.num_experts = kNumExperts;
  config.shape.num_topk = kNumTopk;
  config.shape.num_max_tokens = kNumMaxTokens;
  config.shape.num_chunk_tokens = plan.num_chunk_tokens;
  if (plan.cuda_host) config.machine = Machine::cuda_host;
  config.twin.weak = true;
  config.twin.seed = static_cast<u64>(rank) + 1;
  config.shape.collective_bytes = 64;
  config.shape.max_local_experts = config.num_local_experts = kNumExperts / kNumRanks;
  config.shape.hidden_bytes = config.shape.dispatch_bytes = kHidden * static_cast<i32>(sizeof(float));
  config.format.payload_bytes = static_cast<u64>(config.shape.dispatch_bytes);
  config.rank = rank;
  config.dtype = DType::float32;
  config.silence_ms =
      1500;  // the victim says nothing when it dies; a sanitizer is slow, and must not be taken for silence
  config.settle_ms = 5;
  config.agree_by_windows = plan.by_windows;
  for (i32 expert = 0; expert < kNumExperts; ++expert) {
    config.expert_rank.push_back(expert / config.num_local_experts);
    config.expert_local.push_back(expert % config.num_local_experts);
  }
  return config;
}

// One arbiter for all: the first proposal of an epoch is the decision.
class Arbiter {
 public:
  Decision decide(const Decision& proposal) {
    std::lock_guard<std::mutex> lock(mutex_);
    return decisions_.emplace(proposal.view.epoch, proposal).first->second;
  }

 private:
  std::mutex mutex_;
  std::map<u64, Decision> decisions_;
};

// The tokens of one rank in one round, and what came of them.
struct Batch {
  i32 num_tokens;
  std::vector<float> x, weights, out;
  std::vector<i64> experts;
  std::vector<u8> codes;

  Batch(i32 rank, i32 round) : num_tokens((rank + round) % (kNumMaxTokens + 1)) {
    const auto tokens = static_cast<size_t>(num_tokens);
    out.resize(tokens * kHidden);
    codes.resize(tokens * kNumTopk);
    for (i32 token = 0; token < num_tokens; ++token) {
      for (i32 h = 0; h < kHidden; ++h)
        x.push_back(static_cast<float>(rank * 10000 + round) + 0.37f * static_cast<float>(token + h));
      for (i32 choice = 0; choice < kNumTopk; ++choice) {
        experts.push_back((rank + round + token + 3 * choice) % kNumExperts);
        weights.push_back(0.1f + 0.3f * static_cast<float>(choice));
      }
    }
  }

  // The experts give back what they got, so a token's sum is known from the delivered choices alone.
  bool sums_are_exact() const {
    for (size_t token = 0; token < static_cast<size_t>(num_tokens); ++token) {
      for (size_t h = 0; h < kHidden; ++h) {
        float sum = 0.0f;
        for (size_t choice = 0; choice < kNumTopk; ++choice) {
          const size_t which = token * kNumTopk + choice;
          const float term = weights[which] * x[token * kHidden + h];
          if (codes[which] == kDelivered) sum = sum + term;
        }
        if (memcmp(&sum, &out[token * kHidden + h], sizeof sum) != 0) return false;
      }
    }
    return true;
  }

  bool any(u8 wanted) const {
    for (u8 code : codes)
      if (code == wanted) return true;
    return false;
  }
  bool all_delivered() const {
    for (u8 code : codes)
      if (code != kDelivered) return false;
    return true;
  }
};

// Between rounds: everybody's number, of whoever is in; a rank that is in gave what it should.
bool collective_is_right(Endpoint& endpoint, i32 rank, i32 round) {
  const auto number = [round](i32 of) { return static_cast<u64>(of) * 1000000 + static_cast<u64>(round); };
  const u64 mine = number(rank);
  u64 gathered[kNumRanks];
  u8 contributed[kNumRanks];
  const CollectiveArgs args{reinterpret_cast<const u8*>(&mine), sizeof mine, reinterpret_cast<u8*>(gathered),
                            contributed};
  bool right = endpoint.gather_all(args).status == Status::ok && contributed[rank] == 1;
  for (i32 src = 0; src < kNumRanks; ++src) right &= gathered[src] == (contributed[src] == 1 ? number(src) : 0);
  return right;
}

void run_rounds(Endpoint& endpoint, i32 rank, const Plan& plan) {
  constexpr size_t kNumLocal = kNumExperts / kNumRanks, kCapacity = kNumRanks * kNumMaxTokens;
  std::vector<float> recv(kNumLocal * kCapacity * kHidden);
  std::vector<i32> counts(kNumLocal), offsets(kNumLocal + 1);
  for (i32 i = 0; i < plan.num_rounds; ++i) {
    if (rank == kLeaver && i == plan.leaves_at()) return endpoint.close();
    Batch batch(rank, i);
    DispatchArgs sent{};
    sent.x = reinterpret_cast<const u8*>(batch.x.data());
    sent.topk_idx = batch.experts.data();
    sent.idx_is_64_bit = true;
    sent.topk_weights = batch.weights.data();
    sent.num_tokens = batch.num_tokens;
    DispatchResult got = endpoint.dispatch_send(sent);
    const ReceiveArgs received{got.round,     reinterpret_cast<u8*>(recv.data()), nullptr, nullptr, counts.data(),
                               offsets.data()};
    if (got.status == Status::ok) got = endpoint.dispatch_receive(received);

    u8 lost = 0;
    const CombineArgs back{received.recv_x, got.round, /*abandon=*/false};
    const ReduceArgs reduced{got.round, reinterpret_cast<u8*>(batch.out.data()), batch.codes.data(), &lost};
    CombineResult done = endpoint.combine_send(back);
    if (done.status == Status::ok) done = endpoint.combine_receive(reduced);
    if (endpoint.crashed())
      return expect(rank == kVictim && i == plan.dies_at(), "only the victim dies", rank, got.round);

    expect(got.status == Status::ok && done.status == Status::ok, "a call on a live rank succeeds", rank, got.round);
    expect(batch.sums_are_exact(), "the output is the sum of the delivered choices", rank, got.round);
    expect(batch.any(kLost) == (lost != 0), "lost says what the codes say", rank, got.round);
    // Others run at most a round ahead, so until then nobody has left.
    if (i < plan.leaves_at() - 1) expect(batch.all_delivered(), "a healthy round delivers everything", rank, got.round);
    if (i % 4 == 3) expect(collective_is_right(endpoint, rank, i), "a collective has what ranks gave", rank, got.round);
  }
}

void serve_arbiter(Endpoint& endpoint, Arbiter& arbiter, const std::atomic<bool>& over) {
  while (!over.load()) {
    const auto proposal = endpoint.pulse().next_proposal(20 * 1000000);
    if (proposal) endpoint.pulse().learn(arbiter.decide(*proposal));
  }
}

void run_group(const Plan& plan) {
  auto group = std::make_shared<LocalGroup>(config_of(0, plan).shape);
  std::vector<std::unique_ptr<Endpoint>> ranks;
  for (i32 rank = 0; rank < kNumRanks; ++rank)
    ranks.push_back(std::make_unique<Endpoint>(config_of(rank, plan), group, ""));
  for (auto& rank : ranks) rank->create();
  for (auto& rank : ranks) rank->open_peers();
  for (auto& rank : ranks) rank->serve();
  Armed& death = ranks[kVictim]->wire().faults.armed[0];
  death.point = Point::combine_send_rows;
  death.round = static_cast<u64>(plan.dies_at());
  death.action = Action::crash;

  Arbiter arbiter;
  std::atomic<bool> over{false};
  std::vector<std::thread> arbiters, workers;
  for (auto& rank : ranks) arbiters.emplace_back([&] { serve_arbiter(*rank, arbiter, over); });
  for (i32 rank = 0; rank < kNumRanks; ++rank)
    workers.emplace_back([&, rank] { run_rounds(*ranks[static_cast<size_t>(rank)], rank, plan); });
  for (auto& worker : workers) worker.join();
  RankSet survivors;
  survivors.add(0);
  survivors.add(1);
  for (i32 rank = 0; rank < 2; ++rank)
    expect(ranks[static_cast<size_t>(rank)]->pulse().current().view.active == survivors, "two ranks are left", rank,
           static_cast<u64>(plan.num_rounds));
  over.store(true);
  for (auto& thread : arbiters) thread.join();
  for (auto& rank : ranks) rank->close();
}

}  // namespace

int main() {
  for (bool by_windows : {true, false}) run_group({by_windows, false, 600, 2});
  for (i32 num_chunk_tokens : {kNumMaxTokens, 2})
    if (!kThreadSanitized) run_group({true, true, 90, num_chunk_tokens});
  return num_failures.load() == 0 ? 0 : 1;
}
