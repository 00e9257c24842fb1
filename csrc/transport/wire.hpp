// The stores that leave a rank, in one place, so that the test build can make them slow, silent, late or wrong.
#pragma once

#include <string.h>

#include "host/copy.hpp"
#include "host/doorbell.hpp"
#include "protocol/guards.hpp"
#include "protocol/layout.hpp"
#include "protocol/memory.hpp"
#include "protocol/phases.hpp"
#include "transport/fabric.hpp"
#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS
#include <vector>

#include "transport/faults.hpp"
#endif

namespace fa2a {

class Wire {
 public:
  explicit Wire(Fabric& fabric) : fabric_(fabric) {}

#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS
  void put_row(i32 dst, u8* to, const u8* from, u64 num_bytes, bool streamed) {
    if (!faults.put_row(dst, to, from, num_bytes)) store_row(to, from, num_bytes, streamed);
  }
  void put_answer(i32 dst, u8* to, const u8* from, u64 num_bytes, bool streamed) {
    if (!faults.loses_answer(dst)) put_row(dst, to, from, num_bytes, streamed);
  }
  void put_row_header(i32 dst, RowHeader* to, const RowHeader& header, const RowChoice* choices) {
    if (faults.cut.has(dst)) return;
    // Made here and copied like a row, so that the simulator can have it under way for as long.
    std::vector<u8> staged(sizeof header + sizeof(RowChoice) * static_cast<u64>(header.num_choices));
    auto* at = reinterpret_cast<RowHeader*>(staged.data());
    store_row_header(at, header, choices);
    faults.lie_about(at);
    copy_row(reinterpret_cast<u8*>(to), staged.data(), staged.size());
  }
  void put_signal(i32 dst, u64* word, u64 value, bool combine) {
    finish_copies();
    if (faults.put_signal(dst, word, value, combine)) ring_doorbell(fabric_.page(dst));
  }
  void put_taken(i32 dst, u64* word, u64 value) {
    if (faults.cut.has(dst) || faults.drop_taken.has(dst)) return;
    store_release(word, value);
    ring_doorbell(fabric_.page(dst));
  }
  void put_claims(i32 dst, void* to, i32* claims, i32 num_experts) {
    if (faults.cut.has(dst)) return;
    faults.lie_about_claims(claims, num_experts);
    copy_row(static_cast<u8*>(to), reinterpret_cast<const u8*>(claims), sizeof(i32) * static_cast<u64>(num_experts));
  }
  void put_progress(i32 dst, u64* word, u64 value) {
    if (!faults.cut.has(dst)) store_release(word, value);
  }
  void put_collective(i32 dst, u64* word, u64 value) {
    if (faults.cut.has(dst)) return;
    store_release(word, value);
    ring_doorbell(fabric_.page(dst));
  }
  void put_collective_set(i32 dst, void* to, const RankSet& set) {
    if (!faults.cut.has(dst)) store_set(to, set);
  }
  void put_collective_bytes(i32 dst, void* to, const u8* from, u64 num_bytes) {
    if (!faults.cut.has(dst)) memcpy(to, from, num_bytes);
  }
  bool ignores_consent() const { return faults.ignore_consent; }
  void at(Point point, u64 round) { faults.at(point, round, fabric_); }

  Faults faults;
#else
  // `streamed`: past the cache. Its order is put_signal's business.
  void put_row(i32, u8* to, const u8* from, u64 num_bytes, bool streamed) { store_row(to, from, num_bytes, streamed); }
  void put_answer(i32, u8* to, const u8* from, u64 num_bytes, bool streamed) {
    store_row(to, from, num_bytes, streamed);
  }
  void put_row_header(i32, RowHeader* to, const RowHeader& header, const RowChoice* choices) {
    store_row_header(to, header, choices);
  }
  void put_signal(i32 dst, u64* word, u64 value, bool) {
    finish_copies();
    store_release(word, value);
    ring_doorbell(fabric_.page(dst));
  }
  void put_taken(i32 dst, u64* word, u64 value) {
    store_release(word, value);
    ring_doorbell(fabric_.page(dst));
  }
  void put_claims(i32, void* to, const i32* claims, i32 num_experts) {
    memcpy(to, claims, sizeof(i32) * static_cast<u64>(num_experts));
  }
  void put_progress(i32, u64* word, u64 value) {
    if (kWatched) store_release(word, value);
  }
  void put_collective(i32 dst, u64* word, u64 value) { put_taken(dst, word, value); }
  void put_collective_set(i32, void* to, const RankSet& set) { store_set(to, set); }
  void put_collective_bytes(i32, void* to, const u8* from, u64 num_bytes) { memcpy(to, from, num_bytes); }
  static constexpr bool ignores_consent() { return false; }
  void at(Point, u64) {}
#endif

 private:
  static void store_row(u8* to, const u8* from, u64 num_bytes, bool streamed) {
    if (streamed)
      stream_row(to, from, num_bytes);
    else
      copy_row(to, from, num_bytes);
  }
  // Word by word: a reader may look at it while it changes, and looks again then.
  static void store_set(void* to, const RankSet& set) {
    for (i32 i = 0; i < RankSet::kNumWords; ++i) store_relaxed(static_cast<u64*>(to) + i, set.words[i]);
  }
  static void store_row_header(RowHeader* to, const RowHeader& header, const RowChoice* choices) {
    *to = header;
    memcpy(to + 1, choices, sizeof(RowChoice) * static_cast<u64>(header.num_choices));
  }
  Fabric& fabric_;
};

}  // namespace fa2a
