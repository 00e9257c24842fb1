// What becomes of each load and store: it may let another strand go on, and it may take its time.
#include "tests/simulator/memory.hpp"

#include <string.h>

#include <algorithm>

#include "host/copy.hpp"
#include "protocol/control_page.hpp"
#include "protocol/memory.hpp"
#include "tests/simulator/files.hpp"

namespace fa2a::sim {

Links* links = nullptr;
SickWatcher sick_watcher;

// Control pages are read and stored by another path, at once; so is what a life has for itself.
bool Links::take(void* to, const void* from, u64 num_bytes, bool is_word) {
  const Strand* self = scheduler->running();
  if (self == nullptr || scheduler->over) return false;
  auto* place = files.one_address_of(static_cast<u8*>(to));
  const i32 object = files.object_at(place);
  if (object < 0 || files.object(object).creator == self->life) return false;
  if (*reinterpret_cast<const u64*>(files.begin_of(object)) == kControlMagic) return false;
  Link& link = this->link(self->life, files.object(object).creator);
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
    store.to = place + done;
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

// A partition is one incarnation's. Whoever else stores into it lands in somebody's payload (P8), sooner or later: the
// rows of a life that was stopped in the midst of one, and replaced.
void Links::check_writer(const Link& link, i32 writer, const u8* to) {
  const u8* begin = files.begin_of(files.object_at(to));
  const u64 partition = static_cast<u64>(to - begin) / at_.num_bytes * at_.num_bytes;
  const auto* header = reinterpret_cast<const PartitionHeader*>(begin + partition + at_.header);
  if (header->incarnation != incarnations_[static_cast<size_t>(writer)] && !link.corrupts)
    wrong = "a store lands in a partition that belongs to another life";
}

i32 Links::land() {
  const i64 at = next_at();
  for (size_t i = 0; i < links_.size(); ++i) {
    Link& link = links_[i];
    if (link.next == link.stores.size() || link.stores[link.next].at != at) continue;
    const UnderWay& store = link.stores[link.next++];
    ++num_landed;
    check_writer(link, static_cast<i32>(i) / n_, store.to);
    memcpy(store.to, store.bytes, store.num_bytes);
    const u64 from_begin = static_cast<u64>(store.to - files.begin_of(files.object_at(store.to)));
    const bool rings = store.is_word && from_begin % at_.num_bytes != at_.progress;
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

}  // namespace fa2a
