"""Dispatch, the half that sends: check, route, and one row per (token, destination rank)."""

import triton.language as tl

from fault_a2a.kernels.triton import layout
from fault_a2a.kernels.triton.layout import NUMBERS, OFFSETS, QUANTIZE, constant
from fault_a2a.kernels.triton.numbers import QUANTIZED_BLOCK, UE8M0, copy_bytes, copy_words, store_quantized_block
from fault_a2a.kernels.triton.target import kernel
from fault_a2a.kernels.triton.window import OUT, WAITING
from fault_a2a.kernels.triton.words import (
    ACTIVE,
    ANSWERS,
    BAD,
    CHOICE,
    CONSENT,
    HEARD,
    INBOUND,
    NUM_PARITIES,
    OPENED,
    ROUND,
    ROWS_TO,
    SINCE_NS,
    STATUS,
    SUSPECTS,
    TAKEN,
    TICK,
    TOKEN,
    VALUE,
    acquire,
    bits_of_ranks,
    cell,
    choices_of,
    counted,
    integers,
    lane_word,
    load32,
    load64,
    min_of,
    rounds_ahead,
    running_sum,
    show,
    store32,
    store64,
    sum_of,
)

PHASE_DISPATCH_SEND = constant(NUMBERS["phase_dispatch_send"])
BAD_EXPERT, REPEATED_EXPERT = constant(layout.BAD_EXPERT), constant(layout.REPEATED_EXPERT)
NEVER = constant(QUANTIZE["never"])
HEADER_TOKEN, HEADER_NUM_CHOICES = constant(OFFSETS["header_token"]), constant(OFFSETS["header_num_choices"])
HEADER_CHOICES, CHOICE_STRIDE = constant(OFFSETS["header_choices"]), constant(OFFSETS["choice_stride"])
CHOICE_EXPERT, CHOICE_K = constant(OFFSETS["choice_expert"]), constant(OFFSETS["choice_k"])
CHOICE_WEIGHT = constant(OFFSETS["choice_weight"])
NO_CHOICE = constant(1 << 62)


