"""Dispatch, the half that receives: each source's numbers are checked in a copy, then its rows are put expert-major.

All or nothing for each source: whatever is wrong with one row takes it out whole. A peer's number never bounds a loop,
and its index never addresses memory, before it was checked.
"""

import triton.language as tl

from fault_a2a.kernels.triton.dispatch import (
    CHOICE_EXPERT,
    CHOICE_K,
    CHOICE_STRIDE,
    CHOICE_WEIGHT,
    HEADER_CHOICES,
    HEADER_NUM_CHOICES,
    HEADER_TOKEN,
)
from fault_a2a.kernels.triton.numbers import copy_bytes, copy_words
from fault_a2a.kernels.triton.target import inline, kernel
from fault_a2a.kernels.triton.window import PRESENT
from fault_a2a.kernels.triton.words import (
    BAD,
    CHECK_INDEX,
    CHOICES_FROM,
    CLAIMS_MET,
    CLAMP_COUNT,
    COUNT_MAX,
    COUNT_SHIFT,
    HEARD,
    INBOUND,
    NUM_PARITIES,
    NUM_RECEIVED,
    ROUND,
    ROWS_FROM,
    TAKEN,
    WORD,
    cell,
    counted,
    index_of_row,
    integers,
    lane_word,
    load32,
    load64,
    running_sum,
    store32,
    store64,
    sum_of,
)


@inline
def header_of(lane, src, row, at: tl.constexpr):
    return lane + at.lane_headers + at.header_stride * index_of_row(src, row, at)


@kernel
def take_headers(lane, at: tl.constexpr):
    """A program a source: its claims and row headers out of the window. They are checked in the copy: a peer that lies
    could change the original after the check."""
    src = tl.program_id(0).to(tl.int64)
    zero = tl.full([], 0, tl.int64)
    parity = load64(lane_word(lane, ROUND)) % NUM_PARITIES
    window = load64(cell(lane, src, INBOUND, at))
    count = (load64(cell(lane, src, WORD, at)) >> COUNT_SHIFT) & COUNT_MAX
    is_present = load64(cell(lane, src, HEARD, at)) == PRESENT
    num_wrong, total = zero, zero
    if is_present:
        if CLAMP_COUNT & at.guards_off == 0:
            if count > at.num_tokens:
                num_wrong += 1
                count = zero
        for first in range(0, at.num_local_experts, at.experts_block):
            local = first + integers(at.experts_block)
            inside = local < at.num_local_experts
            claim = load32(window + at.claims + at.claims_step * parity + 4 * local, inside)
            store32(lane + at.lane_claims + 4 * (src * at.max_local_experts + local), claim, inside)
            if CLAMP_COUNT & at.guards_off == 0:
                num_wrong += sum_of(counted(inside & ((claim < 0) | (claim > at.num_tokens))), 0)
            total += sum_of(tl.where(inside, claim, 0), 0)
        if CLAMP_COUNT & at.guards_off == 0:
            num_wrong += counted(total > at.num_tokens * at.max_choices)
        num_choices = zero
        for first_row in range(0, count, at.tokens_block):
            row = first_row + integers(at.tokens_block)
            there = row < count
            header = window + at.row_headers + at.row_headers_step * parity + at.header_stride * row
            num = tl.where(there, load32(header + HEADER_NUM_CHOICES, there), 0)
            fits = (num >= 1) & (num <= at.max_choices)
            num_wrong += sum_of(counted(there & ~fits), 0)
            num = tl.where(fits, num, 0)
            copy = header_of(lane, src, row, at)
            store32(copy + HEADER_TOKEN, load32(header + HEADER_TOKEN, there), there)
            store32(copy + HEADER_NUM_CHOICES, num, there)
            before = num_choices + running_sum(num, 0) - num
            store32(lane + at.lane_first_choice + 4 * index_of_row(src, row, at), before, there)
            num_choices += sum_of(num, 0)
            choice = integers(at.choices_block)[None, :]
            given = there[:, None] & (choice < num[:, None])
            offset = HEADER_CHOICES + CHOICE_STRIDE * choice
            expert = load32(header[:, None] + offset + CHOICE_EXPERT, given)
            k = load32(header[:, None] + offset + CHOICE_K, given)
            in_range = (expert >= 0) & (expert < at.num_local_experts) & (k >= 0) & (k < at.num_topk)
            if CHECK_INDEX & at.guards_off == 0:
                num_wrong += sum_of(sum_of(counted(given & ~in_range), 1), 0)
            store32(copy[:, None] + offset + CHOICE_EXPERT, expert, given)
            store32(copy[:, None] + offset + CHOICE_K, k, given)
            store32(
                copy[:, None] + offset + CHOICE_WEIGHT, load32(header[:, None] + offset + CHOICE_WEIGHT, given), given
            )
        store64(cell(lane, src, CHOICES_FROM, at), num_choices)
        store64(cell(lane, src, ROWS_FROM, at), count)
    else:
        store64(cell(lane, src, CHOICES_FROM, at), zero)
        store64(cell(lane, src, ROWS_FROM, at), zero)
    store64(cell(lane, src, BAD, at), num_wrong)


