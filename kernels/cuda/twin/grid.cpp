// The twin's scheduler: draws which thread runs next, and knows who waits for whom.
#include "kernels/cuda/twin/grid.hpp"

#include <utility>

#include "host/clock.hpp"
#include "kernels/cuda/plants.hpp"

namespace fa2a {

#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS
u64 planted_bugs = 0;
#endif

namespace twin {

namespace {

constexpr u64 kStackBytes = 128 << 10;  // of which an ordinary build touches the first pages only
constexpr u64 kSharedBytes = 48 << 10;
// How long stores that nobody published stay back when their kernel has ended, so that a peer who was told too early
// sees what a slow link would show.
constexpr i64 kLingerNs = 3 * kNsPerMs;

thread_local Grid* current = nullptr;

}  // namespace

Grid& grid() { return *current; }

u64 Grid::next_random() {  // xorshift64, George Marsaglia
  random_ ^= random_ << 13;
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  return random_;
}

void Grid::begin(const GridShape& shape) {
  const i32 num_fibres = shape.num_blocks * shape.num_threads;
  if (fibres_.size() < static_cast<size_t>(num_fibres))
    stacks_.reset(new u8[static_cast<u64>(num_fibres) * kStackBytes]);  // untouched pages cost nothing
  fibres_.resize(static_cast<size_t>(num_fibres) > fibres_.size() ? static_cast<size_t>(num_fibres) : fibres_.size());
  shape_ = shape;
  blocks_.resize(static_cast<size_t>(shape.num_blocks));
  for (Block& block : blocks_) {
    block.num_living = shape.num_threads;
    block.at_barrier.clear();
    if (!block.shared) block.shared.reset(new u8[kSharedBytes]);
    // As on a chip: whatever was there before.
    for (u64 i = 0; i < kSharedBytes; i += 8) block.shared[i] = static_cast<u8>(next_random());
  }
  warps_.resize(static_cast<size_t>(num_fibres / 32));
  for (Warp& warp : warps_) {
    warp.turn = 0;
    warp.at_exchange.clear();
  }
  ready_.clear();
  paused_.clear();
  thrown_ = nullptr;
  for (i32 i = 0; i < num_fibres; ++i) {
    Thread& thread = fibres_[static_cast<size_t>(i)];
    thread.where = {i / shape.num_threads, i % shape.num_threads};
    thread.ended = false;
    thread.fibre.prepare(stacks_.get() + static_cast<u64>(i) * kStackBytes, kStackBytes, &Grid::enter);
    ready_.push_back(i);
  }
}

bool Grid::run(const GridShape& shape, Idle& idle, const std::function<void()>& kernel) {
  begin(shape);
  kernel_ = &kernel;
  Grid* const before = std::exchange(current, this);
  bool stuck = false;
  while (!thrown_ && !stuck) {
    if (ready_.empty() && paused_.empty()) {
      for (const Block& block : blocks_) stuck |= block.num_living > 0;
      break;
    }
    if (ready_.empty()) {
      idle.wait();
      ready_.swap(paused_);
    }
    const u64 drawn = next_random() % ready_.size();
    running_ = ready_[drawn];
    ready_[drawn] = ready_.back();
    ready_.pop_back();
    if (options_.weak && next_random() % 64 == 0) held_.let_go_one(next_random());
    fibres_[static_cast<size_t>(running_)].fibre.switch_from(scheduler_);
  }
  current = before;
  settle();
  if (thrown_) std::rethrow_exception(std::exchange(thrown_, nullptr));
  return !stuck;
}

// What a kernel has stored is published by its end, however late.
void Grid::settle() {
  if (held_.empty()) return;
  sleep_ns(kLingerNs);
  held_.let_go_all(next_random());
}

void Grid::enter() {
  Grid& self = *current;
  self.fibres_[static_cast<size_t>(self.running_)].fibre.arrived(self.scheduler_);
  try {
    (*self.kernel_)();
  } catch (...) {
    self.thrown_ = std::current_exception();
  }
  self.end_thread();
}

void Grid::end_thread() {
  Thread& thread = fibres_[static_cast<size_t>(running_)];
  thread.ended = true;
  Block& block = blocks_[static_cast<size_t>(thread.where.block)];
  --block.num_living;
  open_barrier(block, thread.where.block);
  scheduler_.switch_from(thread.fibre, /*last=*/true);
}

void Grid::switch_away() {
  const i32 mine = running_;
  scheduler_.switch_from(fibres_[static_cast<size_t>(mine)].fibre);
}

void Grid::open_barrier(Block& block, i32 block_idx) {
  if (block.at_barrier.empty() || block.at_barrier.size() < static_cast<size_t>(block.num_living)) return;
  held_.barrier(block_idx);
  for (i32 waiting : block.at_barrier)
    if (waiting != running_) ready_.push_back(waiting);
  block.at_barrier.clear();
}

void Grid::sync_block() {
  const Where where = me();
  Block& block = blocks_[static_cast<size_t>(where.block)];
  block.at_barrier.push_back(running_);
  const bool is_last = block.at_barrier.size() == static_cast<size_t>(block.num_living);
  open_barrier(block, where.block);
  if (!is_last) switch_away();
}

const u32* Grid::exchange(u32 value) {
  const Where where = me();
  Warp& warp = warps_[static_cast<size_t>((where.block * shape_.num_threads + where.thread) / 32)];
  u32* values = warp.values[warp.turn % 2];
  values[where.thread % 32] = value;
  if (warp.at_exchange.size() == 31) {
    ++warp.turn;
    for (i32 waiting : warp.at_exchange) ready_.push_back(waiting);
    warp.at_exchange.clear();
  } else {
    warp.at_exchange.push_back(running_);
    switch_away();
  }
  return values;
}

void Grid::pause() {
  paused_.push_back(running_);
  switch_away();
}

void Grid::fence_device() { held_.fence(me().block, me().thread); }

void Grid::put(void* to, const void* from, u64 num_bytes) {
  if (options_.weak)
    held_.hold(me().block, me().thread, to, from, num_bytes);
  else
    __builtin_memcpy(to, from, num_bytes);
}

void Grid::release() {
  if (!held_.empty()) held_.release(me().block, me().thread, next_random());
}

void* Grid::shared(u64 num_bytes) {
  return num_bytes <= kSharedBytes ? blocks_[static_cast<size_t>(me().block)].shared.get() : nullptr;
}

}  // namespace twin
}  // namespace fa2a