@kernel
def check_choices(topk_idx, num_tokens, lane, at: tl.constexpr, IS_64_BIT: tl.constexpr):
    """Everything that depends on the values, before the round begins: after that, peers count on this rank.

    Keeps the experts, and says where the first wrong choice is.
    """
    zero = tl.full([], 0, tl.int64)
    first_wrong = zero + NO_CHOICE
    k = integers(at.topk_block)[None, :]
    for first in range(0, num_tokens, at.tokens_block):
        token = (first + integers(at.tokens_block))[:, None]
        inside = (token < num_tokens) & (k < at.num_topk)
        if IS_64_BIT:
            expert = load64(topk_idx + 8 * (token * at.num_topk + k), inside)
        else:
            expert = load32(topk_idx + 4 * (token * at.num_topk + k), inside)
        wrong = inside & ((expert < -1) | (expert >= at.num_experts))
        for before in range(at.num_topk):
            earlier = sum_of(tl.where(inside & (k == before), expert, 0), 1)[:, None]
            wrong = wrong | (inside & (k > before) & (expert >= 0) & (expert == earlier))
        choice = tl.where(wrong, token * at.num_topk + k, NO_CHOICE)
        first_here = min_of(min_of(choice, 1), 0)
        if first_here < first_wrong:
            value = sum_of(sum_of(tl.where(choice == first_here, expert, 0), 1), 0)
            is_range = (value < -1) | (value >= at.num_experts)
            store64(lane_word(lane, VALUE), value)
            store64(lane_word(lane, TOKEN), first_here // at.num_topk)
            store64(lane_word(lane, CHOICE), first_here % at.num_topk)
            store64(lane_word(lane, STATUS), tl.where(is_range, zero + BAD_EXPERT, zero + REPEATED_EXPERT))
            first_wrong = first_here
        store32(choices_of(lane + at.lane_expert, token, at) + 4 * k, expert, inside)
    if first_wrong == NO_CHOICE:
        store64(lane_word(lane, STATUS), zero)


@kernel
def route(topk_weights, expert_rank, num_tokens, lane, at: tl.constexpr):
    """A program a destination: which of my tokens go there, in which row, and which of its answers is whose."""
    dst = tl.program_id(0).to(tl.int64)
    k = integers(at.topk_block)[None, :]
    num_rows = tl.full([], 0, tl.int64)
    num_answers = num_rows
    for first in range(0, num_tokens, at.tokens_block):
        token = (first + integers(at.tokens_block))[:, None]
        inside = (token < num_tokens) & (k < at.num_topk)
        expert = load32(choices_of(lane + at.lane_expert, token, at) + 4 * k, inside)
        chosen = inside & (expert >= 0)
        goes = chosen & (load32(expert_rank + 4 * expert, chosen) == dst)
        per_token = sum_of(counted(goes), 1)
        has_row = tl.where(per_token > 0, per_token * 0 + 1, 0)
        row = num_rows + running_sum(has_row, 0) - has_row
        # reduce="expert": one answer a row, whichever choices it sums.
        answer = row[:, None] + k * 0
        if at.reduce_at_expert == 0:
            before = num_answers + running_sum(per_token, 0) - per_token
            answer = before[:, None] + running_sum(counted(goes), 1) - 1
        store32(choices_of(lane + at.lane_dst, token, at) + 4 * k, dst + k * 0 + token * 0, goes)
        store32(choices_of(lane + at.lane_row, token, at) + 4 * k, row[:, None] + k * 0, goes)
        store32(choices_of(lane + at.lane_answer, token, at) + 4 * k, answer, goes)
        if dst == 0:
            store32(choices_of(lane + at.lane_dst, token, at) + 4 * k, token * 0 + k * 0 - 1, inside & ~chosen)
            weight = load32(choices_of(topk_weights, token, at) + 4 * k, inside)
            store32(choices_of(lane + at.lane_weight, token, at) + 4 * k, weight, inside)
        tl.atomic_add(
            (lane + at.lane_expert_rows + 4 * expert).to(tl.pointer_type(tl.int32)), 1, mask=goes, sem="relaxed"
        )
        num_rows += sum_of(has_row, 0)
        num_answers += sum_of(per_token, 0)
    store64(cell(lane, dst, ROWS_TO, at), num_rows)
    store64(cell(lane, dst, ANSWERS, at), num_rows if at.reduce_at_expert else num_answers)


@kernel
def open_dispatch(state, page, outbound, lane, words, at: tl.constexpr):
    """Who gets rows: active peers that are not suspected and have given the slots of two rounds ago back."""
    rank = integers(at.ranks_block)
    in_group = rank < at.num_ranks
    round_number = load64(lane_word(lane, ROUND))
    show(state, page, outbound, load64(words + 8 * TICK), round_number, round_number * 0 + PHASE_DISPATCH_SEND, at)
    active = load64(cell(lane, rank, ACTIVE, at), in_group) == 1
    suspected = bits_of_ranks(state + SUSPECTS, rank, in_group) == 1
    place = at.combine_signal + at.combine_signal_step * (round_number % NUM_PARITIES)
    answer = acquire(load64(cell(lane, rank, INBOUND, at), in_group) + place, in_group)
    # Suspicion takes the wait away, and a new view lifts the suspicion; neither touches this.
    consents = rounds_ahead(answer, round_number - 2) >= 0
    if CONSENT & at.guards_off:
        consents = rank >= 0
    store64(cell(lane, rank, OPENED, at), counted(active & ~suspected & consents), in_group)
    store64(cell(lane, rank, HEARD, at), tl.where(active, rank * 0 + WAITING, OUT), in_group)
    store64(cell(lane, rank, SINCE_NS, at), rank * 0, in_group)
    store64(cell(lane, rank, BAD, at), rank * 0, in_group)
    store64(cell(lane, rank, TAKEN, at), rank * 0, in_group)


@kernel
def store_claims(outbound, experts_of_rank, lane, at: tl.constexpr):
    """A program a destination: how many rows each of its experts will get."""
    dst = tl.program_id(0).to(tl.int64)
    opened = load64(cell(lane, dst, OPENED, at)) == 1
    window = load64(outbound + 8 * dst) + at.claims
    window += at.claims_step * (load64(lane_word(lane, ROUND)) % NUM_PARITIES)
    for first in range(0, at.max_local_experts, at.experts_block):
        local = first + integers(at.experts_block)
        inside = (local < at.max_local_experts) & opened
        expert = load32(experts_of_rank + 4 * (dst * at.max_local_experts + local), inside)
        count = load32(lane + at.lane_expert_rows + 4 * expert, inside & (expert >= 0))
        store32(window + 4 * local, tl.where(expert >= 0, count, 0), inside)


@kernel
def store_rows(
    x, scales, expert_local, outbound, lane, first_token, at: tl.constexpr, HAS_SCALES: tl.constexpr
):  # fmt: skip
    """A program a token: its row and header into the window of each rank that it goes to. Nothing tells of them yet."""
    token = first_token + tl.program_id(0).to(tl.int64)
    k = integers(at.topk_block)
    inside = k < at.num_topk
    mine = choices_of(lane, token, at) + 4 * k
    dst = tl.where(inside, load32(mine + at.lane_dst, inside), -1)
    expert = load32(mine + at.lane_expert, inside)
    weight = load32(mine + at.lane_weight, inside)
    parity = load64(lane_word(lane, ROUND)) % NUM_PARITIES
    for choice in range(at.num_topk):
        peer = sum_of(tl.where(k == choice, dst, 0), 0)
        shares = (dst == peer) & (peer >= 0)
        is_first = min_of(tl.where(shares, k, at.topk_block), 0) == choice
        row = sum_of(tl.where(k == choice, load32(mine + at.lane_row, inside & (dst >= 0)), 0), 0)
        known = tl.where(peer >= 0, peer, 0)
        goes = is_first & (peer >= 0) & (load64(cell(lane, known, OPENED, at)) == 1)
        if goes:
            window = load64(outbound + 8 * known)
            header = window + at.row_headers + at.row_headers_step * parity + at.header_stride * row
            place = header + HEADER_CHOICES + CHOICE_STRIDE * (running_sum(counted(shares), 0) - 1)
            local = load32(expert_local + 4 * expert, shares)
            store32(header + HEADER_TOKEN, token)
            store32(header + HEADER_NUM_CHOICES, sum_of(counted(shares), 0))
            store32(place + CHOICE_EXPERT, local, shares)
            store32(place + CHOICE_K, k, shares)
            store32(place + CHOICE_WEIGHT, weight, shares)
            to = window + at.dispatch_rows + at.dispatch_rows_step * parity + at.dispatch_stride * row
            if (at.quantize != NEVER) & (HAS_SCALES == 0):
                # Quantised anew for each destination: the arithmetic is cheaper than the memory to keep it in.
                is_ue8m0: tl.constexpr = at.quantize == UE8M0
                for first in range(0, at.hidden, QUANTIZED_BLOCK):
                    source = x + at.hidden_bytes * token
                    store_quantized_block(to, to + at.scales_at, source, first, at.hidden, at.dtype, is_ue8m0)
                if is_ue8m0:
                    # The padding of the last word of scales.
                    byte = integers(4) + (at.hidden + QUANTIZED_BLOCK - 1) // QUANTIZED_BLOCK
                    tl.store(
                        (to + at.scales_at + byte).to(tl.pointer_type(tl.int8)), (byte * 0).to(tl.int8),
                        mask=byte < at.scale_bytes,
                    )  # fmt: skip
            else:
                copy_words(to, x + at.payload_bytes * token, at.payload_bytes, at.copy_block, goes)
                if HAS_SCALES:
                    from_scales = scales + at.scale_bytes * token
                    copy_bytes(to + at.scales_at, from_scales, at.scale_bytes, at.copy_block, goes)
