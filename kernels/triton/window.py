"""The one wait of the Triton kernels, and what else is done with the words of a window: the gate, signals, consent.

A wait is a kernel that looks a bounded number of times and says whether it has to be launched again. It never hangs:
whoever is suspected is out, the host's release word ends it, and what a peer is allowed to be late is measured by the
wall clock where the target has one, else by the time that a look took when the rank was constructed.
"""

import triton.language as tl

from fault_a2a.kernels.triton import layout
from fault_a2a.kernels.triton.layout import NUMBERS, constant
from fault_a2a.kernels.triton.target import inline, kernel
from fault_a2a.kernels.triton.words import (
    ACTIVE,
    CHUNK_MAX,
    CHUNK_SHIFT,
    CLOCK_NS,
    DECLINED_SHIFT,
    ENDS_A_WAIT,
    EPOCH,
    EPOCH_COMPARE,
    EPOCH_MAX,
    EPOCH_SHIFT,
    GAP_RESTART,
    HEARD,
    HOLD,
    INBOUND,
    INCARNATION,
    KIND_SHIFT,
    LAST_REST_NS,
    LAST_TICK_NS,
    LATE_NS,
    LATER_DECLINED,
    MAX_LATE_NS,
    MUTUAL_WAIT,
    NEWEST,
    NUM_PARITIES,
    NUM_VIEWS,
    ONE_ANSWER,
    PAGE_SENT,
    PHASE_MAX,
    PHASE_SHIFT,
    PROMISE,
    PROMISE_FENCE,
    RECHECK,
    RELEASE,
    RELEASE_WORD,
    ROUND,
    ROUND_COMPARE,
    ROUND_LIMIT,
    ROUND_MAX,
    ROUND_SHIFT,
    SEEN,
    SEEN_NS,
    SENT_STRIDE,
    SINCE_NS,
    STALL_NS,
    STARTED,
    STATUS,
    SUSPECTS,
    TICK,
    TICK_MAX,
    TICKS,
    TRUSTED,
    VIEW_ACTIVE,
    VIEW_EPOCH,
    VIEW_FIRST_ROUND,
    VIEW_INCARNATIONS,
    VIEW_PARTITIONS,
    VIEW_STRIDE,
    VIEWS,
    WAIT_NS,
    WAITING_PEER,
    WAITING_SINCE,
    WAITING_WORD,
    WORD,
    acquire,
    bits_of_ranks,
    cell,
    counted,
    full_fence,
    integers,
    lane_word,
    load64,
    min_of,
    publish,
    rounds_ahead,
    show,
    signal_word,
    store64,
    sum_of,
)

PHASE_GATE = constant(NUMBERS["phase_gate"])
PHASE_DISPATCH_WAIT = constant(NUMBERS["phase_dispatch_wait"])
PHASE_COMBINE_WAIT = constant(NUMBERS["phase_combine_wait"])
KIND_COMBINE = constant(NUMBERS["kind_combine_signal"])
WAITING, PRESENT, OUT = constant(layout.WAITING), constant(layout.PRESENT), constant(layout.OUT)
DONE, STILL_WAITING, RELEASED = constant(layout.DONE), constant(layout.STILL_WAITING), constant(layout.RELEASED)
# Planted bugs, for the tests that must find them: see docs/protocol.md.
PLANT_UNBOUNDED = constant(1)


@inline
def beginning(words, base_ns, has_ptx: tl.constexpr):
    """Sets this rank's clock, and says what the chip's stood at."""
    publish(words + 8 * CLOCK_NS, base_ns)
    began = base_ns * 0
    if has_ptx:
        began += tl.extra.cuda.globaltimer()
    return began


@inline
def clock(words, base_ns, poll, ns_per_poll, began, has_ptx: tl.constexpr):
    """Nanoseconds of the host's clock, as far as this kernel can tell."""
    now = base_ns + poll * ns_per_poll
    if has_ptx:
        # What it was a look ago, by one thread for all: each has a clock of its own, and branches depend on this.
        passed = base_ns + tl.extra.cuda.globaltimer() - began
        now = tl.atomic_max((words + 8 * CLOCK_NS).to(tl.pointer_type(tl.int64)), passed, sem="relaxed", scope="gpu")
    return now


