"""Tokens to expert-major rows and back, and the weighted sum of a token's rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fault_a2a.kernels.triton.layout import DTYPES, MAX_COPY_BLOCK, MAX_EXPERTS_BLOCK, MAX_SUM_BLOCK
from fault_a2a.kernels.triton.numbers import FLOAT16, copy_bytes, copy_words, float_of, load_elements, store_elements
from fault_a2a.kernels.triton.target import inline, kernel, launch
from fault_a2a.kernels.triton.words import counted, integers, load32, load64, store32, sum_of

CHOICES_BLOCK = 64


@inline
def expert_of(topk_idx, choice, inside, num_experts: tl.constexpr, idx_is_64_bit: tl.constexpr):
    """-1 where a choice names no expert."""
    if idx_is_64_bit:
        expert = load64(topk_idx + 8 * choice, inside)
    else:
        expert = load32(topk_idx + 4 * choice, inside)
    return tl.where(inside & (expert >= 0) & (expert < num_experts), expert, -1)


@inline
def copy_row(to, source, num_bytes: tl.constexpr, is_words: tl.constexpr, block: tl.constexpr, goes):
    if is_words:
        copy_words(to, source, num_bytes, block, goes)
    else:
        copy_bytes(to, source, num_bytes, block, goes)


@kernel
def permute_rows(
    x, topk_idx, rows, offsets, positions, num_tokens,
    NUM_TOPK: tl.constexpr, NUM_EXPERTS: tl.constexpr, ROW_BYTES: tl.constexpr, IDX_IS_64_BIT: tl.constexpr,
    IS_WORDS: tl.constexpr, TOPK_BLOCK: tl.constexpr, CHOICES_BLOCK: tl.constexpr, EXPERTS_BLOCK: tl.constexpr,
    COPY_BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a token, then one a block of experts. A place is the number of choices before it, which each program
    counts for itself: atomics would hand places out in another order every time."""
    program = tl.program_id(0).to(tl.int64)
    num_choices = num_tokens * NUM_TOPK
    if program < num_tokens:
        k = integers(TOPK_BLOCK)
        own = program * NUM_TOPK + k
        expert = expert_of(topk_idx, own, k < NUM_TOPK, NUM_EXPERTS, IDX_IS_64_BIT)
        place = k * 0
        for first in range(0, num_choices, CHOICES_BLOCK):
            choice = first + integers(CHOICES_BLOCK)
            other = expert_of(topk_idx, choice, choice < num_choices, NUM_EXPERTS, IDX_IS_64_BIT)[:, None]
            earlier = (other == expert[None, :]) & (choice[:, None] < own[None, :])
            place += sum_of(counted((other >= 0) & ((other < expert[None, :]) | earlier)), 0)
        store32(positions + 4 * own, tl.where(expert >= 0, place, -1), k < NUM_TOPK)
        for choice in range(NUM_TOPK):
            goes = sum_of(counted((k == choice) & (expert >= 0)), 0) == 1
            to = sum_of(tl.where(k == choice, place, 0), 0)
            copy_row(rows + ROW_BYTES * to, x + ROW_BYTES * program, ROW_BYTES, IS_WORDS, COPY_BLOCK, goes)
    else:
        behind = (program - num_tokens) * EXPERTS_BLOCK + integers(EXPERTS_BLOCK)
        num_before = behind * 0
        for first in range(0, num_choices, CHOICES_BLOCK):
            choice = first + integers(CHOICES_BLOCK)
            other = expert_of(topk_idx, choice, choice < num_choices, NUM_EXPERTS, IDX_IS_64_BIT)[:, None]
            num_before += sum_of(counted((other >= 0) & (other < behind[None, :])), 0)
        store32(offsets + 4 * behind, num_before, behind <= NUM_EXPERTS)


@kernel
def unpermute_rows(
    rows, positions, out, num_rows, ROW_BYTES: tl.constexpr, IS_WORDS: tl.constexpr, COPY_BLOCK: tl.constexpr
):
    """A program a choice."""
    choice = tl.program_id(0).to(tl.int64)
    position = load32(positions + 4 * choice)
    goes = (position >= 0) & (position < num_rows)
    source = rows + ROW_BYTES * tl.where(goes, position, 0)
    copy_row(out + ROW_BYTES * choice, source, ROW_BYTES, IS_WORDS, COPY_BLOCK, goes)


