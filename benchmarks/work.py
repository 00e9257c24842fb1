"""What is measured: the shape of a round, one rank's tokens, and the answer that a system must give for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
# A stale answer of the round before would pass for a right one if all rounds had the same tokens.
NUM_BATCHES = 2


@dataclass(frozen=True)
class Shape:
    """The size of a round; ``tokens`` is per rank."""

    ranks: int
    tokens: int
    hidden: int
    topk: int
    experts: int
    dtype: str
    recv_format: str
    reduce: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        return self.hidden * self.torch_dtype.itemsize

    def config(self, backend: str = "cpu") -> Any:
        """The ``fault_a2a.Config`` of this shape; raises its errors."""
        # Late, like every import of the package here: a team chooses its core after the fork.
        import fault_a2a

        return fault_a2a.Config(
            num_experts=self.experts,
            hidden=self.hidden,
            num_topk=self.topk,
            num_max_tokens_per_rank=self.tokens,
            dtype=self.torch_dtype,
            recv_format=self.recv_format,
            reduce=self.reduce,
            backend=backend,
        )


def routing(shape: Shape, rank: int, seed: int) -> torch.Tensor:
    """int64 ``[tokens, topk]``: uniform choices without repetition, the same for the same (rank, seed) everywhere."""
    return torch.rand(shape.tokens, shape.experts, generator=_chance(rank, seed)).topk(shape.topk, dim=1).indices


def _chance(rank: int, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 100_003 + rank)


class Batch:
    """One rank's tokens of one round: ``x`` [tokens, hidden], ``topk_idx`` and ``topk_weights`` [tokens, topk]."""

    def __init__(self, shape: Shape, rank: int, seed: int) -> None:
        self.shape = shape
        self.placement = shape.config().placement_for(shape.ranks)
        chance = _chance(rank, seed + 1_000)
        self.topk_idx = routing(shape, rank, seed)
        self.x = torch.randn(shape.tokens, shape.hidden, generator=chance).to(shape.torch_dtype)
        self.topk_weights = torch.randn(shape.tokens, shape.topk, generator=chance).softmax(dim=1)

    @cached_property
    def of_identity(self) -> Answer:
        """What the timed rounds must give, in which every expert returns what it got."""
        return Answer(self, torch.ones(self.shape.experts))

    @cached_property
    def of_factors(self) -> Answer:
        """What the checking rounds must give, in which each expert multiplies by a factor of its own."""
        return Answer(self, expert_factors(self.shape))


def expert_factors(shape: Shape) -> torch.Tensor:
    """float32 ``[experts]``. Were all experts alike, a row at the wrong one would be summed as if it were right."""
    return 1 + torch.arange(shape.experts) / shape.experts


class Answer:
    """The reference's output for a batch, and how far a system that sums in another order may be from it."""

    def __init__(self, batch: Batch, factors: torch.Tensor) -> None:
        from fault_a2a import reference

        shape = batch.shape
        self.reference = reference

        def expert(number: int, rows: torch.Tensor) -> torch.Tensor:
            return scaled(rows, factors[number])

        def layer(x: torch.Tensor) -> torch.Tensor:
            return reference.moe_layer(
                x, batch.topk_idx, batch.topk_weights, expert, reduce=shape.reduce, placement=batch.placement
            )

        self.out = layer(batch.x)
        # One step of the payload type for the last rounding, and what float32 sums in another order may differ by,
        # which goes with the size of what is summed. Shares that are rounded on their way add a step each.
        step = torch.finfo(shape.torch_dtype).eps
        sums = layer(batch.x.abs()).float()
        self.limit = step * self.out.float().abs() + (step if shape.reduce == "expert" else 2.0**-20) * sums

    def trouble(self, out: torch.Tensor, bit_exact: bool) -> str:
        """What is wrong with ``out``; empty if nothing is."""
        out = out.cpu()
        if out.shape != self.out.shape or out.dtype != self.out.dtype:
            return f"the output is {tuple(out.shape)} {out.dtype}, not {tuple(self.out.shape)} {self.out.dtype}"
        if torch.equal(out.view(torch.uint8), self.out.view(torch.uint8)):
            return ""
        if bit_exact:
            num_wrong = int((~self.reference.same_bits(out, self.out)).sum())
            return f"{num_wrong} of {out.numel()} elements have other bits than the reference" if num_wrong else ""
        difference = (out.float() - self.out.float()).abs()
        num_wrong = int((~(difference <= self.limit)).sum())  # a NaN is wrong too
        return f"{num_wrong} of {out.numel()} elements are beyond the tolerance" if num_wrong else ""


def scaled(rows: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``rows`` times ``factor`` in float32, rounded once to the dtype of ``rows``: the same bits for any batch."""
    return (rows.float() * factor).to(rows.dtype)


TOLERANCE = (
    "one step of the payload type (eps x |out|), plus 2^-20 (reduce=owner) or eps (reduce=expert) x the sum of the "
    "absolute values that are summed"
)
