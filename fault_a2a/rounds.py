"""What the two verbs return: received rows, the handle between them, hooks, and the outcome of each choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fault_a2a.buffer import Buffer

NUM_LANES = 2


@dataclass(frozen=True)
class Received:
    """What ``dispatch`` brought to this rank's experts. Valid until its combine is sent.

    Attributes:
        x: batched ``[num_local_experts, capacity, hidden]``, of which the first ``num_tokens[e]`` rows of expert ``e``
            are written; packed ``[num_recv, hidden]``. Rows of an expert stand by source rank, then by token.
        num_tokens: int32 ``[num_local_experts]``.
        offsets: int32 ``[num_local_experts + 1]``: where each expert's rows begin in the packed format.
        scales: of quantised rows, ``config.scale_dtype``, shaped as ``x`` with ``config.num_scales`` for ``hidden``;
            else ``None``.
        weights: float32, the weight of each row, shaped as ``x`` without ``hidden``, if
            ``config.weights_at == "expert"``; else ``None``.
    """

    x: torch.Tensor
    num_tokens: torch.Tensor
    offsets: torch.Tensor
    scales: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    def cut_to(self, num_rows: int) -> Received:
        """Packed: only the rows that were received."""
        scales = None if self.scales is None else self.scales[:num_rows]
        weights = None if self.weights is None else self.weights[:num_rows]
        return Received(self.x[:num_rows], self.num_tokens, self.offsets, scales, weights)


@dataclass(frozen=True)
class Handle:
    """What ``combine`` needs of its ``dispatch``; good for one combine on the same buffer."""

    tensor: torch.Tensor
    topk_weights: torch.Tensor
    buffer: Buffer

    @property
    def lane(self) -> int:
        """0 or 1: rounds take the two lanes in turn, and at most one round is open on each."""
        return int(self.tensor[1]) % NUM_LANES

    def sources(self) -> torch.Tensor:
        """int32 ``[num_rows, 5]``, one line a received row: (row of ``recv.x`` seen as two-dimensional, local expert,
        src_rank, token on src_rank, choice of that token). For checks; empty once the round is combined."""
        _, round_number, _, _ = self.tensor.tolist()
        rows = self.buffer.core.sources(round_number)
        return torch.tensor(rows, dtype=torch.int32).reshape(-1, 5)


@dataclass(frozen=True)
class SourceStats:
    """What one peer has cost this rank since construction. Counters that only grow; look at differences.

    Attributes:
        rank: the peer; this rank itself has a line too.
        wait_us: time in which this rank did nothing but wait for it.
        late_us: time in which a word of it was missing while this rank was ready to read it, whoever else was late. The
            straggler of a group is the one with the largest.
        max_late_us: the longest such time.
        num_rows, num_bytes: rows that came from it, dispatched to this rank's experts or returned to its tokens.
        num_failures: dispatches and answers that were not taken whole: declined, refused or given up.
    """

    rank: int
    wait_us: float
    late_us: float
    max_late_us: float
    num_rows: int
    num_bytes: int
    num_failures: int


class RecvHook:
    """The receiving half of a ``dispatch`` or ``combine``: call it once, before what it fills is read.

    Blocks as the whole call would. Until then the tensors that came with it hold nothing. Not for compiled code, nor
    captured: a hook is a Python object.
    """

    def __init__(self, what: str, receive: Callable[[], None]) -> None:
        self._what = what
        self._receive: Callable[[], None] | None = receive

    def __call__(self) -> None:
        receive, self._receive = self._receive, None
        if receive is None:
            raise RuntimeError(f"this hook of {self._what} was called before; call each hook once")
        receive()


@dataclass(frozen=True)
class Outcome:
    """What became of each (token, choice).

    Attributes:
        codes: uint8 ``[num_tokens, num_topk]``: 0 none (``topk_idx`` was -1), 1 delivered, 2 lost in this round,
            3 unroutable (no active rank holds that expert).
        lost: bool, zero-dimensional: any choice was lost. Lies on the device: reading it is up to the engine.
    """

    codes: torch.Tensor
    lost: torch.Tensor

    @property
    def delivered(self) -> torch.Tensor:
        """bool ``[num_tokens, num_topk]``."""
        return self.codes == 1
