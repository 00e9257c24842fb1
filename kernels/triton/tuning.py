"""How much of a row a program copies or sums at once: measured once a chip, a fixed choice where there is none.

Only these two blocks: every other one is set by how many ranks, choices or experts there are. What a block is changes
no bit of a result, so ranks of a group may differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton

from fault_a2a.kernel_compiler import cache_folder, write_whole
from fault_a2a.kernels.triton import ops_permute
from fault_a2a.kernels.triton.layout import DTYPES, MAX_COPY_BLOCK, MAX_SUM_BLOCK
from fault_a2a.kernels.triton.target import INTERPRETED, launch

CANDIDATES = (256, 512, 1024, 2048)
# As many rows as a decode step has, and two choices of each: enough to fill a chip, soon over.
NUM_ROWS, NUM_TOPK, NUM_RUNS = 256, 2, 20

TimeOf = Callable[[Callable[[], None]], float]


@dataclass(frozen=True)
class Blocks:
    """``copy``: words of eight bytes; ``sum``: elements."""

    copy: int = MAX_COPY_BLOCK
    sum: int = MAX_SUM_BLOCK


def blocks_for(fields: dict[str, Any]) -> Blocks:
    """Of a rank (``core_fields``). On a GPU it blocks for a second where nobody has measured before, while the group is
    being constructed; then it reads ``cache_folder()``."""
    if INTERPRETED:
        return Blocks()
    chip = f"{torch.cuda.get_device_name()} triton {triton.__version__}"
    return measured(chip, fields["hidden_bytes"], fields["dtype"], "cuda", _time_on_gpu)


def measured(chip: str, row_bytes: int, dtype: str, device: str, time_of: TimeOf) -> Blocks:
    """The fastest blocks of a chip for such rows, out of the cache or by ``time_of`` each candidate.

    ``time_of(call)``: how long a call takes, in whatever unit.
    """
    digest = hashlib.sha256(f"{chip} {row_bytes} {dtype}".encode()).hexdigest()[:32]
    kept = cache_folder() / f"{digest}.blocks.json"
    known = _read(kept)
    if known is not None:
        return known
    copies = {block: time_of(call) for block, call in _copies(row_bytes, device).items()}
    sums = {block: time_of(call) for block, call in _sums(row_bytes, dtype, device).items()}
    # Of equal ones the smaller, which needs fewer registers.
    found = Blocks(copy=min(copies, key=copies.__getitem__), sum=min(sums, key=sums.__getitem__))
    write_whole(kept, json.dumps(asdict(found)).encode())
    return found


def _read(path: Any) -> Blocks | None:
    """None for whatever a crash, or another version, left there."""
    try:
        known = Blocks(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return known if {known.copy, known.sum} <= set(CANDIDATES) else None


def _copies(row_bytes: int, device: str) -> dict[int, Callable[[], None]]:
    """A copy of rows with each block, by the operator that is nothing but one."""
    rows = torch.zeros(NUM_ROWS, row_bytes, dtype=torch.uint8, device=device)
    out = torch.empty_like(rows)
    positions = torch.arange(NUM_ROWS, dtype=torch.int32, device=device)
    addresses = [tensor.data_ptr() for tensor in (rows, positions, out)]
    sizes = ops_permute.unpermute_constants(row_bytes)

    def call(block: int) -> Callable[[], None]:
        constants = {**sizes, "COPY_BLOCK": block}
        keeps = (rows, out, positions)  # their addresses are used as long as this can be called
        return lambda: launch(ops_permute.unpermute_rows, len(keeps[0]), *addresses, NUM_ROWS, *constants.values())

    return {block: call(block) for block in CANDIDATES}


def _sums(row_bytes: int, dtype: str, device: str) -> dict[int, Callable[[], None]]:
    """The same of a weighted sum."""
    assert dtype in DTYPES
    rows = torch.zeros(
        NUM_ROWS, row_bytes // getattr(torch, dtype).itemsize, dtype=getattr(torch, dtype), device=device
    )
    positions = torch.arange(NUM_ROWS, dtype=torch.int32, device=device).view(-1, NUM_TOPK)
    weights, out = torch.ones(positions.shape, device=device), torch.empty_like(rows[: len(positions)])
    addresses = [tensor.data_ptr() for tensor in (rows, positions, weights, out)]
    sizes = ops_permute.sum_constants(NUM_TOPK, rows.shape[1], rows.dtype)

    def call(block: int) -> Callable[[], None]:
        constants = {**sizes, "SUM_BLOCK": block}
        keeps = (rows, positions, weights, out)
        return lambda: launch(ops_permute.sum_rows, len(keeps[1]), *addresses, NUM_ROWS, *constants.values())

    return {block: call(block) for block in CANDIDATES}


def _time_on_gpu(call: Callable[[], None]) -> float:
    """Milliseconds of the fastest of a few runs; the first one compiles."""
    call()
    best = float("inf")
    for _ in range(NUM_RUNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end))
    return best