@inline
def is_open(state, round_number, at: tl.constexpr):
    """The gate: nobody who is active is suspected, and no promise stands in the way. Local loads only."""
    rank = integers(at.ranks_block)
    in_group = rank < at.num_ranks
    limit = acquire(state + ROUND_LIMIT)
    view = state + VIEWS + VIEW_STRIDE * (acquire(state + NEWEST) % NUM_VIEWS)
    active = bits_of_ranks(view + VIEW_ACTIVE, rank, in_group)
    suspects = bits_of_ranks(state + SUSPECTS, rank, in_group)
    held = sum_of(tl.where(in_group, active & suspects, 0), 0)
    if HOLD & at.guards_off:
        held = held * 0
    return is_below(limit, round_number, at) & (held == 0)


@inline
def is_below(limit, round_number, at: tl.constexpr):
    """Whether a promise leaves this round free. No limit is all bits, which is negative here."""
    below = (limit < 0) | (round_number < limit)
    if PROMISE & at.guards_off:
        below = limit == limit
    return below


@inline
def start_round(state, round_number, at: tl.constexpr, has_ptx: tl.constexpr):
    """The kernel's half of a promise. False where one came in between: this round waits for the next view, or runs
    under the old one."""
    if PROMISE_FENCE & at.guards_off:
        # Without the fence a chip may make the load before the store. The interpreter's atomics never trade places, so
        # to leave the fence out would show nothing there.
        limit = acquire(state + ROUND_LIMIT)
        publish(state + STARTED, round_number + 1)
    else:
        publish(state + STARTED, round_number + 1)
        full_fence(has_ptx)
        limit = acquire(state + ROUND_LIMIT)
    return is_below(limit, round_number, at)


@inline
def keep_view(state, inbound, lane, round_number, at: tl.constexpr):
    """The view of this round, once: the decided one with the largest first_round <= round."""
    back = integers(NUM_VIEWS)
    newest = acquire(state + NEWEST)
    index = newest - back
    first = load64(state + VIEWS + VIEW_STRIDE * (index % NUM_VIEWS) + VIEW_FIRST_ROUND, index >= 0)
    fits = (index >= 0) & ((first <= round_number) | (index == 0) | (back == NUM_VIEWS - 1))
    chosen = newest - min_of(tl.where(fits, back, NUM_VIEWS - 1), 0)
    view = state + VIEWS + VIEW_STRIDE * (chosen % NUM_VIEWS)
    rank = integers(at.ranks_block)
    in_group = rank < at.num_ranks
    partition = tl.load((view + VIEW_PARTITIONS + 2 * rank).to(tl.pointer_type(tl.int16)), mask=in_group)
    windows = load64(inbound + 8 * partition.to(tl.int64), in_group)
    incarnation = load64(view + VIEW_INCARNATIONS + 8 * rank, in_group)
    store64(lane_word(lane, ROUND), round_number)
    store64(lane_word(lane, EPOCH), load64(view + VIEW_EPOCH))
    store64(cell(lane, rank, ACTIVE, at), bits_of_ranks(view + VIEW_ACTIVE, rank, in_group), in_group)
    store64(cell(lane, rank, INBOUND, at), windows, in_group)
    # A partition that belongs to another life of the rank is never read.
    trusted = load64(windows + at.header, in_group) == incarnation
    if INCARNATION & at.guards_off:
        trusted = rank >= 0
    store64(cell(lane, rank, TRUSTED, at), counted(trusted), in_group)


@inline
def is_time_to_tick(now, last_tick_ns, tick_ns, at: tl.constexpr):
    is_time = now - last_tick_ns >= tick_ns
    if TICKS & at.guards_off:
        is_time = now < now
    return is_time


@kernel
def pass_gate(
    state, page, outbound, inbound, lane, words, round_number, base_ns, ns_per_poll, tick_ns, num_polls, is_first,
    at: tl.constexpr, HAS_PTX: tl.constexpr,
):  # fmt: skip
    """Waits until the round may begin, publishes that it has, and keeps the view that it uses."""
    zero = tl.full([], 0, tl.int64)
    round_number = zero + round_number  # the number of an early round comes as an int32
    base_ns = zero + base_ns
    began = beginning(words, base_ns, HAS_PTX)
    tick = acquire(words + 8 * TICK)
    last_tick_ns = tl.where(is_first != 0, base_ns, acquire(words + 8 * LAST_TICK_NS))
    status = zero + STILL_WAITING
    poll = zero
    if is_first != 0:
        show(state, page, outbound, tick, round_number, zero + PHASE_GATE, at)
    while (status == STILL_WAITING) & (poll < num_polls):
        if is_open(state, round_number, at):
            if start_round(state, round_number, at, HAS_PTX):
                status = zero + DONE
        if status == STILL_WAITING:
            if RELEASE_WORD & at.guards_off == 0:
                if acquire(state + RELEASE) != 0:
                    status = zero + RELEASED
            now = clock(words, base_ns, poll, ns_per_poll, began, HAS_PTX)
            if is_time_to_tick(now, last_tick_ns, tick_ns, at):
                last_tick_ns = now
                tick += 1
                show(state, page, outbound, tick, round_number, zero + PHASE_GATE, at)
        poll += 1
    if status == DONE:
        keep_view(state, inbound, lane, round_number, at)
    store64(words + 8 * TICK, tick)
    store64(words + 8 * LAST_TICK_NS, last_tick_ns)
    store64(lane_word(lane, STATUS), status)


