"""Finds out whether an expert's rows keep their bits whatever else is in the batch.

"The same bits as without the failure" can only be true when a row that another replica computes, in another batch, is
the same row. That does not come by itself: a matrix product may pick another kernel for another number of rows, and
with several threads even another order of additions for another place in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fault_a2a.reference import same_bits

# Sizes at which matrix products are known to switch kernels, and the neighbours of the vector widths.
_BATCH_SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129)
_ADVICE = (
    "Pad every expert's batch to one fixed number of rows (a multiple of 64, zeros behind the last row), "
    "run it on one thread (torch.set_num_threads(1)), and keep rows out of each other's arithmetic; then check again."
)

Expert = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class RowInvariance:
    """What ``check_row_invariant`` found. True in a condition when every tried row kept its bits.

    Attributes:
        ok: every row of every tried batch had the bits it had before.
        sentence: what was tried, or the first batch in which bits changed, and what to do about it.
        num_batches: batches that were evaluated.
        num_changed_rows: rows, over all batches and experts, whose bits changed.
    """

    ok: bool
    sentence: str
    num_batches: int
    num_changed_rows: int

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True)
class _Batch:
    """Rows of the pool, by index, in the order in which the expert sees them."""

    row_idx: torch.Tensor
    what: str
    poisoned: bool = False  # rows of other tokens in the batch are infinite


def check_row_invariant(
    experts: Expert | Sequence[Expert],
    hidden: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    num_rows: int = 130,
    num_shuffles: int = 4,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> RowInvariance:
    """Runs each expert over the same rows in many batches and compares bits.

    Args:
        experts: one callable or several; each maps ``[n, hidden]`` to ``[n, hidden]`` of ``dtype`` for any ``n >= 1``.
        hidden: elements in a row.
        dtype: of the rows.
        num_rows: rows in the pool that the batches are drawn from, at least 2. Give more than the largest batch in
            which the expert changes its way of computing (its padding, for one).
        num_shuffles: random orders tried for every batch size, at least 1.
        device: where the rows are made.
        seed: of the rows and of the batches; the same seed repeats the same check.

    Each row is tried in batches of many sizes, at many places in them, beside rows that are infinite or NaN, twice the
    same, and at a memory address that is not the start of an allocation. Rows are compared as
    ``fault_a2a.reference.same_bits`` does. Passing is evidence for this machine, this thread count and these shapes.
    An expert that sums in float32 and rounds to bfloat16 hides all but one in 65536 of its last-bit differences in the
    rounding: if it can return its float32 sums, check those.

    Returns:
        ``RowInvariance``: a condition and a sentence that says why.

    Raises:
        TypeError: an expert is not callable or returns something other than a tensor of ``dtype``.
        ValueError: an expert returns another shape, or ``num_rows`` or ``num_shuffles`` is too small.
    """
    if num_rows < 2:
        raise ValueError(f"num_rows: {num_rows} rows cannot be put beside each other; pass at least 2.")
    if num_shuffles < 1:
        raise ValueError(f"num_shuffles: {num_shuffles} tries nothing; pass at least 1.")
    several = not callable(experts)
    num_batches = num_changed = num_experts = 0
    first_change = ""
    for number, expert in enumerate(experts if several else [experts]):  # type: ignore[arg-type]
        name = f"expert {number}" if several else "the expert"
        if not callable(expert):
            raise TypeError(f"experts: {name} is {expert!r}, which cannot be called; pass functions of one tensor.")
        num_experts += 1
        generator = torch.Generator().manual_seed(seed * 1000003 + number)
        pool = _pool(num_rows, hidden, dtype, generator).to(device)
        expected = _run(expert, pool, name)
        for batch in _batches(num_rows, num_shuffles, generator):
            changed = _changed_rows(expert, pool, expected, batch, name)
            num_batches += 1
            num_changed += changed
            if changed and not first_change:
                first_change = (
                    f"{name} is not row-invariant: {changed} of {_num_compared(batch)} rows changed bits in "
                    f"{batch.what}, against a batch of {num_rows}."
                )
    if first_change:
        sentence = f"{first_change} In all, {num_changed} rows changed in {num_batches} batches. {_ADVICE}"
        return RowInvariance(False, _capitalised(sentence), num_batches, num_changed)
    who = f"{num_experts} experts" if several else "the expert"
    sentence = f"{who} kept the bits of every row in {num_batches} batches of 1 to {num_rows} rows ({dtype})."
    return RowInvariance(True, _capitalised(sentence), num_batches, 0)


def _pool(num_rows: int, hidden: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Rows of very different size (sums then show their order), one of them zero and two of them equal."""
    scale = torch.exp2(torch.randint(-6, 7, (num_rows, hidden), generator=generator).float())
    pool = torch.randn(num_rows, hidden, generator=generator) * scale
    pool[num_rows // 2] = 0
    pool[-1] = pool[0]
    return pool.to(dtype)


def _batches(num_rows: int, num_shuffles: int, generator: torch.Generator) -> Iterator[_Batch]:
    everything = torch.arange(num_rows)
    yield _Batch(everything, "the same batch, run again")
    yield _Batch(everything.flip(0), "the same batch in reverse order")
    for size in [size for size in _BATCH_SIZES if size <= num_rows]:
        for _ in range(num_shuffles):
            yield _Batch(torch.randperm(num_rows, generator=generator)[:size], f"a batch of {size} in random order")
    for size in sorted({2, min(num_rows, 64), num_rows}):
        row_idx = torch.randperm(num_rows, generator=generator)[:size]
        yield _Batch(row_idx, f"a batch of {size} where every second row is infinite or NaN", poisoned=True)


def _changed_rows(expert: Expert, pool: torch.Tensor, expected: torch.Tensor, batch: _Batch, name: str) -> int:
    # One row into a larger allocation: engines hand over slices, and a kernel may care how they are aligned.
    rows = torch.empty(len(batch.row_idx) + 1, pool.shape[1], dtype=pool.dtype, device=pool.device)[1:]
    rows[:] = pool[batch.row_idx.to(pool.device)]
    step = 1
    if batch.poisoned:
        rows[1::4], rows[3::4] = float("inf"), float("nan")
        step = 2
    same = same_bits(_run(expert, rows, name), expected[batch.row_idx.to(pool.device)])[::step]
    return int((~same.all(dim=1)).sum())


def _num_compared(batch: _Batch) -> int:
    return (len(batch.row_idx) + 1) // 2 if batch.poisoned else len(batch.row_idx)


def _run(expert: Expert, rows: torch.Tensor, name: str) -> torch.Tensor:
    out = expert(rows.clone() if rows.storage_offset() == 0 else rows)
    if not isinstance(out, torch.Tensor) or out.dtype != rows.dtype:
        found = out.dtype if isinstance(out, torch.Tensor) else type(out).__name__
        raise TypeError(f"experts: {name} returned {found}; return a tensor of {rows.dtype}, as the rows it was given.")
    if out.shape != rows.shape:
        raise ValueError(
            f"experts: {name} turned {tuple(rows.shape)} into {tuple(out.shape)}; return one row for each row."
        )
    return out.clone()


def _capitalised(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
