// The control page of one rank: beats, doorbells, accusations, promises and ballots. Written by its rank, read by its
// peers' host threads.
#pragma once

#include "protocol/compiler.hpp"
#include "protocol/layout.hpp"
#include "protocol/rank_set.hpp"
#include "protocol/view.hpp"

namespace fa2a {

constexpr u64 kControlMagic = 0x6661326163746c31ull;

enum class Life : u32 { absent, constructing, running, left, evicted };

enum class Evidence : u32 { none, exit, left, silence, stall, link };

// An accusation is one word: of which epoch, and with what evidence. The epoch makes a word of a closed view mean
// nothing.
namespace accusation_field {
using Epoch = Field<8, 56>;
using Kind = Field<0, 8>;
}  // namespace accusation_field

FA2A_HD constexpr u64 pack_accusation(u64 epoch, Evidence kind) {
  return accusation_field::Epoch::pack(epoch) | accusation_field::Kind::pack(static_cast<u64>(kind));
}

// "Rounds from `limit` on wait for the next view, and I have started the rounds below `started`." Once per epoch.
struct Promise {
  u64 epoch_plus_one = 0;  // 0: none given yet
  u64 limit = 0;
  u64 started = 0;
};

constexpr u32 kReasonBytes = 512;

// The newest view that this rank knows to be decided, with the sentence that explains it.
struct Decision {
  View view;
  u32 past_edges[kMaxRanks] = {};  // accusation edges of closed epochs, for the verdict's memory of serial accusers
  char reason[kReasonBytes] = {};
};

// The kinds of word that one rank polls and another stores.
enum class WordKind : u32 { dispatch_signal, combine_signal, dispatch_taken, combine_taken, collective };
constexpr u32 kNumWordKinds = 5;

FA2A_HD constexpr WordKind signal_kind(Verb verb) {
  return verb == Verb::dispatch ? WordKind::dispatch_signal : WordKind::combine_signal;
}
FA2A_HD constexpr WordKind taken_kind(Verb verb) {
  return verb == Verb::dispatch ? WordKind::dispatch_taken : WordKind::combine_taken;
}

// What this rank last stored into one peer's window, kept where the peer's host thread can read it by another path: a
// word that stands here and does not arrive there is a lost link.
struct SentWords {
  u64 words[kNumWordKinds][kNumParities];
};

// Whatever one rank publishes and others read at any time. The copy that `version` names stands still while the other
// one is written, so a writer that dies or is stopped in mid-update leaves the record before it, whole. (One copy
// behind a count that is odd while it is written would stay unreadable for ever, and take its owner's votes with it.)
template <class Record>
struct TwoCopies {
  u64 version = 0;  // 0: nothing published yet; the newest record stands in copies[version % 2]
  Record copies[2];
};

// What a rank has promised and accepted in the agreement on the view after `epoch`. It is the answer to every request:
// proposers read it from the page, so nothing can be answered before it is recorded, and it outlives its rank.
template <class Value>
struct AcceptorRecord {
  u64 incarnation = 0;  // whose record it is
  u64 epoch = 0;
  u64 promised = 0;         // the highest ballot promised; 0: none
  u64 accepted_ballot = 0;  // the ballot at which `accepted` was accepted; 0: nothing was
  Value accepted{};
};

enum class BallotPhase : u64 { none, prepare, accept };

// What a proposer asks of all members.
template <class Value>
struct BallotRequest {
  u64 epoch = 0;
  u64 ballot = 0;
  BallotPhase phase = BallotPhase::none;
  Value value{};  // for accept
};

struct ControlPage {
  u64 magic = 0;
  u64 shape_hash = 0;
  u64 incarnation = 0;
  u32 rank = 0;
  u32 pid = 0;

  alignas(kLine) u32 death_word = 0;  // the kernel sets bit 30 when its holder thread is gone
  alignas(kLine) u64 process_beat = 0;
  alignas(kLine) u64 progress = 0;
  alignas(kLine) u32 life = 0;

  alignas(kLine) u32 doorbell = 0;    // rung by peers after a signal, when somebody waits
  u32 doorbell_waiters = 0;           // edited by waiters only
  alignas(kLine) u32 pulse_bell = 0;  // rung by peers' native threads

  alignas(kLine) TwoCopies<Promise> promise;
  alignas(kLine) TwoCopies<AcceptorRecord<Decision>> acceptor;
  alignas(kLine) TwoCopies<BallotRequest<Decision>> request;
  alignas(kLine) TwoCopies<Decision> decision;
  alignas(kLine) u64 accusations_version = 0;
  u64 accusations[kMaxRanks] = {};
  alignas(kLine) SentWords sent[kMaxRanks];
  alignas(kLine) u64 fault_at_ns = 0;  // test build: when this rank was about to fail
};

FA2A_HD constexpr u64 control_page_bytes() { return round_up(sizeof(ControlPage), kPage); }

}  // namespace fa2a
