"""The buffers of one expert-parallel group, made when a layer first needs them, and what they know of the peers.

Engines say how many tokens, experts and elements a layer has long before they say how many choices a token has, so a
buffer is made by the first dispatch. Layers of one shape share a buffer; each buffer keeps its own views, and a rank
counts as gone here as soon as it is gone from any of them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from fault_a2a.buffer import Buffer
from fault_a2a.config import DEFAULT_CHUNK_TOKENS, Config
from fault_a2a.group import Group, as_group
from fault_a2a.rounds import Handle, Outcome, Received, RecvHook
from fault_a2a.testing.virtual import LocalFabric

# Patience with a rank that is meant to go. Not one millisecond: a waiting rank looks up every eighth of it, and takes a
# look that comes late by a quarter for its own sleep, after which it starts to count anew.
LEAVING_STALL_MS = 200


@dataclass(frozen=True)
class LayerShape:
    """What decides which buffer a layer's rounds go through.

    Attributes:
        num_local_experts: on every rank; expert e stands on rank ``e // num_local_experts``.
        quantized: ``""``: rows travel as they are; ``"float32"`` or ``"ue8m0"``: as fp8 e4m3 with such scales.
        backend: as in ``Config``: where the layer's tensors are (``backend_for``).
    """

    hidden: int
    num_local_experts: int
    num_topk: int
    num_max_tokens: int
    dtype: torch.dtype
    quantized: str = ""
    backend: str = "cpu"

    def config(self, num_ranks: int, **timeouts: Any) -> Config:
        scales = {"float32": torch.float32, "ue8m0": torch.int32}
        return Config(
            num_experts=num_ranks * self.num_local_experts,
            hidden=self.hidden,
            num_topk=self.num_topk,
            num_max_tokens_per_rank=self.num_max_tokens,
            dtype=self.dtype,
            dispatch_dtype=torch.float8_e4m3fn if self.quantized else None,
            scale_dtype=scales[self.quantized] if self.quantized else torch.float32,
            # On a GPU an engine captures its rounds, and a stream cannot be captured.
            num_chunk_tokens=None if self.backend == "cpu" else self.num_max_tokens,
            backend=self.backend,
            **timeouts,
        )


def backend_for(x: torch.Tensor) -> str:
    """What runs the rounds of a layer whose rows are ``x``."""
    return "cuda" if x.is_cuda else "cpu"


@dataclass(eq=False)  # one round is like no other
class OpenLayer:
    """One round of one layer, from its dispatch to its combine."""

    buffers: RankBuffers
    handle: Handle
    order: torch.Tensor | None = None  # which choices were kept, of a round that stayed on this rank

    def combine(
        self, y: torch.Tensor, out: torch.Tensor, topk_weights: torch.Tensor | None = None
    ) -> tuple[Outcome, RecvHook]:
        """Sends the expert rows back; the hook writes ``out``. Blocks as ``Buffer.combine`` with a hook does."""
        if topk_weights is not None:
            topk_weights = topk_weights if self.order is None else topk_weights.gather(1, self.order)
            topk_weights = topk_weights.float().contiguous()
        _, outcome, hook = self.handle.buffer.combine(
            y, self.handle, out=out, topk_weights=topk_weights, return_recv_hook=True
        )
        return outcome, self.buffers.closing(self, outcome, hook)


class RankBuffers:
    """Every buffer of this rank in one group.

    Args:
        group: what ``fault_a2a.Buffer`` takes.
        timeouts: fields of ``Config``.
    """

    def __init__(self, group: Any, **timeouts: Any) -> None:
        self.group: Group = as_group(group)
        self.timeouts = timeouts
        self.alone = False  # rounds stay on this rank while others are not there yet, or not any more
        self.masked: set[int] = set()  # ranks that this rank sends no choices to, at its caller's wish
        self.open_layers: list[OpenLayer] = []
        self.newest_outcome: Outcome | None = None  # of the round that was combined last: what an engine may replay
        self._buffers: dict[LayerShape, Buffer] = {}
        self._alone: dict[LayerShape, Buffer] = {}
        self._acknowledged: set[int] = set()  # ranks whose going is no news
        self._left_out: set[int] = set()
        self._acknowledged_lost = 0
        self._lock = threading.RLock()

    @property
    def rank(self) -> int:
        return self.group.rank

    @property
    def num_ranks(self) -> int:
        return self.group.num_ranks

    @property
    def device(self) -> torch.device:
        """Where the layers' tensors are; the CPU until a layer has run."""
        return next((buffer.device for buffer in self.all), torch.device("cpu"))

    @property
    def all(self) -> list[Buffer]:
        with self._lock:
            return list(self._buffers.values())

    def buffer(self, shape: LayerShape) -> Buffer:
        """The buffer of layers of this shape. Made on the first call, which is collective and blocks: every rank must
        come to its layers in the same order.

        Raises:
            ConstructError: ranks are missing, or do not fit each other.
        """
        with self._lock:
            made = self._buffers.get(shape)
            if made is None:
                made = Buffer(self.group, shape.config(self.num_ranks, **self.timeouts))
                self._buffers[shape] = made
                for rank in self._left_out:
                    made.set_timeouts(rank, stall_ms=LEAVING_STALL_MS)
            return made

    # -- rounds --------------------------------------------------------------------------------------------------------

    def dispatch(
        self, shape: LayerShape, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor
    ) -> tuple[Received, OpenLayer, RecvHook]:
        """Sends the rows of a layer; the hook receives. Blocks and raises as ``Buffer.dispatch`` with a hook does."""
        order = None
        if self.alone:
            buffer = self._buffer_alone(shape)
            topk_idx, order = self._mine(shape, topk_idx)
            topk_weights = topk_weights.gather(1, order)
        else:
            buffer = self.buffer(shape)
            topk_idx = self._without_masked(shape, topk_idx)
        received, handle, hook = buffer.dispatch(
            x.contiguous(), topk_idx.contiguous(), topk_weights.float().contiguous(), return_recv_hook=True
        )
        opened = OpenLayer(self, handle, order)
        self.open_layers.append(opened)
        return received, opened, hook

    def abandon_open(self) -> int:
        """Closes rounds that were begun here and never combined, as after an exception in a layer; returns how many.

        Blocks as ``Buffer.abandon`` does. Without it the next layers would find both lanes taken.
        """
        abandoned, self.open_layers = self.open_layers, []
        for opened in abandoned:
            opened.handle.buffer.abandon(opened.handle)
        return len(abandoned)

    def closing(self, opened: OpenLayer, outcome: Outcome, hook: RecvHook) -> RecvHook:
        """The hook; after it the round is closed, and its outcome stands in ``newest_outcome``."""

        def receive() -> None:
            hook()
            self.open_layers.remove(opened)
            self.newest_outcome = outcome

        return RecvHook("combine", receive)

    def _buffer_alone(self, shape: LayerShape) -> Buffer:
        """A group of one with received rows of the same shape: an engine warms up by itself before others come."""
        with self._lock:
            if shape not in self._alone:
                num_rows = shape.num_max_tokens * self.num_ranks
                num_topk = min(shape.num_topk, shape.num_local_experts)
                alone = replace(shape, num_max_tokens=num_rows, num_topk=num_topk)
                chunk = min(num_rows, DEFAULT_CHUNK_TOKENS) if shape.backend == "cpu" else num_rows
                config = replace(alone.config(1), num_chunk_tokens=chunk)
                self._alone[shape] = Buffer(Group(dist.HashStore(), 0, 1, fabric=LocalFabric()), config)
            return self._alone[shape]

    def _mine(self, shape: LayerShape, topk_idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The choices that this rank holds, first in each row, and where they stood."""
        mine = topk_idx.long() - self.rank * shape.num_local_experts
        mine = torch.where((mine >= 0) & (mine < shape.num_local_experts) & (topk_idx >= 0), mine, -1)
        order = (mine < 0).to(torch.int8).argsort(dim=1, stable=True)[:, : min(shape.num_topk, shape.num_local_experts)]
        return mine.gather(1, order), order

    def _without_masked(self, shape: LayerShape, topk_idx: torch.Tensor) -> torch.Tensor:
        if not self.masked:
            return topk_idx
        masked = torch.tensor(sorted(self.masked), device=topk_idx.device)
        return torch.where(torch.isin(topk_idx // shape.num_local_experts, masked), -1, topk_idx)

    # -- the peers -----------------------------------------------------------------------------------------------------

    def gone(self) -> tuple[int, ...]:
        """One int a rank, **1 = not in the newest view of some buffer**: the polarity of engines, not of views."""
        masks = [buffer.view.active_mask for buffer in self.all]
        return tuple(int(any(not mask[rank] for mask in masks)) for rank in range(self.num_ranks))

    def mask_status(self) -> list[int]:
        """``gone``, and whom this rank's caller does not want to reach. **1 = masked.**"""
        if self.alone:
            return [int(rank != self.rank) for rank in range(self.num_ranks)]
        return [int(gone or rank in self.masked) for rank, gone in enumerate(self.gone())]

    @property
    def num_lost(self) -> int:
        """Choices of this rank's tokens that were lost, since construction."""
        return sum(buffer.verbs.stats()["num_lost"] for buffer in self.all)

    def has_fault(self) -> bool:
        """Is a rank gone, or a choice lost, that nobody has acknowledged?"""
        return self.num_lost > self._acknowledged_lost or bool(self._newly_gone())

    def acknowledge(self) -> list[int]:
        """Faults up to now are known to the engine. Returns the ranks that it did not know of; they stay gone."""
        newly_gone = self._newly_gone()
        self._acknowledged |= set(newly_gone)
        self._acknowledged_lost = self.num_lost
        return newly_gone

    def _newly_gone(self) -> list[int]:
        return [rank for rank, gone in enumerate(self.gone()) if gone and rank not in self._acknowledged]

    @property
    def left_out(self) -> list[int]:
        """Ranks that were left out on purpose."""
        return sorted(self._left_out)

    def leave_out(self, rank: int) -> None:
        """Little patience with ``rank`` from now on: the first round that would wait for it leaves it out.

        For a rank that runs no more rounds, called on every rank that does. It is no fault when it goes.
        """
        self._acknowledged.add(rank)
        self._left_out.add(rank)
        for buffer in self.all:
            buffer.set_timeouts(rank, stall_ms=LEAVING_STALL_MS)

    def close(self) -> None:
        """Leaves the group. Not collective, bounded, may be repeated."""
        with self._lock:
            for buffer in [*self._buffers.values(), *self._alone.values()]:
                buffer.close()
