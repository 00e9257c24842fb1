/* Agreement of three members on one view, by the rules of docs/membership.md: Spin walks every schedule of it.

   Each rank is acceptor and proposer in one thread. Its record stands in two copies and one bit that says which counts;
   it may die between any two steps, the two halves of a publication included. Proposers read the others' records one by
   one, at any time. Rank 2 only votes, so two proposers meet in every way; crashes are bounded by MOST_CRASHES.

   Planted bugs, each of which must be found: IGNORE_RECORDS, READ_AT_PREPARE_ONLY, ANSWER_BEFORE_RECORD.
   NOBODY_DECIDES claims that no decision is ever reached: it must fail, or the model is empty. */

#define N 3
#ifndef MOST_CRASHES
#define MOST_CRASHES 2
#endif
#define BALLOT(number, rank) ((number) * N + (rank) + 1)
#define PREPARE 1
#define ACCEPT 2

/* On the pages: [2 * rank + copy]. They outlive their rank. */
byte promised[2 * N], accepted_at[2 * N], accepted[2 * N];
bit copy_of[N];
byte ask_ballot[N], ask_phase[N], ask_value[N];
bool dead[N];
byte num_crashes, decided; /* decided: 1 + rank whose proposal it is */

/* Used within one step only. */
hidden byte q, num_counted, num_yes, lowest, has_lowest, best, best_value, highest, at_promised, at_accepted, at_value;

#define AT(rank) (2 * (rank) + copy_of[rank])

/* The first half of a publication, in the step that made the record; the second is a step of its own. */
#ifdef ANSWER_BEFORE_RECORD
#define FIRST_HALF copy_of[me] = 1 - copy_of[me]
#define SECOND_HALF(at) promised[at] = own_promised; accepted_at[at] = own_accepted_at; accepted[at] = own_accepted
#else
#define FIRST_HALF \
  promised[2 * me + 1 - copy_of[me]] = own_promised; \
  accepted_at[2 * me + 1 - copy_of[me]] = own_accepted_at; \
  accepted[2 * me + 1 - copy_of[me]] = own_accepted
#define SECOND_HALF(at) copy_of[me] = 1 - copy_of[me]
#endif

/* Is the dead `q` taken out of the count? */
#ifdef IGNORE_RECORDS
#define DISCOUNTED(q) (knows_dead[q])
#else
#ifdef READ_AT_PREPARE_ONLY
#define DISCOUNTED(q) (knows_dead[q] && (ask_phase[me] == ACCEPT || read_promised[q] <= ask_ballot[me]))
#else
#define DISCOUNTED(q) (knows_dead[q] && read_promised[q] <= ask_ballot[me])
#endif
#endif

inline count_votes() {
  num_counted = 0; num_yes = 0; lowest = N; has_lowest = 0; best = 0; best_value = 0; highest = 0;
  q = 0;
  do
  :: q < N ->
     if
     :: q == me -> at_promised = promised[AT(me)]; at_accepted = accepted_at[AT(me)]; at_value = accepted[AT(me)]
     :: else -> at_promised = read_promised[q]; at_accepted = read_accepted_at[q]; at_value = read_accepted[q]
     fi;
     if :: at_promised > highest -> highest = at_promised :: else fi;
     if :: at_accepted > best -> best = at_accepted; best_value = at_value :: else fi;
     if
     :: DISCOUNTED(q)
     :: else ->
        num_counted++;
        if :: lowest == N -> lowest = q :: else fi;
        if
        :: (ask_phase[me] == PREPARE && at_promised == ask_ballot[me]) ||
           (ask_phase[me] == ACCEPT && at_accepted == ask_ballot[me]) ->
           num_yes++;
           if :: q == lowest -> has_lowest = 1 :: else fi
        :: else
        fi
     fi;
     q++
  :: else -> break
  od
}

#define IS_QUORUM (2 * num_yes > num_counted || (2 * num_yes == num_counted && has_lowest == 1))

#define WOULD_VOTE(peer) \
  ((ask_phase[peer] == PREPARE && ask_ballot[peer] > own_promised) || \
   (ask_phase[peer] == ACCEPT && ask_ballot[peer] >= own_promised && ask_ballot[peer] != own_accepted_at))

#define HAS_NEWS(peer) \
  (read_promised[peer] != promised[AT(peer)] || read_accepted_at[peer] != accepted_at[AT(peer)] || \
   read_accepted[peer] != accepted[AT(peer)] || knows_dead[peer] != dead[peer])

inline vote(peer) {
  own_promised = ask_ballot[peer];
  if
  :: ask_phase[peer] == ACCEPT -> own_accepted_at = ask_ballot[peer]; own_accepted = ask_value[peer]
  :: else
  fi;
  FIRST_HALF;
  storing = true
}

/* The proof of a death, and then the record: frozen, so both are one step. */
inline read(peer) {
  read_promised[peer] = promised[AT(peer)];
  read_accepted_at[peer] = accepted_at[AT(peer)];
  read_accepted[peer] = accepted[AT(peer)];
  knows_dead[peer] = dead[peer]
}

proctype rank(byte me; byte num_ballots) {
  byte own_promised, own_accepted_at, own_accepted; /* what the page says once it is stored */
  byte read_promised[N], read_accepted_at[N], read_accepted[N];
  bool knows_dead[N];
  bool storing, closed, asking; /* a request stays on the page when its rank no longer counts for it */
  byte num_begun;

end: /* a rank may rest for ever */
  do
  :: d_step { !dead[me] && storing -> SECOND_HALF(AT(me)); storing = false }
  :: d_step { !dead[me] && !storing && !closed && !asking && num_begun < num_ballots ->
       num_begun++;
       ask_ballot[me] = BALLOT(own_promised / N + 1, me);
       ask_phase[me] = PREPARE;
       asking = true;
       q = 0;
       do
       :: q < N -> read_promised[q] = 0; read_accepted_at[q] = 0; read_accepted[q] = 0; knows_dead[q] = false; q++
       :: else -> break
       od;
       own_promised = ask_ballot[me];
       FIRST_HALF;
       storing = true
     }
#define STEPS_WITH(peer) \
  :: d_step { !dead[me] && !storing && !closed && WOULD_VOTE(peer) -> vote(peer) } \
  :: d_step { !dead[me] && !storing && !closed && asking && peer != me && HAS_NEWS(peer) -> read(peer) }
  STEPS_WITH(0)
  STEPS_WITH(1)
  STEPS_WITH(2)
  :: atomic { !dead[me] && !storing && !closed && asking ->
       count_votes();
       if
       :: IS_QUORUM && ask_phase[me] == PREPARE ->
          ask_value[me] = (best > 0 -> best_value : me + 1);
          ask_phase[me] = ACCEPT
       :: IS_QUORUM && ask_phase[me] == ACCEPT ->
          assert(decided == 0 || decided == ask_value[me]);
          decided = ask_value[me];
          closed = true; /* its record moves on to the next epoch: it is no vote in this one any more */
          asking = false
#ifdef NOBODY_DECIDES
          ; assert(false)
#endif
       :: !IS_QUORUM && highest > ask_ballot[me] -> asking = false
       :: else
       fi
     }
  :: d_step { !dead[me] && num_crashes < MOST_CRASHES -> num_crashes++; dead[me] = true }; break
  od
}

init {
  atomic { run rank(0, 1); run rank(1, 1); run rank(2, 0) }
}
