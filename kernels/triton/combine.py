"""Combine: expert rows go back to their owners, each owner sums what came back and says exactly what did not."""

import triton.language as tl

from fault_a2a.kernels.triton.dispatch import (
    CHOICE_STRIDE,
    CHOICE_WEIGHT,
    HEADER_CHOICES,
    HEADER_NUM_CHOICES,
)
from fault_a2a.kernels.triton.expand import header_of
from fault_a2a.kernels.triton.layout import NUMBERS, constant
from fault_a2a.kernels.triton.numbers import copy_words, float_of, load_elements, store_elements
from fault_a2a.kernels.triton.target import inline, kernel
from fault_a2a.kernels.triton.window import OUT, PRESENT, WAITING
from fault_a2a.kernels.triton.words import (
    ACTIVE,
    ANSWERED,
    ANSWERS,
    COMBINE_COUNT,
    COUNT_MAX,
    COUNT_SHIFT,
    HEARD,
    INBOUND,
    NEWEST,
    NUM_LOST,
    NUM_PARITIES,
    NUM_UNROUTABLE,
    NUM_VIEWS,
    ROUND,
    ROWS_FROM,
    SINCE_NS,
    SUSPECTS,
    TAKEN,
    TICK,
    VIEW_ACTIVE,
    VIEW_ONCE,
    VIEW_STRIDE,
    VIEWS,
    WORD,
    acquire,
    bits_of_ranks,
    cell,
    choices_of,
    counted,
    index_of_row,
    integers,
    lane_word,
    load32,
    load64,
    min_of,
    show,
    store64,
    sum_of,
)

PHASE_COMBINE_SEND = constant(NUMBERS["phase_combine_send"])
NONE, DELIVERED = constant(NUMBERS["outcome_none"]), constant(NUMBERS["outcome_delivered"])
LOST, UNROUTABLE = constant(NUMBERS["outcome_lost"]), constant(NUMBERS["outcome_unroutable"])


@kernel
def open_answers(state, page, outbound, lane, words, is_abandoned, at: tl.constexpr):
    """Who gets its rows back: sources that were taken and are not suspected. Everybody else gets `declined`."""
    rank = integers(at.ranks_block)
    in_group = rank < at.num_ranks
    round_number = load64(lane_word(lane, ROUND))
    show(state, page, outbound, load64(words + 8 * TICK), round_number, round_number * 0 + PHASE_COMBINE_SEND, at)
    active = load64(cell(lane, rank, ACTIVE, at), in_group) == 1
    if VIEW_ONCE & at.guards_off:
        view = state + VIEWS + VIEW_STRIDE * (acquire(state + NEWEST) % NUM_VIEWS)
        active = bits_of_ranks(view + VIEW_ACTIVE, rank, in_group) == 1
        store64(cell(lane, rank, ACTIVE, at), counted(active), in_group)
    taken = load64(cell(lane, rank, TAKEN, at), in_group) == 1
    suspected = bits_of_ranks(state + SUSPECTS, rank, in_group) == 1
    store64(cell(lane, rank, ANSWERED, at), counted(taken & ~suspected & (is_abandoned == 0)), in_group)
    store64(cell(lane, rank, HEARD, at), tl.where(active, rank * 0 + WAITING, OUT), in_group)
    store64(cell(lane, rank, SINCE_NS, at), rank * 0, in_group)


@kernel
def return_rows(y, outbound, lane, at: tl.constexpr):
    """A program a (owner, row): what this rank's experts made of it, to where its owner looks for it."""
    owner = tl.program_id(0).to(tl.int64) // at.num_tokens
    row = tl.program_id(0).to(tl.int64) % at.num_tokens
    is_there = (load64(cell(lane, owner, ANSWERED, at)) == 1) & (row < load64(cell(lane, owner, ROWS_FROM, at)))
    if is_there:
        parity = load64(lane_word(lane, ROUND)) % NUM_PARITIES
        slots = load64(outbound + 8 * owner) + at.combine_rows + at.combine_rows_step * parity
        header = header_of(lane, owner, row, at)
        num = load32(header + HEADER_NUM_CHOICES)
        positions = lane + at.lane_position + 4 * at.max_choices * index_of_row(owner, row, at)
        if at.reduce_at_expert:
            for first in range(0, at.hidden, at.sum_block):
                element = first + integers(at.sum_block)
                inside = element < at.hidden
                total = tl.full([at.sum_block], 0.0, tl.float32)
                for choice in range(num):
                    source = y + at.hidden_bytes * load32(positions + 4 * choice)
                    value = load_elements(source + at.element_bytes * element, inside, at.dtype)
                    weight = float_of(load32(header + HEADER_CHOICES + CHOICE_STRIDE * choice + CHOICE_WEIGHT))
                    if at.weights_at_expert:
                        weight = tl.full([], 1.0, tl.float32)
                    total = total + weight * value
                to = slots + at.combine_stride * row + at.element_bytes * element
                store_elements(to, total, inside, at.dtype)
        else:
            slot = load32(lane + at.lane_first_choice + 4 * index_of_row(owner, row, at))
            for choice in range(num):
                source = y + at.hidden_bytes * load32(positions + 4 * choice)
                to = slots + at.combine_stride * (slot + choice)
                copy_words(to, source, at.hidden_bytes, at.copy_block, is_there)


