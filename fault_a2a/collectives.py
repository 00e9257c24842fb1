"""Small collectives beside the rounds: a few bytes of every rank, and the same answer on all who go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fault_a2a.checks import check_kind
from fault_a2a.config import Config

_DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


@dataclass(frozen=True)
class Contributions:
    """Whose contributions a collective is made of; the same on every rank that returns from it and goes on.

    Attributes:
        contributed: int32 ``[num_ranks]``, 1 = its contribution is in. A rank that goes on is always in.
        epoch: of the view in which this rank returned; it may differ between ranks, ``contributed`` may not.
    """

    contributed: torch.Tensor
    epoch: int

    @property
    def complete(self) -> bool:
        """Every rank of the group is in."""
        return bool(self.contributed.all())


class Collectives:
    """The part of ``Buffer`` that gathers and reduces small tensors."""

    config: Config
    core: Any
    _check_open: Callable[[], None]
    _raise_for: Callable[[str], None]

    def all_gather(self, x: torch.Tensor) -> tuple[torch.Tensor, Contributions]:
        """Every rank's ``x``, at most ``config.max_collective_bytes``: what an engine must agree on beside the rounds.

        Collective: every active rank calls it, in the same order among its rounds and collectives, with the same shape
        and dtype; rounds may be open. Blocks until all have said the same set of contributors, or the missing ones are
        out of the view; dead peers raise nothing. Not capturable: it runs on the CPU, without the GIL.

        All ranks that return, and that the group goes on with, return the same bytes of the same contributors, whoever
        dies in the middle (docs/protocol.md, section 11).

        Args:
            x: any shape with at least one element, contiguous, CPU; float32, float64, float16, bfloat16, an integer
                type or bool.

        Returns:
            ``out`` ``[num_ranks, *x.shape]``, zeros for ranks that are not in; and whose contributions it has.

        Raises:
            ValueError, TypeError: naming the argument, before anything is sent.
            RuntimeError: another rank gave another number of bytes (all who see it raise); or the last collective lost
                its quorum and is still open with other bytes.
            RankEvictedError, ClosedError: this rank may not go on.
            QuorumLostError: the collective stays open; the same call goes on with it.
        """
        self._check_open()
        _check_contribution(x, self.config.max_collective_bytes)
        num_ranks: int = self.num_ranks  # type: ignore[attr-defined]
        out = torch.empty([num_ranks, *x.shape], dtype=x.dtype)
        contributed = torch.empty([num_ranks], dtype=torch.uint8)
        num_bytes = x.numel() * x.itemsize
        status, epoch, odd_rank = self.core.gather_all(x.data_ptr(), num_bytes, out.data_ptr(), contributed.data_ptr())
        if status == "other_bytes":
            raise RuntimeError(
                "the last collective lost its quorum and is still open: call it again with the bytes that it had, "
                "since other ranks may have them already"
            )
        self._raise_for(status)
        if odd_rank >= 0:
            raise RuntimeError(
                f"x has {num_bytes} bytes here and another number on rank {odd_rank}; give the same shape and dtype on "
                "every rank, and make the calls in the same order"
            )
        return out, Contributions(contributed.int(), epoch)

    def all_reduce(self, x: torch.Tensor, op: str = "sum") -> tuple[torch.Tensor, Contributions]:
        """The sum, maximum or conjunction of every rank's ``x``: ``all_gather``, and then the same order everywhere.

        Collective, blocking and uniform as ``all_gather``, with the same bounds and errors.

        Args:
            x: as for ``all_gather``.
            op: ``"sum"``: in the order of ranks, each step rounded to the dtype of ``x`` (float32 inside for float16
                and bfloat16, rounded once; integers wrap around; bool: or). ``"max"``; a NaN stays one. ``"and"``:
                of bits, for integers and bool.

        Returns:
            ``out`` of the shape and dtype of ``x``: the same bits on all ranks; and whose contributions are in it.
        """
        if op not in _REDUCTIONS:
            raise ValueError(f"op is {op!r}; give one of {', '.join(_REDUCTIONS)}")
        check_kind("x", x)
        if op == "and" and x.is_floating_point():
            raise TypeError(f"op is 'and' and x is {x.dtype}; give integers or bool")
        gathered, contributions = self.all_gather(x)
        ranks = contributions.contributed.nonzero()[:, 0].tolist()
        return _REDUCTIONS[op]([gathered[rank] for rank in ranks]), contributions


def _check_contribution(x: torch.Tensor, most_bytes: int) -> None:
    check_kind("x", x)
    if x.dtype not in _DTYPES:
        raise TypeError(f"x is {x.dtype}; convert it to a float type of 16 to 64 bits, an integer type or bool")
    if x.numel() == 0:
        raise ValueError(f"x has shape {list(x.shape)} and no element; give at least one")
    if not x.is_contiguous():
        raise ValueError(f"x is not contiguous (strides {x.stride()}); give x.contiguous()")
    if x.numel() * x.itemsize > most_bytes:
        raise ValueError(
            f"x has {x.numel() * x.itemsize} bytes; give at most max_collective_bytes = {most_bytes}, or build the "
            "Buffer with a larger one"
        )


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    # One after the other: torch.sum over ranks may choose another order for another number of them.
    wide = torch.float32 if parts[0].dtype in (torch.float16, torch.bfloat16) else parts[0].dtype
    total = parts[0].to(wide, copy=True)
    for part in parts[1:]:
        total += part.to(wide)
    return total.to(parts[0].dtype)


def _max(parts: list[torch.Tensor]) -> torch.Tensor:
    most = parts[0].clone()
    for part in parts[1:]:
        torch.maximum(most, part, out=most)
    return most


def _and(parts: list[torch.Tensor]) -> torch.Tensor:
    common = parts[0].clone()
    for part in parts[1:]:
        common &= part
    return common


_REDUCTIONS: dict[str, Callable[[list[torch.Tensor]], torch.Tensor]] = {"sum": _sum, "max": _max, "and": _and}