@inline
def read(word, round_number, epoch, trusted, at: tl.constexpr):
    """What a word says to one who expects (round, epoch): absent, present or declined, as csrc/protocol/signal.hpp."""
    ahead = rounds_ahead(word, round_number)
    if ROUND_COMPARE & at.guards_off:
        ahead = tl.where(ahead < 0, 0, ahead)
    signed_here = ((word >> EPOCH_SHIFT) & EPOCH_MAX) == (epoch & EPOCH_MAX)
    if EPOCH_COMPARE & at.guards_off:
        signed_here = word == word
    whole = signed_here & (((word >> DECLINED_SHIFT) & 1) == 0) & (((word >> CHUNK_SHIFT) & CHUNK_MAX) == 0)
    same = tl.where(whole, PRESENT, OUT)
    reading = tl.where(ahead < 0, WAITING, tl.where(ahead > 0, OUT, same))
    if LATER_DECLINED & at.guards_off:
        reading = tl.where(ahead > 0, WAITING, reading)
    return tl.where(trusted == 1, reading, OUT)


@inline
def excusable(progress, next_round, owed_0, owed_1, at: tl.constexpr):
    """A peer's progress without its tick, where it waits for what I owe: a tick is no excuse before the one waited for.

    I owe the answer of a round that is open here (``owed_*``; -1: none), or a dispatch that I have not begun.
    """
    round_bits = (progress >> ROUND_SHIFT) & ROUND_MAX
    phase = (progress >> PHASE_SHIFT) & PHASE_MAX
    owed = (phase == PHASE_DISPATCH_WAIT) & (round_bits == (next_round & ROUND_MAX))
    answers = ((owed_0 >= 0) & (round_bits == (owed_0 & ROUND_MAX))) | (
        (owed_1 >= 0) & (round_bits == (owed_1 & ROUND_MAX))
    )
    owed = owed | ((phase == PHASE_COMBINE_WAIT) & answers)
    if MUTUAL_WAIT & at.guards_off:
        owed = progress != progress
    return tl.where(owed, progress & ~TICK_MAX, progress)


@inline
def progress_of(lane, waiting, next_round, owed_0, owed_1, at: tl.constexpr):
    """Peers push their progress here, so this reads local memory only."""
    rank = integers(at.ranks_block)
    progress = acquire(load64(cell(lane, rank, INBOUND, at), waiting) + at.progress, waiting)
    return excusable(progress, next_round, owed_0, owed_1, at)


@inline
def suspect(state, stalled, at: tl.constexpr):
    """Kernels only ever add to the suspects; an installed view takes them out."""
    rank = integers(at.ranks_block)
    bits = tl.where(stalled, (rank * 0 + 1) << (rank & 63), 0)
    words = (state + SUSPECTS + 8 * (rank >> 6)).to(tl.pointer_type(tl.int64))
    tl.atomic_or(words, bits, mask=stalled, sem="release", scope="sys")


@kernel
def show_phase(state, page, outbound, lane, words, phase, at: tl.constexpr):
    round_number = load64(lane_word(lane, ROUND))
    show(state, page, outbound, load64(words + 8 * TICK), round_number, round_number * 0 + phase, at)


