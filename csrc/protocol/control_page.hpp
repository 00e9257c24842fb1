// The control page of one rank: beats, doorbells, accusations, promises, holds and ballots. Written by its rank (bells
// and knocks excepted), read by its peers' host threads.
#pragma once

#include "protocol/compiler.hpp"
#include "protocol/layout.hpp"
#include "protocol/rank_set.hpp"
#include "protocol/view.hpp"

namespace fa2a {

constexpr u64 kControlMagic = 0x6661326163746c31ull;

enum class Life : u32 { absent, constructing, running, left, evicted, joining };

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

// A change of membership that waits for a step start: who comes or goes, and which life of it.
enum class ChangeKind : u64 { none, join, leave };

struct StepChange {
  ChangeKind kind = ChangeKind::none;
  u64 rank = 0;
  u64 incarnation = 0;
  FA2A_HD constexpr bool operator==(const StepChange& other) const {
    return kind == other.kind && rank == other.rank && incarnation == other.incarnation;
  }
};

// "I stand at a step start, the rounds below `round` and collectives below `collective` closed, and wait here for this
// change." Taken back at will.
struct StepHold {
  u64 epoch_plus_one = 0;  // 0: holds nowhere
  u64 round = 0;
  u64 collective = 0;
  StepChange change;
  FA2A_HD constexpr bool operator==(const StepHold& other) const {
    return epoch_plus_one == other.epoch_plus_one && round == other.round && collective == other.collective &&
           change == other.change;
  }
};

// "Rounds from `limit` on wait for the next view, and I have started the rounds below `started`." Once per epoch.
struct Promise {
  u64 epoch_plus_one = 0;  // 0: none given yet
  u64 limit = 0;
  u64 started = 0;
  StepChange change;  // given while all held at a step start for it; else none
};

// Where a newcomer finds the partition that this rank keeps for it: an open file of this process.
struct Offer {
  u64 incarnation = 0;  // of the newcomer
  u64 partition = 0;
  u64 fd = 0;
};

// "Here is my control page": a newcomer rings members with it, whose names for anything are long gone. 0: nobody did.
namespace knock_field {
using Process = Field<32, 32>;
using FilePlusOne = Field<0, 32>;
}  // namespace knock_field

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
  u32 window_fd = 0;          // of a rank that came later: its whole window is one open file
  u64 process_namespace = 0;  // whose number `pid` is

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
  alignas(kLine) TwoCopies<StepHold> hold;
  alignas(kLine) TwoCopies<Offer> offer;
  u64 ready_for = 0;       // of a newcomer: epoch + 1 of the view all of whose members it can reach; 0: none yet
  u64 wants_to_leave = 0;  // 1: a member that asks to be left out at the next step start
  alignas(kLine) u64 accusations_version = 0;
  u64 accusations[kMaxRanks] = {};
  alignas(kLine) SentWords sent[kMaxRanks];
  alignas(kLine) u64 knocks[kMaxRanks] = {};  // of each rank that is not in, stored by its newcomer
  alignas(kLine) u64 fault_at_ns = 0;         // test build: when this rank was about to fail
};

FA2A_HD constexpr u64 control_page_bytes() { return round_up(sizeof(ControlPage), kPage); }

}  // namespace fa2a
