// One rank put together: its fabric, its words, its pulse and its kernels, in the order in which they may be born and
// die.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "host/door.hpp"
#include "kernels/cpu/collective.hpp"
#include "kernels/cpu/context.hpp"
#include "kernels/cuda/host/rank.hpp"
#include "kernels/cuda/twin/gpu.hpp"
#include "membership/pulse.hpp"
#include "transport/cuda_window.hpp"

namespace fa2a {

// What runs this rank's kernels.
enum class Machine : u32 {
  cpu,
  cuda_host,  // the CUDA kernels, by their twin on this host, in the windows of the host
  cuda        // a GPU, in windows of its own
};

struct EndpointConfig {
  Shape shape;
  i32 rank = 0;
  DType dtype = DType::bfloat16;
  bool packed = false;
  bool renormalize = false;
  bool weights_at_expert = false;
  WireFormat format;
  std::vector<i32> expert_rank;
  std::vector<i32> expert_local;
  i32 num_local_experts = 0;
  i64 beat_ms = 10, silence_ms = 2000, stall_ms = 30000, link_ms = 5000, settle_ms = 50, agreement_timeout_ms = 10000;
  std::vector<i32> host_of;  // [num_ranks], the same on every rank; empty: it is not known who shares a host
  i64 join_hold_ms = 500;
  i32 num_founders = 0;  // the lowest ranks, which are in the first view
  // false: whoever owns this endpoint carries proposals to an arbiter.
  bool agree_by_windows = true;
  u64 first_round = 0;  // tests start just before a field's end
  u64 first_epoch = 0;
  Machine machine = Machine::cpu;
  twin::TwinOptions twin;
  // Of Machine::cuda: which device, its machine code, and blocks of the kernels that may have several (0: its choice).
  i32 device = 0;
  std::vector<std::string> cubins;
  i32 num_sms = 0;
  bool poison = false;  // fill fresh partitions with NaN, and their signal words with stale signals
};

// How far a newcomer has come.
enum class JoinStage : u32 { no_members, member_unknown, waits, in, out };

struct JoinProgress {
  JoinStage stage = JoinStage::waits;
  i32 rank = 0;         // member_unknown: whose control page must be mapped
  u64 incarnation = 0;  // and of which life
};

// With a peer whose window is asked for, while others wait for me.
constexpr i64 kDoorPatienceNs = 200ll * 1000000;
constexpr i64 kConstructMs = 60000;  // where nobody says how long construction may take

class Endpoint : private Doors {
 public:
  // Virtual ranks share `group`; otherwise `token` names the shared memory of the group.
  Endpoint(const EndpointConfig& config, std::shared_ptr<LocalGroup> group, const std::string& token);
  ~Endpoint();

  // Construction happens in steps, with the group's rendezvous between them.
  void create();  // what this rank owns
  // After all have created: map, check, prepare, start the pulse.
  void open_peers(i64 timeout_ms = kConstructMs);
  void serve();  // after all have opened: names are forgotten, rounds may begin

  // A rank that comes later does this instead (endpoint_joins.cpp).
  void create_newcomer();
  bool open_member(i32 rank, i32 pid, i32 fd, u64 incarnation);  // false: that life is gone
  JoinProgress go_on_joining();
  void serve_as_newcomer();
  // Marks a step start. Waits only while a change of membership can be made here, at most join_hold_ms; true in
  // `left_out` when this rank had asked to leave and is out.
  Status begin_step(bool& left_out);
  void ask_to_leave() { pulse_->ask_to_leave(); }
  i32 page_fd() const { return fabric_->page_fd(); }

  DispatchResult dispatch_send(const DispatchArgs& args);
  DispatchResult dispatch_receive(const ReceiveArgs& args);
  CombineResult combine_send(const CombineArgs& args);
  CombineResult combine_receive(const ReduceArgs& args);
  CombineResult abandon(u64 round);
  CollectiveResult gather_all(const CollectiveArgs& args);
  void close();
  void set_timeouts(i32 rank, i64 silence_ms, i64 stall_ms);
  bool crashed() const { return crashed_; }
#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS
  // For kernels that run outside: what is armed for this point happens. True: this rank has crashed.
  bool reach(Point point, u64 round);
#endif
  i32 open_tokens(u64 round) const;         // -1: that round is not open
  const OpenRound* received_of(u64 round);  // nullptr: that round is not open