@kernel
def wait_for_words(
    state, page, outbound, lane, words, base_ns, ns_per_poll, tick_ns, num_polls, is_first, next_round, owed_0, owed_1,
    at: tl.constexpr, SIGNAL: tl.constexpr, SIGNAL_STEP: tl.constexpr, PHASE: tl.constexpr, KIND: tl.constexpr,
    HAS_PTX: tl.constexpr, PLANT: tl.constexpr,
):  # fmt: skip
    """Looks for every active peer's word of this round. ``heard`` says of each what became of it.

    What changes from look to look stays in registers: what one thread stores, the others would see at another time.
    """
    zero = tl.full([], 0, tl.int64)
    base_ns = zero + base_ns
    began = beginning(words, base_ns, HAS_PTX)
    rank = integers(at.ranks_block)
    in_group = rank < at.num_ranks
    round_number = load64(lane_word(lane, ROUND))
    epoch = load64(lane_word(lane, EPOCH))
    trusted = load64(cell(lane, rank, TRUSTED, at), in_group)
    place = load64(cell(lane, rank, INBOUND, at), in_group) + SIGNAL + SIGNAL_STEP * (round_number % NUM_PARITIES)
    heard = tl.where(in_group, load64(cell(lane, rank, HEARD, at), in_group), OUT)
    since_ns = load64(cell(lane, rank, SINCE_NS, at), in_group)
    seen = load64(cell(lane, rank, SEEN, at), in_group)
    seen_ns = load64(cell(lane, rank, SEEN_NS, at), in_group)
    late_ns = load64(cell(lane, rank, LATE_NS, at), in_group)
    max_late_ns = load64(cell(lane, rank, MAX_LATE_NS, at), in_group)
    wait_ns = load64(cell(lane, rank, WAIT_NS, at), in_group)
    timeout_ns = load64(state + STALL_NS + 8 * rank, in_group)
    tick = acquire(words + 8 * TICK)
    last_tick_ns = tl.where(is_first != 0, base_ns, acquire(words + 8 * LAST_TICK_NS))
    last_rest_ns = tl.where(is_first != 0, base_ns, acquire(words + 8 * LAST_REST_NS))
    status = zero + STILL_WAITING
    poll = zero
    if is_first != 0:
        show(state, page, outbound, tick, round_number, zero + PHASE, at)
    while (status == STILL_WAITING) & (poll < num_polls):
        waiting = heard == WAITING
        # In this order: a signal that arrived whole before the suspicion is worth having from anybody.
        suspected = bits_of_ranks(state + SUSPECTS, rank, waiting) == 1
        word = acquire(place, waiting)
        reading = read(word, round_number, epoch, trusted, at)
        if PLANT != PLANT_UNBOUNDED:
            reading = tl.where((reading == WAITING) & suspected, OUT, reading)
        store64(cell(lane, rank, WORD, at), word, waiting & (reading == PRESENT))
        heard = tl.where(waiting, reading, heard)
        waiting = heard == WAITING
        first = min_of(tl.where(waiting, rank, at.num_ranks), 0)
        status = tl.where(first == at.num_ranks, zero + DONE, status)
        now = clock(words, base_ns, poll, ns_per_poll, began, HAS_PTX)
        if status == STILL_WAITING:
            if (PLANT != PLANT_UNBOUNDED) & (RELEASE_WORD & at.guards_off == 0):
                if (acquire(state + RELEASE) & ENDS_A_WAIT) != 0:
                    status = zero + RELEASED
                    waiting = rank < 0
        # Time counts against those whose word is missing, from the moment on when it was looked for first.
        begins, ends = waiting & (since_ns == 0), ~waiting & (since_ns != 0)
        this_late_ns = tl.where(ends, now - since_ns, 0)
        late_ns += this_late_ns
        max_late_ns = tl.where(this_late_ns > max_late_ns, this_late_ns, max_late_ns)
        wait_ns += tl.where(waiting & (rank == first), now - last_rest_ns, 0)
        since_ns = tl.where(begins, now, tl.where(waiting, since_ns, 0))
        store64(state + WAITING_SINCE + 8 * rank, since_ns, in_group & (begins | ends))
        if status == STILL_WAITING:
            store64(state + WAITING_WORD, ((round_number & ROUND_MAX) << ROUND_SHIFT) | ((zero + KIND) << KIND_SHIFT))
            store64(state + WAITING_PEER, first + 1)
            progress = progress_of(lane, waiting, next_round, owed_0, owed_1, at)
            # "slept": I was the one that did, and cannot tell.
            slept = now - last_rest_ns > (timeout_ns >> 2)
            if GAP_RESTART & at.guards_off:
                slept = rank < 0
            seen_ns = tl.where(begins | slept | (progress != seen), now, seen_ns)
            seen = tl.where(waiting, progress, seen)
            suspect(state, waiting & (now - seen_ns >= timeout_ns), at)
            if is_time_to_tick(now, last_tick_ns, tick_ns, at):
                last_tick_ns = now
                tick += 1
                show(state, page, outbound, tick, round_number, zero + PHASE, at)
        else:
            store64(state + WAITING_PEER, zero)
        last_rest_ns = now
        poll += 1
    store64(cell(lane, rank, HEARD, at), heard, in_group)
    store64(cell(lane, rank, SINCE_NS, at), since_ns, in_group)
    store64(cell(lane, rank, SEEN, at), seen, in_group)
    store64(cell(lane, rank, SEEN_NS, at), seen_ns, in_group)
    store64(cell(lane, rank, LATE_NS, at), late_ns, in_group)
    store64(cell(lane, rank, MAX_LATE_NS, at), max_late_ns, in_group)
    store64(cell(lane, rank, WAIT_NS, at), wait_ns, in_group)
    store64(words + 8 * TICK, tick)
    store64(words + 8 * LAST_TICK_NS, last_tick_ns)
    store64(words + 8 * LAST_REST_NS, last_rest_ns)
    store64(lane_word(lane, STATUS), status)