@kernel
def count_answers(lane, at: tl.constexpr):
    """An answer counts only with as many rows as were asked for."""
    rank = integers(at.ranks_block)
    in_group = rank < at.num_ranks
    heard = load64(cell(lane, rank, HEARD, at), in_group)
    count = (load64(cell(lane, rank, WORD, at), in_group) >> COUNT_SHIFT) & COUNT_MAX
    short = in_group & (heard == PRESENT) & (count != load64(cell(lane, rank, ANSWERS, at), in_group))
    if COMBINE_COUNT & at.guards_off:
        short = rank < 0
    store64(cell(lane, rank, HEARD, at), rank * 0 + OUT, short)
    store64(cell(lane, rank, ANSWERED, at), counted((heard == PRESENT) & ~short), in_group)
    store64(lane_word(lane, NUM_LOST), tl.full([], 0, tl.int64))
    store64(lane_word(lane, NUM_UNROUTABLE), tl.full([], 0, tl.int64))


@inline
def outcome_of(lane, token, at: tl.constexpr):
    """Of each choice of a token: (the rank that holds its expert, its code)."""
    k = integers(at.topk_block)
    inside = k < at.num_topk
    dst = tl.where(inside, load32(choices_of(lane + at.lane_dst, token, at) + 4 * k, inside), -1)
    known = tl.where(dst >= 0, dst, 0)
    active = load64(cell(lane, known, ACTIVE, at)) == 1
    answered = load64(cell(lane, known, ANSWERED, at)) == 1
    code = tl.where(active, tl.where(answered, known * 0 + DELIVERED, LOST), UNROUTABLE)
    return dst, tl.where(dst >= 0, code, NONE)


@kernel
def reduce_rows(out, codes, topk_weights, lane, at: tl.constexpr):
    """A program a token: float32 from +0.0, choices in order, product and sum rounded separately, one rounding last."""
    token = tl.program_id(0).to(tl.int64)
    k = integers(at.topk_block)
    inside = k < at.num_topk
    dst, code = outcome_of(lane, token, at)
    tl.store((codes + token * at.num_topk + k).to(tl.pointer_type(tl.int8)), code.to(tl.int8), mask=inside)
    num_lost = sum_of(counted(inside & (code == LOST)), 0)
    tl.atomic_add(lane_word(lane, NUM_LOST).to(tl.pointer_type(tl.int64)), num_lost, sem="relaxed")
    num_unroutable = sum_of(counted(inside & (code == UNROUTABLE)), 0)
    unroutable_at = lane_word(lane, NUM_UNROUTABLE).to(tl.pointer_type(tl.int64))
    tl.atomic_add(unroutable_at, num_unroutable, sem="relaxed")
    parity = load64(lane_word(lane, ROUND)) % NUM_PARITIES
    answer = load32(choices_of(lane + at.lane_answer, token, at) + 4 * k, inside)
    bits = load32(choices_of(topk_weights, token, at) + 4 * k, inside)
    # reduce="expert": one row a rank, by ascending rank. Each is answered by the row of the first choice it holds.
    first_of_rank = tl.where(code == DELIVERED, dst, at.num_ranks)
    for first in range(0, at.hidden, at.sum_block):
        element = first + integers(at.sum_block)
        in_row = element < at.hidden
        total = tl.full([at.sum_block], 0.0, tl.float32)
        wanted = tl.full([], 0.0, tl.float32)
        given = tl.full([], 0.0, tl.float32)
        last_rank = tl.full([], -1, tl.int64)
        num_missing = tl.full([], 0, tl.int64)
        for choice in range(at.num_topk):
            is_mine = k == choice
            kind = sum_of(tl.where(is_mine, code, 0), 0)
            weight = float_of(sum_of(tl.where(is_mine, bits, 0), 0))
            if kind != NONE:
                wanted = wanted + weight
                if kind == DELIVERED:
                    given = given + weight
                else:
                    num_missing += 1
            is_summed = kind == DELIVERED
            peer = sum_of(tl.where(is_mine, dst, 0), 0)
            row = sum_of(tl.where(is_mine, answer, 0), 0)
            if at.reduce_at_expert:
                peer = min_of(tl.where(first_of_rank > last_rank, first_of_rank, at.num_ranks), 0)
                is_summed = peer < at.num_ranks
                row = min_of(tl.where(first_of_rank == peer, answer, 1 << 40), 0)
                last_rank = peer
            if is_summed:
                window = load64(cell(lane, peer, INBOUND, at)) + at.combine_rows + at.combine_rows_step * parity
                source = window + at.combine_stride * row + at.element_bytes * element
                value = load_elements(source, in_row, at.dtype)
                factor = weight
                if at.reduce_at_expert or at.weights_at_expert:
                    factor = tl.full([], 1.0, tl.float32)
                total = total + factor * value
        if at.renormalize:
            if num_missing > 0:
                scale = tl.div_rn(wanted, given)
                # Nothing that was delivered has any weight: there is nothing to scale up.
                total = tl.where(given == 0.0, tl.full([at.sum_block], 0.0, tl.float32), total * scale)
        store_elements(out + at.hidden_bytes * token + at.element_bytes * element, total, in_row, at.dtype)


@kernel
def tell_lost(lost, lane):
    """One bool: whether any choice was lost."""
    is_lost = counted(load64(lane_word(lane, NUM_LOST)) > 0)
    tl.store(lost.to(tl.pointer_type(tl.int8)), is_lost.to(tl.int8))