@kernel
def rank_rows(lane, at: tl.constexpr):
    """A program a (source, block of local experts): how many of the source's earlier rows each row stands behind."""
    num_blocks: tl.constexpr = (at.num_local_experts + at.experts_block - 1) // at.experts_block
    src = tl.program_id(0).to(tl.int64) // num_blocks
    local = (tl.program_id(0).to(tl.int64) % num_blocks) * at.experts_block + integers(at.experts_block)
    num_rows = load64(cell(lane, src, ROWS_FROM, at))
    num_here = local * 0
    num_twice = local * 0
    for first_row in range(0, num_rows, at.tokens_block):
        row = first_row + integers(at.tokens_block)
        header = header_of(lane, src, row, at)
        num = tl.where(row < num_rows, load32(header + HEADER_NUM_CHOICES, row < num_rows), 0)
        times = row[:, None] * 0 + local[None, :] * 0
        for choice in range(at.max_choices):
            given = choice < num
            expert = load32(header + HEADER_CHOICES + CHOICE_STRIDE * choice + CHOICE_EXPERT, given)
            times += counted(given[:, None] & (expert[:, None] == local[None, :]))
        has_row = tl.where(times > 0, times * 0 + 1, 0)
        # The same expert twice in a row would be two rows of one token there.
        num_twice += sum_of(counted(times > 1), 0)
        place = num_here[None, :] + running_sum(has_row, 0) - has_row
        for choice in range(at.max_choices):
            given = choice < num
            expert = load32(header + HEADER_CHOICES + CHOICE_STRIDE * choice + CHOICE_EXPERT, given)
            mine = given[:, None] & (expert[:, None] == local[None, :])
            to = lane + at.lane_place + 4 * (index_of_row(src, row, at) * at.max_choices + choice)
            store32(to, sum_of(tl.where(mine, place, 0), 1), sum_of(counted(mine), 1) > 0)
        num_here += sum_of(has_row, 0)
    inside = local < at.num_local_experts
    claim = load32(lane + at.lane_claims + 4 * (src * at.max_local_experts + local), inside)
    wrong = num_twice != 0
    if CHECK_INDEX & at.guards_off:
        wrong = num_twice < 0
    if CLAIMS_MET & at.guards_off == 0:
        wrong = wrong | (num_here != claim)
    num_wrong = sum_of(counted(inside & wrong), 0)
    if (load64(cell(lane, src, HEARD, at)) == PRESENT) & (num_wrong != 0):
        tl.atomic_add(cell(lane, src, BAD, at).to(tl.pointer_type(tl.int64)), num_wrong, sem="relaxed")


@kernel
def assign_places(num_tokens, offsets, lane, at: tl.constexpr):
    """Who is taken, and where: experts in order, within one by source rank, within that by the source's tokens."""
    rank = integers(at.ranks_block)
    in_group = rank < at.num_ranks
    heard = load64(cell(lane, rank, HEARD, at), in_group)
    taken = in_group & (heard == PRESENT) & (load64(cell(lane, rank, BAD, at), in_group) == 0)
    store64(cell(lane, rank, TAKEN, at), counted(taken), in_group)
    end = tl.full([], 0, tl.int64)
    store32(offsets, end)
    for first in range(0, at.num_local_experts, at.experts_block):
        local = first + integers(at.experts_block)
        inside = local < at.num_local_experts
        index = 4 * (rank[:, None] * at.max_local_experts + local[None, :])
        counts = inside[None, :] & taken[:, None]
        rows = tl.where(counts, load32(lane + at.lane_claims + index, counts), 0)
        total = sum_of(rows, 0)
        begin = end + running_sum(total, 0) - total
        base = begin if at.packed else local * at.capacity
        within = running_sum(rows, 0) - rows
        store32(lane + at.lane_first + index, base[None, :] + within, counts)
        store32(num_tokens + 4 * local, total, inside)
        store32(offsets + 4 * local + 4, begin + total, inside)
        end += sum_of(total, 0)
    store64(lane_word(lane, NUM_RECEIVED), end)


@kernel
def copy_rows(
    recv_x, recv_scales, recv_weights, lane, at: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_WEIGHTS: tl.constexpr
):
    """A program a (source, row): to each of its experts here."""
    src = tl.program_id(0).to(tl.int64) // at.num_tokens
    row = tl.program_id(0).to(tl.int64) % at.num_tokens
    is_there = (load64(cell(lane, src, TAKEN, at)) == 1) & (row < load64(cell(lane, src, ROWS_FROM, at)))
    if is_there:
        parity = load64(lane_word(lane, ROUND)) % NUM_PARITIES
        window = load64(cell(lane, src, INBOUND, at))
        source = window + at.dispatch_rows + at.dispatch_rows_step * parity + at.dispatch_stride * row
        header = header_of(lane, src, row, at)
        index = index_of_row(src, row, at) * at.max_choices
        for choice in range(load32(header + HEADER_NUM_CHOICES)):
            given = header + HEADER_CHOICES + CHOICE_STRIDE * choice
            expert = load32(given + CHOICE_EXPERT)
            position = load32(lane + at.lane_first + 4 * (src * at.max_local_experts + expert))
            position += load32(lane + at.lane_place + 4 * (index + choice))
            store32(lane + at.lane_position + 4 * (index + choice), position)
            copy_words(recv_x + at.payload_bytes * position, source, at.payload_bytes, at.copy_block, is_there)
            if HAS_SCALES:
                to = recv_scales + at.scale_bytes * position
                copy_bytes(to, source + at.scales_at, at.scale_bytes, at.copy_block, is_there)
            if HAS_WEIGHTS:
                store32(recv_weights + 4 * position, load32(given + CHOICE_WEIGHT))