@kernel
def signal(
    page, outbound, lane, first_step, last_step,
    at: tl.constexpr, OPENS: tl.constexpr, COUNTS: tl.constexpr, SIGNAL: tl.constexpr, SIGNAL_STEP: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Tells every active peer, zero rows included. Peers by their distance from this rank, from first to last step.

    In a kernel of its own, behind the one that stores the rows: what that stored is ordered before this release.
    """
    rank = integers(at.ranks_block)
    step = (rank - at.rank - 1 + at.num_ranks) % at.num_ranks + 1
    owed = (rank < at.num_ranks) & (step >= first_step) & (step <= last_step)
    owed = owed & (load64(cell(lane, rank, ACTIVE, at), owed) == 1)
    round_number = load64(lane_word(lane, ROUND))
    parity = round_number % NUM_PARITIES
    opened = load64(cell(lane, rank, OPENS, at), owed)
    if (KIND == KIND_COMBINE) & (ONE_ANSWER & at.guards_off != 0):
        owed = owed & (opened == 1)
    count = load64(cell(lane, rank, COUNTS, at), owed)
    word = signal_word(round_number, load64(lane_word(lane, EPOCH)), count, opened == 0)
    publish(load64(outbound + 8 * rank, owed) + SIGNAL + SIGNAL_STEP * parity, word, owed)
    publish(page + PAGE_SENT + SENT_STRIDE * rank + 8 * (KIND * NUM_PARITIES + parity), word, owed)


@kernel
def refuse(
    page, outbound, lane, at: tl.constexpr, KEPT: tl.constexpr, TAKEN_AT: tl.constexpr, TAKEN_STEP: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Tells active peers whose rows are not taken (``KEPT`` is 0) that nothing more of theirs is read."""
    rank = integers(at.ranks_block)
    in_group = rank < at.num_ranks
    active = in_group & (load64(cell(lane, rank, ACTIVE, at), in_group) == 1)
    refused = active & (load64(cell(lane, rank, KEPT, at), active) == 0)
    round_number = load64(lane_word(lane, ROUND))
    parity = round_number % NUM_PARITIES
    word = signal_word(round_number, load64(lane_word(lane, EPOCH)), rank * 0, rank >= 0)
    publish(load64(outbound + 8 * rank, refused) + TAKEN_AT + TAKEN_STEP * parity, word, refused)
    publish(page + PAGE_SENT + SENT_STRIDE * rank + 8 * (KIND * NUM_PARITIES + parity), word, refused)


@kernel
def recheck(lane, at: tl.constexpr, KEPT: tl.constexpr, SIGNAL: tl.constexpr, SIGNAL_STEP: tl.constexpr):
    """Takes back whoever's word changed while its rows were read: it wrote without consent. Says how many."""
    rank = integers(at.ranks_block)
    in_group = rank < at.num_ranks
    kept = load64(cell(lane, rank, KEPT, at), in_group)
    is_kept = in_group & (kept == 1)
    place = SIGNAL + SIGNAL_STEP * (load64(lane_word(lane, ROUND)) % NUM_PARITIES)
    word = acquire(load64(cell(lane, rank, INBOUND, at), is_kept) + place, is_kept)
    torn = is_kept & (word != load64(cell(lane, rank, WORD, at), is_kept))
    if RECHECK & at.guards_off:
        torn = rank < 0
    store64(cell(lane, rank, HEARD, at), rank * 0 + OUT, torn)
    store64(cell(lane, rank, KEPT, at), rank * 0, torn)
    store64(lane_word(lane, STATUS), sum_of(counted(torn), 0))
