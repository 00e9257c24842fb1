// The safety guards by name: always on in production, switchable one by one in the test build so that each can be seen
// to matter.
#pragma once

#include "protocol/compiler.hpp"

namespace fa2a {

// docs/protocol.md gives the accident that each one prevents; tests/test_guards.py takes each one out.
#define FA2A_GUARDS(X)                                                                            \
  X(consent)              /* rows of round r+2 wait for the reader's word about round r        */ \
  X(recheck)              /* a source whose word changed while it was copied is not taken      */ \
  X(hold)                 /* no new round starts while an active peer is suspected             */ \
  X(promise)              /* first_round comes after everything any kept member has started    */ \
  X(promise_fence)        /* a promise is one store, one fence, one load, in this order        */ \
  X(later_declined)       /* a later round in the word ends the wait for this one              */ \
  X(round_compare)        /* a word of an older round is not this round's signal               */ \
  X(epoch_compare)        /* a word signed in another view is not taken                        */ \
  X(clamp_count)          /* a peer's count never bounds a loop                                */ \
  X(check_index)          /* a peer's index never addresses memory                             */ \
  X(chunk_compare)        /* a word of the chunk before is not this chunk's signal             */ \
  X(fresh_words)          /* no word that only streams store is older than half the rounds     */ \
  X(chunk_consent)        /* half of a stream's slots is refilled only after its reader's word */ \
  X(claims_met)           /* a source that sends other rows than it announced is not taken     */ \
  X(mutual_wait)          /* a tick excuses nobody who waits for the one that judges           */ \
  X(combine_count)        /* the owner compares the rows that came back with those it sent     */ \
  X(one_answer)           /* a source that was not taken still gets a declined answer          */ \
  X(third_round)          /* dispatch of r+2 only after combine r                              */ \
  X(tick)                 /* a rank that waits shows that it lives                             */ \
  X(beat)                 /* the native thread beats, whatever Python does                     */ \
  X(gap_restart)          /* a watcher that slept restarts its deadlines                       */ \
  X(waited_only)          /* silence counts only while somebody waits                          */ \
  X(own_kernel)           /* a kernel that hangs is no witness of a broken link                */ \
  X(incarnation)          /* a partition belongs to one incarnation, fresh ones are pre-filled */ \
  X(evicted_is_suspect)   /* nobody waits for a rank that was voted out  */                       \
  X(view_once)            /* a round keeps the view that it began with                         */ \
  X(all_promised)         /* every next member has promised, a quorum is not enough            */ \
  X(release_word)         /* the host can end any wait                                         */ \
  X(copy_fence)           /* rows stored past the cache are there before their signal is       */ \
  X(record_before_answer) /* one word, stored last, says which copy of a record counts       */   \
  X(frozen_records)       /* a dead member is discounted by its frozen record only             */ \
  X(records_at_accept)    /* in counting accepts as much as in prepare                         */ \
  X(fresh_partition)      /* a newcomer's partition is memory that no earlier life can reach   */ \
  X(quiet_swap)           /* what lies at an address is swapped once no kernel can run there   */ \
  X(step_start)           /* a newcomer comes in where every member holds at one step start    */ \
  X(hold_bound)           /* nobody holds longer than join_hold_ms, or behind one who has gone */ \
  X(visitor_kept)         /* the page of a life that may be in the next view is not replaced   */ \
  X(old_rounds_first)     /* no round of a former view is run once its newcomer has a place    */ \
  X(mapped_place)         /* nobody holds for one that has not mapped what is kept for it now  */ \
  X(newcomer_once)        /* whoever has come in is no newcomer at the next step start         */ \
  X(members_anew)         /* a newcomer watches the lives that its members lead by now         */ \
  X(beaten_since)         /* nobody accused is kept who has not beaten since                   */ \
  X(silent_go)            /* of two equally small choices the one with more silent ranks goes  */ \
  X(looked_again)         /* nobody goes for an accusation that it had no time to take back    */ \
  X(found_first)          /* an accusation is as old as the turn after the one that finds it   */ \
  X(late_waiters)         /* nobody goes first for a stall that others have yet to miss        */ \
  X(late_promise)         /* a promise excuses nobody from a stall that was missed before it  */  \
  X(stall_awake)          /* whoever did not beat meanwhile did not stall                      */ \
  X(taken_back)           /* whom a view takes back has the whole stall_ms again               */ \
  X(decided_leave)        /* a rank that left as was decided is not accused of it              */ \
  X(frozen_set)           /* what a rank has in a collective is not taken anew in a later view */ \
  X(say_epoch)            /* sets of two epochs are not counted together                       */ \
  X(all_say)              /* nobody returns before all members have said the same set          */ \
  X(quorum_ends)          /* whoever has no quorum waits for nobody in a collective            */ \
  X(same_namespace)       /* no stranger is watched who has a rank's number in another namespace */

enum Guard : u32 {
#define FA2A_GUARD_NAME(name) guard_##name,
  FA2A_GUARDS(FA2A_GUARD_NAME)
#undef FA2A_GUARD_NAME
      num_guards
};

#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS
extern u64 guards_off;  // one bit a guard; lives in csrc/host/hooks.cpp
FA2A_HD bool guarded(Guard guard) { return (guards_off >> guard & 1ull) == 0; }
#elif defined(FA2A_BENCH_UNCHECKED) && FA2A_BENCH_UNCHECKED
// What benchmarks/price.py compares with, in no wheel: only what a round in which nothing goes wrong cannot do without.
// An old word must still be told from a new one, a full slot from a free one within a stream, rows must be there before
// their signal, and a round that took a second view would do more, not less.
FA2A_HD constexpr bool guarded(Guard guard) {
  return guard == guard_round_compare || guard == guard_chunk_compare || guard == guard_chunk_consent ||
         guard == guard_copy_fence || guard == guard_view_once;
}
#else
FA2A_HD constexpr bool guarded(Guard) { return true; }
#endif

// Whether peers and the host thread watch this rank, and it them. The unchecked core has no pulse: it shows nothing,
// reads no clock while it waits, and asks after no suspicion, since nobody could raise one.
#if defined(FA2A_BENCH_UNCHECKED) && FA2A_BENCH_UNCHECKED
constexpr bool kWatched = false;
#else
constexpr bool kWatched = true;
#endif

}  // namespace fa2a
