"""The words of a rank, its peers and its lanes, as Triton reads and publishes them. Nothing here waits."""

import triton.language as tl

from fault_a2a.kernels.triton.layout import (
    COLUMNS,
    FIELDS,
    GUARDS,
    LANE_WORDS,
    NUMBERS,
    OFFSETS,
    RANK_WORDS,
    constant,
)
from fault_a2a.kernels.triton.target import inline

sum_of, max_of, min_of, running_sum = inline(tl.sum), inline(tl.max), inline(tl.min), inline(tl.cumsum)

_SHIFTS = {name: shift for name, (shift, _) in FIELDS.items()}
_LARGEST = {name: (1 << bits) - 1 for name, (_, bits) in FIELDS.items()}
ROUND_SHIFT, ROUND_MAX = constant(_SHIFTS["round"]), constant(_LARGEST["round"])
ROUND_HALF = constant((_LARGEST["round"] + 1) // 2)
EPOCH_SHIFT, EPOCH_MAX = constant(_SHIFTS["epoch"]), constant(_LARGEST["epoch"])
COUNT_SHIFT, COUNT_MAX = constant(_SHIFTS["count"]), constant(_LARGEST["count"])
CHUNK_SHIFT, CHUNK_MAX = constant(_SHIFTS["chunk"]), constant(_LARGEST["chunk"])
LAST_BIT, DECLINED_BIT = constant(1 << _SHIFTS["last"]), constant(1 << _SHIFTS["declined"])
DECLINED_SHIFT, KIND_SHIFT = constant(_SHIFTS["declined"]), constant(_SHIFTS["attempt"])
PHASE_SHIFT, PHASE_MAX = constant(_SHIFTS["phase"]), constant(_LARGEST["phase"])
TICK_MAX = constant(_LARGEST["tick"])

# Of the rank's own words, a view, a control page.
STARTED, ROUND_LIMIT = constant(OFFSETS["started"]), constant(OFFSETS["round_limit"])
SUSPECTS, RELEASE = constant(OFFSETS["suspects"]), constant(OFFSETS["release"])
NEWEST, VIEWS, VIEW_STRIDE = constant(OFFSETS["newest"]), constant(OFFSETS["views"]), constant(OFFSETS["view_stride"])
VIEW_EPOCH, VIEW_FIRST_ROUND = constant(OFFSETS["view_epoch"]), constant(OFFSETS["view_first_round"])
VIEW_ACTIVE, VIEW_INCARNATIONS = constant(OFFSETS["view_active"]), constant(OFFSETS["view_incarnations"])
VIEW_PARTITIONS, NUM_VIEWS = constant(OFFSETS["view_partitions"]), constant(NUMBERS["num_views"])
WAITING_SINCE, STALL_NS = constant(OFFSETS["waiting_since_ns"]), constant(OFFSETS["stall_ns"])
WAITING_PEER, WAITING_WORD = constant(OFFSETS["waiting_peer"]), constant(OFFSETS["waiting_word"])
PAGE_PROGRESS, PAGE_SENT = constant(OFFSETS["page_progress"]), constant(OFFSETS["page_sent"])
SENT_STRIDE, NUM_PARITIES = constant(OFFSETS["sent_stride"]), constant(NUMBERS["num_parities"])
ENDS_A_WAIT = constant(NUMBERS["release_evicted"] | NUMBERS["release_closing"])

_columns, _lane_words = (tuple(map(constant, range(len(names)))) for names in (COLUMNS, LANE_WORDS))
ACTIVE, TRUSTED, INBOUND, OPENED, ROWS_TO, ANSWERS, HEARD, WORD, BAD, ROWS_FROM = _columns[:10]
CHOICES_FROM, TAKEN, ANSWERED, SEEN, SEEN_NS, SINCE_NS, LATE_NS, MAX_LATE_NS, WAIT_NS = _columns[10:]
STATUS, ROUND, EPOCH, TOKEN, CHOICE, VALUE, NUM_RECEIVED, NUM_LOST, NUM_UNROUTABLE = _lane_words
NUM_LANE_WORDS = constant(len(LANE_WORDS))
TICK, LAST_TICK_NS, LAST_REST_NS, CLOCK_NS = map(constant, range(len(RANK_WORDS)))

# A guard is out where `NAME & at.guards_off` is not 0. These can be; tests/test_triton_plants.py takes each one out.
SWITCHES = (
    "view_once", "clamp_count", "check_index", "claims_met", "round_compare", "epoch_compare", "combine_count",
    "consent", "recheck", "hold", "promise", "promise_fence", "later_declined", "mutual_wait", "one_answer",
    "third_round", "tick", "gap_restart", "incarnation", "release_word",
)  # fmt: skip
_switches = tuple(constant(GUARDS[name]) for name in SWITCHES)
VIEW_ONCE, CLAMP_COUNT, CHECK_INDEX, CLAIMS_MET, ROUND_COMPARE, EPOCH_COMPARE, COMBINE_COUNT = _switches[:7]
CONSENT, RECHECK, HOLD, PROMISE, PROMISE_FENCE, LATER_DECLINED, MUTUAL_WAIT, ONE_ANSWER = _switches[7:15]
THIRD_ROUND, TICKS, GAP_RESTART, INCARNATION, RELEASE_WORD = _switches[15:]


# --- addresses are int64, so that a window is a number in a table; memory of this rank's own


@inline
def load64(address, mask=None):
    return tl.load(address.to(tl.pointer_type(tl.int64)), mask=mask)


@inline
def store64(address, value, mask=None):
    tl.store(address.to(tl.pointer_type(tl.int64)), value, mask=mask)


@inline
def load32(address, mask=None):
    """As an int64: the interpreter takes an int32 that overflows for a bug, and checks every sum for it."""
    return tl.load(address.to(tl.pointer_type(tl.int32)), mask=mask).to(tl.int64)


@inline
def store32(address, value, mask=None):
    tl.store(address.to(tl.pointer_type(tl.int32)), value.to(tl.int32), mask=mask)


@inline
def integers(count: tl.constexpr):
    return tl.arange(0, count).to(tl.int64)


@inline
def counted(condition):
    return condition.to(tl.int64)


# --- words that others store, or read


@inline
def acquire(address, mask=None):
    """A load with acquire at system scope. Triton has no such load, so it is an atomic that changes nothing.

    One thread executes it and all threads of the program get its result, so branches may depend on it. A plain load is
    made by each thread: of a word that changes meanwhile they would see different values, and part ways.
    """
    return tl.atomic_or(address.to(tl.pointer_type(tl.int64)), 0, mask=mask, sem="acquire", scope="sys")


@inline
def publish(address, value, mask=None):
    """A store with release at system scope, by the same way."""
    tl.atomic_xchg(address.to(tl.pointer_type(tl.int64)), value, mask=mask, sem="release", scope="sys")


@inline
def full_fence(has_ptx: tl.constexpr):
    """Between a store and the load behind it, of another word. On x86 the atomics around it are as good."""
    if has_ptx:
        tl.inline_asm_elementwise("fence.sc.sys; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@inline
def bits_of_ranks(address, rank, mask):
    """Which ranks a set of them holds, 0 or 1 each. The set is somebody else's to change."""
    return (acquire(address + 8 * (rank >> 6), mask) >> (rank & 63)) & 1


@inline
def rounds_ahead(word, round_number):
    """As csrc/protocol/signal.hpp has it: serial-number arithmetic on the bits that a word keeps of a round."""
    distance = ((word >> ROUND_SHIFT) - round_number) & ROUND_MAX
    return tl.where(distance < ROUND_HALF, distance, distance - 2 * ROUND_HALF)


@inline
def signal_word(round_number, epoch, count, is_declined):
    """Of a batch that is one chunk."""
    numbers = ((round_number & ROUND_MAX) << ROUND_SHIFT) | ((epoch & EPOCH_MAX) << EPOCH_SHIFT)
    return numbers | tl.where(is_declined, count * 0 + DECLINED_BIT, count << COUNT_SHIFT) | LAST_BIT


# --- what a lane knows


@inline
def lane_word(lane, which: tl.constexpr):
    return lane + 8 * which


@inline
def cell(lane, rank, column: tl.constexpr, at: tl.constexpr):
    """The address of what a lane knows of a peer, or of each of several."""
    return lane + 8 * NUM_LANE_WORDS + 8 * (rank + column * at.ranks_block)


@inline
def choices_of(lane, token, at: tl.constexpr):
    """From the beginning of a lane's array [num_tokens, num_topk]: of a token, or of each of several."""
    return lane + 4 * at.num_topk * token


@inline
def index_of_row(src, row, at: tl.constexpr):
    return src * at.num_tokens + row


# --- what a rank shows of itself


@inline
def show(state, page, outbound, tick, round_number, phase, at: tl.constexpr):
    """This rank's progress, to its own host thread and to every active peer."""
    rank = integers(at.ranks_block)
    in_group = rank < at.num_ranks
    value = ((round_number & ROUND_MAX) << ROUND_SHIFT) | (phase << PHASE_SHIFT) | (tick & TICK_MAX)
    publish(page + PAGE_PROGRESS, value)
    view = state + VIEWS + VIEW_STRIDE * (acquire(state + NEWEST) % NUM_VIEWS)
    active = bits_of_ranks(view + VIEW_ACTIVE, rank, in_group) == 1
    windows = load64(outbound + 8 * rank, in_group)
    publish(windows + at.progress, rank * 0 + value, in_group & active)
