"""What one row costs on one thread: the weighted sum, fp8 quantisation and copies, beside torch doing the same.

    python -m benchmarks.rows [--hidden 7168] [--rounds 60]

Contestants take turns within a round, so that a busy machine slows all of them; a figure counts only in comparison with
the others of its run. Every result is compared with the reference before anything is timed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch

from fault_a2a import reference
from fault_a2a._core import core

NUM_TOPK, NUM_TOKENS = 8, 64
# Rows are taken from a pool far larger than the caches, as they are from a window.
POOL_BYTES = 128 << 20

Contestants = dict[str, Callable[[], object]]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def take_turns(contestants: Contestants, rounds: int, per_call: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, call in contestants.items():
            start = time.perf_counter_ns()
            call()
            times[name].append((time.perf_counter_ns() - start) / per_call)
    for name, measured in times.items():
        warm = sorted(measured[1:])
        p95 = warm[min(len(warm) - 1, len(warm) * 95 // 100)]
        print(f"  {name:<44} {statistics.median(warm):>10.0f} {p95:>10.0f}")


class Pool:
    """Rows of one type, handed out in turn."""

    def __init__(self, hidden: int, dtype: torch.dtype) -> None:
        num_rows = POOL_BYTES // (hidden * dtype.itemsize) // NUM_TOPK * NUM_TOPK
        self.rows = torch.randn(num_rows, hidden, generator=torch.Generator().manual_seed(1)).to(dtype)
        self.next = 0

    def take(self, count: int) -> torch.Tensor:
        if self.next + count > len(self.rows):
            self.next = 0
        self.next += count
        return self.rows[self.next - count : self.next]


def sums(hidden: int, dtype: torch.dtype) -> Contestants:
    pool, out = Pool(hidden, dtype), torch.empty(NUM_TOKENS, hidden, dtype=dtype)
    weights = torch.rand(NUM_TOPK, generator=torch.Generator().manual_seed(2))
    listed, name, stride = weights.tolist(), name_of(dtype), hidden * dtype.itemsize

    def through(function: Callable[..., None]) -> None:
        for token in range(NUM_TOKENS):
            first = pool.take(NUM_TOPK).data_ptr()
            rows = [first + k * stride for k in range(NUM_TOPK)]
            function(name, out[token].data_ptr(), rows, listed, hidden)

    def in_torch_by_choice() -> None:
        for token in range(NUM_TOKENS):
            total = torch.zeros(hidden)
            for k, row in enumerate(pool.take(NUM_TOPK)):
                total += weights[k] * row.float()
            out[token] = total

    def in_torch_by_matmul() -> None:
        for token in range(NUM_TOKENS):
            out[token] = weights @ pool.take(NUM_TOPK).float()

    through(core.weighted_sum)
    ours = out.clone()
    pool.next = 0
    in_torch_by_choice()
    assert reference.same_bits(ours, out).all(), "the sum has not the bits of the reference; nothing is timed"
    return {
        f"{name}: one pass": lambda: through(core.weighted_sum),
        f"{name}: torch, a pass per choice (same bits)": in_torch_by_choice,
        f"{name}: torch, float32 matmul (other bits)": in_torch_by_matmul,
    }


def quantisations(hidden: int, dtype: torch.dtype) -> Contestants:
    pool, name = Pool(hidden, dtype), name_of(dtype)
    q = torch.empty(NUM_TOKENS, hidden, dtype=torch.uint8)
    scales = torch.empty(NUM_TOKENS, -(-hidden // 128))
    copied = torch.empty(NUM_TOKENS, hidden, dtype=dtype)

    def ours(scale: str) -> None:
        x = pool.take(NUM_TOKENS).data_ptr()
        core.quantize_rows(name, scale, q.data_ptr(), scales.data_ptr(), x, NUM_TOKENS, hidden)

    ours("float32")
    want_q, want_scales = reference.quantize_1x128(pool.rows[:NUM_TOKENS])
    assert torch.equal(q, want_q.view(torch.uint8)) and torch.equal(scales, want_scales), "not the reference's bits"
    return {
        f"{name}: quantised, float32 scales": lambda: ours("float32"),
        f"{name}: quantised, ue8m0": lambda: ours("ue8m0"),
        f"{name}: torch (the reference)": lambda: reference.quantize_1x128(pool.take(NUM_TOKENS)),
        f"{name}: only copied": lambda: copied.copy_(pool.take(NUM_TOKENS)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.rows", description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"hidden {arguments.hidden}, one thread, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    for title, make in (("weighted sum of 8 rows, ns a token", sums), ("fp8, ns a row", quantisations)):
        print(f"{title:<46} {'median':>10} {'p95':>10}")
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            take_turns(make(arguments.hidden, dtype), arguments.rounds, NUM_TOKENS)
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
