"""What the two verbs return: received rows, the handle between them, hooks, and the outcome of each choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from fault_a2a.buffer import Buffer

NUM_LANES = 2


class Verbs(Protocol):
    """Who runs a rank's rounds: its native core, or kernels outside of it that speak the same bytes.

    Tensors go by address, and statuses by name (``Status`` in the core). Every call may block, and ends: peers that
    died raise nothing. ``csrc/bindings/module.cpp`` has the arguments one by one.
    """

    def dispatch_send(
        self, x: int, scales: int, topk_idx: int, idx_is_64_bit: bool, topk_weights: int, num_tokens: int
    ) -> tuple[str, int, int, int, int, int]: ...
    def dispatch_receive(
        self, round_number: int, recv_x: int, recv_scales: int, recv_weights: int, counts: int, offsets: int
    ) -> tuple[str, int, int, int, int, int]: ...
    def combine_send(self, y: int, round_number: int) -> str: ...
    def combine_receive(self, round_number: int, out: int, codes: int, lost: int, topk_weights: int = 0) -> str: ...
    def abandon(self, round_number: int) -> str: ...
    def open_tokens(self, round_number: int) -> int: ...
    def sources(self, round_number: int) -> list[Any]: ...
    def stats(self) -> dict[str, int]: ...
    def source_stats(self) -> list[Any]: ...
    def begin_step(self) -> tuple[str, bool]: ...
    def close(self) -> None: ...


def verbs_for(backend: str, endpoint: Any, fields: dict[str, Any], device: torch.device) -> Verbs:
    """Of an endpoint that has opened its peers; ``fields``: what it was made from (``core_fields``)."""
    if backend == "cuda":
        from fault_a2a.kernels.cuda.rank import Rank as CudaRank

        return CudaRank(endpoint, device)
    if backend != "triton":
        return endpoint
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "backend: 'triton' needs Triton; run `pip install 'fault_a2a[triton]'`, or pass 'cpu'."
        ) from error
    from fault_a2a.kernels.triton.rank import Rank

    return Rank(endpoint, fields)


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

    def to(self, device: torch.device) -> Received:
        """The same there; itself if it is there."""
        scales = None if self.scales is None else self.scales.to(device)
        weights = None if self.weights is None else self.weights.to(device)
        return Received(self.x.to(device), self.num_tokens.to(device), self.offsets.to(device), scales, weights)

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
        rows = self.buffer.verbs.sources(round_number)
        return torch.tensor(rows, dtype=torch.int32).reshape(-1, 5)


def check_is_handle(handle: Any) -> None:
    """Raises a ``TypeError`` for what is none."""
    if not isinstance(handle, Handle):
        raise TypeError(f"handle is a {type(handle).__name__}; give the handle that dispatch returned")


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

    Blocks as the whole call would. Until then the tensors that came with it hold nothing. Not for compiled code, since
    a hook is a Python object; and no test captures calls with hooks in a graph.
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
