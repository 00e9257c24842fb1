// Slot reuse with a late writer, for Spin: one slot, its reader, and a writer that may be stopped, die and be replaced.
//
// Rounds 1..ROUNDS are those that share the slot. A row is two halves, stored one by one, then the word that publishes
// them; all of it is under way for as long as it likes, in its order, also when its writer is dead or replaced. The reader
// copies half by half. Whatever it takes must be one row of that round, of the incarnation that its view names.
//
// Planted bugs, each of which must break the assertion:
//   NO_CONSENT      the writer stores without the reader's word about the round before
//   LIFTED_CONSENT  a new view gives consent back together with trust
//   SAME_PARTITION  the replacement stores where the one before it did
//   NO_COMPARE      the reader takes whatever word it finds
//   NOTHING_TAKEN   no bug of the protocol: the model takes rows at all, or its assertion would mean nothing

#ifndef ROUNDS
#define ROUNDS 3
#endif
#define ROW(incarnation, round) ((incarnation) * 8 + (round))

mtype = { FIRST_HALF, SECOND_HALF, SIGNAL, DECLINED };
chan wire[2] = [4] of { mtype, byte };  // by incarnation: what it has under way

byte partition_of[2] = { 0, 0 };        // where each incarnation stores
byte first_half[2], second_half[2];     // by partition
byte word_round[2];
bool word_declined[2];

byte answered[2];                       // consent: the newest round that the reader is done with, by incarnation
byte incarnation_of_view = 0;           // the newest view's
byte first_round_of_view = 1;
bool replaced = false;
byte reader_round = 0;                  // begun

// Stores land one by one, at any time.
active [2] proctype Wire() {
  byte value;
end:
  do
  :: wire[_pid]?FIRST_HALF(value) -> first_half[partition_of[_pid]] = value
  :: wire[_pid]?SECOND_HALF(value) -> second_half[partition_of[_pid]] = value
  :: wire[_pid]?SIGNAL(value) -> d_step { word_round[partition_of[_pid]] = value; word_declined[partition_of[_pid]] = false }
  :: wire[_pid]?DECLINED(value) -> d_step { word_round[partition_of[_pid]] = value; word_declined[partition_of[_pid]] = true }
  od
}

proctype Writer(byte me; byte round) {
  do
  :: round > ROUNDS -> break
  :: round <= ROUNDS ->
    if
#ifdef NO_CONSENT
    :: true ->
#else
    :: answered[me] >= round - 1 ->
#endif
      wire[me]!FIRST_HALF(ROW(me, round));
      wire[me]!SECOND_HALF(ROW(me, round));
      wire[me]!SIGNAL(round)
    :: answered[me] < round - 1 -> wire[me]!DECLINED(round)  // suspects the reader: no rows, but the word it owes
    fi;
    round++
  :: true -> break  // dies, or is stopped for good
  od
}

// Lifts suspicions at any time; once, the writer is replaced, dead or not.
active proctype Membership() {
  do
#ifdef LIFTED_CONSENT
  :: answered[0] < ROUNDS -> answered[0] = ROUNDS
#endif
  :: !replaced ->
    d_step {
      replaced = true;
#ifndef SAME_PARTITION
      partition_of[1] = 1;
#endif
      first_round_of_view = reader_round + 1;  // after everything that has begun
      answered[1] = reader_round;
      word_round[partition_of[1]] = reader_round;  // fresh: a declined word of the round before
      word_declined[partition_of[1]] = true;
      incarnation_of_view = 1
    }
    run Writer(1, first_round_of_view)
  :: true -> break
  od
}

active proctype Reader() {
  byte round = 1, me, where, first, second;
  do
  :: round > ROUNDS -> break
  :: round <= ROUNDS ->
    d_step {  // a round keeps the view that it began with
      reader_round = round;
      me = (round >= first_round_of_view -> incarnation_of_view : 0);
      where = partition_of[me]
    }
    if
#ifdef NO_COMPARE
    :: true ->
#else
    :: word_round[where] == round && !word_declined[where] ->
#endif
      first = first_half[where];
      second = second_half[where];
#ifdef NOTHING_TAKEN
      assert(false)
#else
      assert(first == ROW(me, round) && second == ROW(me, round))
#endif
    :: word_round[where] > round || word_declined[where] -> skip
    :: true -> skip  // suspects the writer: waits no more
    fi;
    answered[me] = round;
    round++
  od
}

init { run Writer(0, 1) }