@kernel
def sum_rows(
    rows, positions, topk_weights, out, num_rows,
    NUM_TOPK: tl.constexpr, HIDDEN: tl.constexpr, DTYPE: tl.constexpr, SUM_BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a token: float32 from +0.0, choices in order, product and sum rounded separately, one rounding last."""
    token = tl.program_id(0).to(tl.int64)
    item: tl.constexpr = 4 if DTYPE > FLOAT16 else 2
    for first in range(0, HIDDEN, SUM_BLOCK):
        element = first + integers(SUM_BLOCK)
        in_row = element < HIDDEN
        total = tl.full([SUM_BLOCK], 0.0, tl.float32)
        for k in range(NUM_TOPK):
            position = load32(positions + 4 * (token * NUM_TOPK + k))
            weight = float_of(load32(topk_weights + 4 * (token * NUM_TOPK + k)))
            if (position >= 0) & (position < num_rows):
                value = load_elements(rows + item * (HIDDEN * position + element), in_row, DTYPE)
                total = total + weight * value
        store_elements(out + item * (HIDDEN * token + element), total, in_row, DTYPE)


# --- what they are compiled for, and how they are launched


def copy_constants(row_bytes: int, is_aligned: bool = True) -> dict[str, int]:
    """Of kernels that copy rows: in words of eight bytes, where rows are whole words and begin on one."""
    is_words = is_aligned and row_bytes % 8 == 0
    block = triton.next_power_of_2(row_bytes // 8 if is_words else row_bytes)
    return {"IS_WORDS": int(is_words), "COPY_BLOCK": min(block, MAX_COPY_BLOCK)}


def permute_constants(
    num_topk: int, num_experts: int, row_bytes: int, idx_is_64_bit: bool, is_aligned: bool = True
) -> dict[str, int]:
    copies = copy_constants(row_bytes, is_aligned)
    return {
        "NUM_TOPK": num_topk,
        "NUM_EXPERTS": num_experts,
        "ROW_BYTES": row_bytes,
        "IDX_IS_64_BIT": int(idx_is_64_bit),
        "IS_WORDS": copies["IS_WORDS"],
        "TOPK_BLOCK": triton.next_power_of_2(num_topk),
        "CHOICES_BLOCK": CHOICES_BLOCK,
        "EXPERTS_BLOCK": min(triton.next_power_of_2(num_experts + 1), MAX_EXPERTS_BLOCK),
        "COPY_BLOCK": copies["COPY_BLOCK"],
    }


def unpermute_constants(row_bytes: int, is_aligned: bool = True) -> dict[str, int]:
    return {"ROW_BYTES": row_bytes, **copy_constants(row_bytes, is_aligned)}


def sum_constants(num_topk: int, hidden: int, dtype: torch.dtype) -> dict[str, int]:
    block = min(triton.next_power_of_2(hidden), MAX_SUM_BLOCK)
    kind = DTYPES[str(dtype).removeprefix("torch.")]
    return {"NUM_TOPK": num_topk, "HIDDEN": hidden, "DTYPE": kind, "SUM_BLOCK": block}


def permute(
    x: torch.Tensor, topk_idx: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``reference.permute``. Its arguments were checked."""
    (num_tokens, hidden), num_topk = x.shape, topk_idx.shape[1]
    rows = x.new_zeros(num_tokens * num_topk, hidden)
    offsets = topk_idx.new_empty(num_experts + 1, dtype=torch.int32)
    positions = topk_idx.new_empty(topk_idx.shape, dtype=torch.int32)
    row_bytes = hidden * x.dtype.itemsize
    sizes = permute_constants(num_topk, num_experts, row_bytes, topk_idx.dtype == torch.int64, _are_aligned(x, rows))
    num_programs = num_tokens + -(-(num_experts + 1) // sizes["EXPERTS_BLOCK"])
    addresses = [tensor.data_ptr() for tensor in (x, topk_idx, rows, offsets, positions)]
    launch(permute_rows, num_programs, *addresses, num_tokens, *sizes.values())
    return rows, offsets, positions


def unpermute(rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """``reference.unpermute``. Its arguments were checked."""
    num_rows, hidden = rows.shape
    out = rows.new_zeros(*positions.shape, hidden)
    sizes = unpermute_constants(hidden * rows.dtype.itemsize, _are_aligned(rows, out))
    addresses = [tensor.data_ptr() for tensor in (rows, positions, out)]
    launch(unpermute_rows, positions.numel(), *addresses, num_rows, *sizes.values())
    return out


def weighted_reduce(rows: torch.Tensor, positions: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """``reference.weighted_reduce``. Its arguments were checked."""
    (num_rows, hidden), (num_tokens, num_topk) = rows.shape, positions.shape
    out = rows.new_empty(num_tokens, hidden)
    sizes = sum_constants(num_topk, hidden, rows.dtype)
    addresses = [tensor.data_ptr() for tensor in (rows, positions, topk_weights, out)]
    launch(sum_rows, num_tokens, *addresses, num_rows, *sizes.values())
    return out


def _are_aligned(*tensors: torch.Tensor) -> bool:
    """Where a tensor is a part of another it may begin anywhere."""
    return all(tensor.data_ptr() % 8 == 0 for tensor in tensors)