  Pulse& pulse() { return *pulse_; }
  Context& context() { return context_; }
  RankState& state() { return *state_; }
  Fabric& fabric() { return *fabric_; }
  cuda::Rank* cuda() { return cuda_.get(); }                       // nullptr: the CPU's kernels
  const cuda::Windows* windows() const { return windows_.get(); }  // nullptr: the window lies on the host
  void refresh();                                                  // takes over what kernels did that nobody waited for
  Wire& wire() { return *wire_; }
  const EndpointConfig& config() const { return config_; }
  bool closed() const { return closed_; }

 private:
  template <class Result, class Call>
  Result call(Call work);
  Decision first_decision() const;
  void leave_stale_signals(u8* partition) const;
  void crash();
  void update_tick();
  void fill_page(ControlPage& page, Life life);
  void set_up_context();
  void set_up_kernels();
  void finish_kernels();
  u8* inbound(i32 partition) const;
  u8* outbound(i32 owner) const;
  // On a GPU (endpoint_cuda.cpp): the window lies there, and peers come by it through this rank's door.
  void create_device();
  void open_door(u64 incarnation);
  void open_founders_windows(i64 deadline_ns);
  bool take_window(i32 owner, i32 partition, const cuda::Quiescent& quiescent, i64 patience_ns) noexcept;
  bool renew_window(i32 writer, const cuda::Quiescent& quiescent);
  RankSet gone_peers() const;
  bool may_come_in(const View& view) const;
  void let_go(const RankSet& owners, const cuda::Quiescent& quiescent) noexcept;
  void fill_device(i32 partition);
  void start_pulse(const Decision& first, bool joining);
  bool open_page(i32 rank, i32 pid, i32 fd) noexcept override;
  void fill_window(const View& members, u64 first_round, u64 first_collective) noexcept override;
  bool prepare_for(const Newcomer& newcomer, const cuda::Quiescent& quiescent);
  void fill_for(const Newcomer& newcomer);
  bool is_reached() const;
  bool reach(i32 owner, i32 partition);
  Status wait_out_hold();
  bool may_be_open() const;

  EndpointConfig config_;
  std::shared_ptr<LocalGroup> group_;
  std::string token_;
  std::unique_ptr<Fabric> fabric_;
  SharedFabric* shared_ = nullptr;
  std::unique_ptr<Wire> wire_;
  std::unique_ptr<RankState> state_;
  std::unique_ptr<Pulse> pulse_;
  Context context_;
  std::unique_ptr<cuda::Windows> windows_;  // on a GPU; collectives go through those of the fabric even then
  std::mutex windows_lock_;                 // my own partitions are swapped by one thread and handed out by the door's
  std::unique_ptr<Door> door_;
  std::unique_ptr<cuda::Gpu> gpu_;    // until `cuda_` has it
  std::unique_ptr<cuda::Rank> cuda_;  // instead of the CPU kernels
  std::mutex calls_;                  // one kernel at a time
  bool closed_ = false;
  bool crashed_ = false;
  // Of a member, for whom a partition is ready; of a newcomer, which members it reaches and which know of it.
  u64 prepared_for_ = 0;  // incarnation
  i32 prepared_rank_ = -1;
  i32 prepared_partition_ = -1;
  NewcomerFabric* newcomer_ = nullptr;
  std::vector<u64> knocked_at_;  // per rank: the incarnation that was knocked at
  std::vector<u64> reached_;     // per rank: which offer of which incarnation is mapped
};

// Of GPUs: this machine's, or in the test build the twin's. nullptr: there is none, and `why`.
const cuda::Driver* find_driver(std::string& why);

}  // namespace fa2a
