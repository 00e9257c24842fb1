// What becomes of each load and store: it may let another strand go on, and it may take its time.
#include "tests/simulator/memory.hpp"

#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <stdexcept>

#include "host/copy.hpp"
#include "protocol/control_page.hpp"
#include "protocol/memory.hpp"
#include "transport/fabric.hpp"

namespace fa2a::sim {

Arena arena;
Links* links = nullptr;
SickWatcher sick_watcher;

namespace {
constexpr u64 kArenaBytes = 64ull << 20;
}

u8* Arena::take(u64 num_bytes) {
  if (base_ == nullptr)
    base_ = static_cast<u8*>(mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  u8* at = base_ + used_;
  used_ += round_up(num_bytes, 4096);
  if (used_ > kArenaBytes) throw std::runtime_error("the arena is too small for this shape");
  return at;
}

void Arena::reset() {
  if (base_ != nullptr) memset(base_, 0, used_);
  used_ = 0;
}

void Links::owns(u8* partition, u64 num_bytes, i32 owner, i32 writer, u64 progress_offset) {
  const u64 first = arena.page_of(partition), last = arena.page_of(partition + num_bytes - 1);
  if (places_.size() <= last) places_.resize(last + 1);
  for (u64 page = first; page <= last; ++page) places_[page] = {owner, writer, partition + progress_offset};
}

bool Links::take(void* to, const void* from, u64 num_bytes, bool is_word) {
  const Strand* self = scheduler->running();
  if (self == nullptr || scheduler->over || !arena.has(to)) return false;
  const u64 page = arena.page_of(to);
  if (page >= places_.size() || places_[page].owner < 0 || places_[page].owner == self->rank) return false;
  const Place& place = places_[page];
  if (place.writer != self->rank) wrong = "a rank stores into a partition that belongs to another writer";
  Link& link = this->link(self->rank, place.owner);
  const i64 now = scheduler->now();
  if (now >= link.loses_from) return true;
  Dice& dice = scheduler->dice;
  const auto* bytes = static_cast<const u8*>(from);
  const u64 piece = delays_.reorders && !is_word ? 8 : 16;
  const i64 whole_at = now + dice.heavy(delays_.most_ns);
  for (u64 done = 0; done < num_bytes; done += piece) {
    UnderWay store;
    store.at = delays_.reorders && !is_word ? now + dice.heavy(delays_.most_ns) : whole_at;
    if (is_word || !delays_.reorders) store.at = std::max(store.at, link.newest_at);
    store.to = static_cast<u8*>(to) + done;
    store.num_bytes = std::min(piece, num_bytes - done);
    memcpy(store.bytes, bytes + done, store.num_bytes);
    if (link.corrupts && !is_word)
      for (u64 i = 0; i < store.num_bytes; ++i) store.bytes[i] ^= i % 4 == 3 ? 0x80 : 0;
    store.is_word = is_word;
    add(link, store);
  }
  return true;
}

void Links::add(Link& link, UnderWay store) {
  if (link.next == link.stores.size()) link.stores.clear(), link.next = 0;
  // Two stores of one writer to one place come in their order, on every machine there is.
  for (size_t i = link.next; i < link.stores.size(); ++i) {
    const UnderWay& before = link.stores[i];
    const bool overlap = before.to < store.to + store.num_bytes && store.to < before.to + before.num_bytes;
    if (overlap) store.at = std::max(store.at, before.at);
  }
  link.newest_at = std::max(link.newest_at, store.at);
  auto at = link.stores.end();
  while (at != link.stores.begin() + static_cast<i64>(link.next) && (at - 1)->at > store.at) --at;
  link.stores.insert(at, store);
}

i64 Links::next_at() const {
  i64 at = kNever;
  for (const Link& link : links_)
    if (link.next < link.stores.size()) at = std::min(at, link.stores[link.next].at);
  return at;
}

i32 Links::land() {
  const i64 at = next_at();
  for (size_t i = 0; i < links_.size(); ++i) {
    Link& link = links_[i];
    if (link.next == link.stores.size() || link.stores[link.next].at != at) continue;
    const UnderWay& store = link.stores[link.next++];
    ++num_landed;
    memcpy(store.to, store.bytes, store.num_bytes);
    const bool rings = store.is_word && store.to != places_[arena.page_of(store.to)].progress;
    return rings ? static_cast<i32>(i) % n_ : -1;
  }
  return -1;
}

void Links::writer_died(i32 writer, i64 most_late_ns, bool keeps_all) {
  Dice& dice = scheduler->dice;
  for (i32 owner = 0; owner < n_; ++owner) {
    Link& link = this->link(writer, owner);
    link.stores.erase(link.stores.begin(), link.stores.begin() + static_cast<i64>(link.next));
    link.next = 0;
    if (!keeps_all) link.stores.resize(dice.below(link.stores.size() + 1));
    const i64 late = dice.heavy(most_late_ns);
    for (UnderWay& store : link.stores) store.at += late;
    link.loses_from = 0;
  }
}

}  // namespace fa2a::sim

namespace fa2a {

using sim::links;
using sim::scheduler;

u64 load_acquire(const u64* word) {
  scheduler->touch();
  return *static_cast<const volatile u64*>(word);
}

u64 load_relaxed(const u64* word) { return load_acquire(word); }

void store_release(u64* word, u64 value) {
  scheduler->touch();
  if (links->take(word, &value, sizeof value, /*is_word=*/true)) return;
  const auto& sick = sim::sick_watcher;
  if (value == 0 && word >= sick.row && word < sick.row + sick.num_ranks)
    value = pack_accusation(newest_view(*sick.ring).epoch, Evidence::silence);
  *static_cast<volatile u64*>(word) = value;
}

void store_relaxed(u64* word, u64 value) { store_release(word, value); }

void fetch_or(u64* word, u64 bits) {
  scheduler->touch();
  *word |= bits;
}

void fetch_and(u64* word, u64 bits) {
  scheduler->touch();
  *word &= bits;
}

void full_fence() { scheduler->touch(); }

// In parts, so that a reader without its guard meets a row that changes under it.
void copy_row(u8* to, const u8* from, u64 num_bytes) {
  if (links->take(to, from, num_bytes, /*is_word=*/false)) return scheduler->touch();
  for (u64 done = 0; done < num_bytes; done += 16) {
    scheduler->touch();
    memcpy(to + done, from + done, std::min<u64>(16, num_bytes - done));
  }
}

void stream_row(u8* to, const u8* from, u64 num_bytes) { copy_row(to, from, num_bytes); }
void finish_copies() {}

SharedMemory::~SharedMemory() = default;
SharedMemory::SharedMemory(SharedMemory&& other) noexcept : data_(other.data_), num_bytes_(other.num_bytes_) {}
SharedMemory& SharedMemory::operator=(SharedMemory&& other) noexcept {
  data_ = other.data_;
  num_bytes_ = other.num_bytes_;
  return *this;
}
// There is one process here, and nobody joins yet: no fabric between processes, no memory that is handed over.
std::unique_ptr<SharedFabric> make_shared_fabric(const Shape&, const std::string&, i32, i32) { return nullptr; }
std::unique_ptr<NewcomerFabric> make_newcomer_fabric(const Shape&, i32) { return nullptr; }
OpenFile::~OpenFile() = default;
OpenFile& OpenFile::operator=(OpenFile&&) noexcept { return *this; }
OpenFile OpenFile::of_process(i32, i32) noexcept { return OpenFile(); }
OpenFile OpenFile::fresh_memory(u64) noexcept { return OpenFile(); }
u64 OpenFile::num_bytes() const noexcept { return 0; }
bool map_over(u8*, u64, const OpenFile&, u64) noexcept { return false; }
SharedMemory SharedMemory::anonymous(u64 num_bytes) { return SharedMemory(sim::arena.take(num_bytes), num_bytes); }

}  // namespace fa2a
