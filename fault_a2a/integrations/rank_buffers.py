"""The buffers of one expert-parallel group, made when a layer first needs them, and what they know of the peers.

Engines say how many tokens, experts and elements a layer has long before they say how many choices a token has, so a
buffer is made by the first dispatch. Layers of one shape share a buffer; each buffer keeps its own views, and a rank
counts as gone here as soon as it is gone from any of them.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from fault_a2a.buffer import Buffer
from fault_a2a.config import DEFAULT_CHUNK_TOKENS, Config
from fault_a2a.errors import JoinError
from fault_a2a.gpu import is_capturing
from fault_a2a.group import Group, as_group
from fault_a2a.integrations import notices
from fault_a2a.rounds import Handle, Outcome, Received, RecvHook
from fault_a2a.testing.virtual import LocalFabric

# Patience with a rank that is meant to go. Not one millisecond: a waiting rank looks up every eighth of it, and takes a
# look that comes late by a quarter for its own sleep, after which it starts to count anew.
LEAVING_STALL_MS = 200
_LOOK_S = 0.002  # between two looks for a rank that is expected


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

    @property
    def name(self) -> str:
        """The same on every rank, whatever its kernels run on, and different from any other shape's."""
        sizes = f"{self.hidden}x{self.num_local_experts}x{self.num_topk}x{self.num_max_tokens}"
        return f"{sizes}-{str(self.dtype).removeprefix('torch.')}-{self.quantized or 'as-is'}"

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


@dataclass(frozen=True)
class Expected:
    """A new life of ``rank``, which is to come into ``buffer``. ``former``: the life before, 0 for none."""

    buffer: Buffer
    rank: int
    former: int

    @property
    def is_in(self) -> bool:
        return self.buffer.view.incarnations[self.rank] != self.former


class RankBuffers:
    """Every buffer of this rank in one group.

    Args:
        group: what ``fault_a2a.Buffer`` takes.
        max_num_ranks: ranks that there is to be room for; ``None``: as many as the group has. The same on every rank.
        joins: the group runs already, and this process takes the place of its rank in it, at its first
            ``begin_step``. Until then its layers run alone.
        timeouts: fields of ``Config``.
    """

    def __init__(self, group: Any, *, max_num_ranks: int | None = None, joins: bool = False, **timeouts: Any) -> None:
        self.group: Group = as_group(group)
        self.num_ranks = max_num_ranks or self.group.num_ranks
        self.timeouts = timeouts
        self.joins = joins
        self.warms_up = False  # rounds stay on this rank while others are not there yet, or not any more
        self.masked: set[int] = set()  # ranks that this rank sends no choices to, at its caller's wish
        self.open_layers: list[OpenLayer] = []
        self.newest_outcome: Outcome | None = None  # of the round that was combined last: what an engine may replay
        self._buffers: dict[LayerShape, Buffer] = {}
        self._alone: dict[LayerShape, Buffer] = {}
        self._acknowledged: set[int] = set()  # ranks whose going is no news
        self._left_out: set[int] = set()
        self._acknowledged_lost = 0
        self._expected: list[Expected] = []
        self._lives: dict[Buffer, tuple[int, ...]] = {}  # of all ranks, at the newest step start
        self._comes_back = False  # this rank was left out, and has told the others that it will be back
        self._asks_who_returns = False
        self._lock = threading.RLock()

    @property
    def rank(self) -> int:
        return self.group.rank

    @property
    def alone(self) -> bool:
        """Do layers run on this rank's own experts only, and send nothing?"""
        return self.warms_up or self.joins

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
                made = Buffer(self._group_of(shape), self._config_of(shape))
                self._buffers[shape] = made
                self._lives[made] = made.view.incarnations
                for rank in self._left_out:
                    made.set_timeouts(rank, stall_ms=LEAVING_STALL_MS)
                notices.tell_running(self.group, self.num_ranks, self._buffers)
            return made

    def _group_of(self, shape: LayerShape) -> Group:
        # A name of its own for each: whoever joins must find this buffer, and not the newest of them all.
        return replace(self.group, name=f"{self.group.name}/{shape.name}")

    def _config_of(self, shape: LayerShape) -> Config:
        return shape.config(self.num_ranks, max_num_ranks=self.num_ranks, **self.timeouts)

    # -- rounds --------------------------------------------------------------------------------------------------------

    def dispatch(
        self, shape: LayerShape, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor
    ) -> tuple[Received, OpenLayer, RecvHook]:
        """Sends the rows of a layer; the hook receives. Blocks and raises as ``Buffer.dispatch`` with a hook does."""
        order = None
        if self.alone:
            if is_capturing(x.device):
                # Its replays would go on running alone, and nothing would tell.
                raise NotImplementedError(
                    "a graph that is captured while this rank runs alone would never reach the others; start a rank "
                    "that joins later without graphs (--enforce-eager)"
                )
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
            if self._is_in(opened.handle.buffer):  # nobody waits for the answers of a rank that was left out
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
        return [rank for rank in self.missing() if rank not in self._acknowledged]

    def missing(self) -> list[int]:
        """Ranks that are gone, without those that there is only room for."""
        known = [buffer.view.incarnations for buffer in self.all]
        return [rank for rank, gone in enumerate(self.gone()) if gone and any(lives[rank] for lives in known)]

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

    # -- who comes -----------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Marks a step start: ranks come, and come back, only here.

        Every rank calls it where no layer is open, at the same place among its layers; calling it twice there does no
        harm. Costs next to nothing but when somebody comes. Blocks as ``Buffer.begin_step`` does; while ranks are
        expected until they are in, at most ``stall_ms``, as for any rank that does not move on; and on a rank that
        joins until it is in, at most ``construct_timeout_ms``. Not capturable.

        Raises:
            JoinError: a rank that was expected did not come, or this one was not let in.
            RuntimeError, RankEvictedError, QuorumLostError, ClosedError: as ``Buffer.begin_step``.
        """
        if self.warms_up:
            return
        if self.joins:
            self._join()
        if self._asks_who_returns:
            self._asks_who_returns = False
            self._expect_returns()
        for buffer in self.all:
            if self._comes_back and not self._is_in(buffer):
                buffer.rejoin()
            self._begin_step_of(buffer)
        if self._comes_back:
            self._comes_back = False
            self._expect_with_others()
        if self._expected:
            self._wait_for_expected()

    def be_found_at(self, group: Any) -> None:
        """Newcomers look for this rank on the store of ``group`` from now on. Not collective; does not block.

        Raises:
            ValueError: this rank has another number there.
        """
        found_at = as_group(group)
        if found_at.rank != self.rank:
            raise ValueError(f"group: rank {self.rank} is {found_at.rank} in it; a rank keeps its number")
        with self._lock:  # engines prepare on a thread of their own, while layers run
            self.group = found_at
            for shape, buffer in self._buffers.items():
                buffer.be_found_at(found_at.store, self._group_of(shape).name)
            notices.tell_running(self.group, self.num_ranks, self._buffers)

    def expect(self, ranks: list[int]) -> None:
        """The next ``begin_step`` waits until new lives of ``ranks`` are in, those that are in already excepted.

        For ranks that all others wait for as well, since an engine's other collectives count steps too: called on every
        member, in the same step.
        """
        for buffer in self.all:
            view = buffer.view
            wanted = [Expected(buffer, rank, view.incarnations[rank]) for rank in ranks if not view.active_mask[rank]]
            self._expected += [one for one in wanted if one not in self._expected]
        self._tell_expected()

    def _tell_expected(self) -> None:
        names = {id(buffer): shape.name for shape, buffer in self._buffers.items()}
        told = [(names[id(one.buffer)], one.rank, one.former) for one in self._expected]
        notices.tell_expected(self.group, told)

    def _expect_with_others(self) -> None:
        """What a rank does that has come in: it is a member now, at whose step start the next newcomer comes in."""
        gone = self.gone()
        members = [rank for rank in range(self.num_ranks) if not gone[rank]]  # the dead may have waited in vain
        by_name = {shape.name: buffer for shape, buffer in self._buffers.items()}
        for name, rank, former in sorted(notices.find_expected(self.group, members)):
            one = Expected(by_name[name], rank, former)
            if not one.is_in and one not in self._expected:
                self._expected.append(one)

    def come_back(self) -> None:
        """After a fault, on every rank that lives: who was left out comes back at the next step start, and the others
        wait for it there. All must have called this before any of them comes to it.
        """
        lost = [buffer for buffer in self.all if not self._is_in(buffer)]
        if lost:
            self._comes_back = True
            notices.tell_return(self.group, [int(buffer.core.incarnation()) for buffer in lost])
        self._asks_who_returns = True

    def _is_in(self, buffer: Buffer) -> bool:
        return bool(buffer.views()[-1][0].active_mask[self.rank])

    def _expect_returns(self) -> None:
        # What a rank told before an earlier return is still there: it speaks of a life that no view knows any more.
        for rank, lost in notices.find_returns(self.group, self.missing()).items():
            if any(buffer.view.incarnations[rank] in lost for buffer in self.all):
                self.expect([rank])

    def _wait_for_expected(self) -> None:
        deadline = self._deadline("stall_ms")
        while self._expected:
            self._expected = [one for one in self._expected if not one.is_in]
            if self._expected and time.monotonic() >= deadline:
                missing, self._expected = sorted({one.rank for one in self._expected}), []
                self._tell_expected()
                raise JoinError(
                    f"ranks {missing} were expected at this step start and did not come; from the next one on nobody "
                    "waits for them until they are announced again"
                )
            for buffer in {id(one.buffer): one.buffer for one in self._expected}.values():
                self._begin_step_of(buffer)
                time.sleep(_LOOK_S)

    def _begin_step_of(self, buffer: Buffer) -> None:
        view = buffer.begin_step()
        before = self._lives.get(buffer)
        if before == view.incarnations:
            return
        self._lives[buffer] = view.incarnations
        for rank, life in enumerate(view.incarnations):
            if before is not None and life != before[rank]:
                self._greet(rank)

    def _greet(self, rank: int) -> None:
        """What was known of the former life says nothing of this one: that it went is news again."""
        self._acknowledged.discard(rank)
        self.masked.discard(rank)
        if rank in self._left_out:
            self._left_out.discard(rank)
            for buffer in self.all:
                buffer.set_timeouts(rank, stall_ms=buffer.config.stall_ms)

    def _join(self) -> None:
        deadline = self._deadline("construct_timeout_ms")
        running = notices.find_running(self.group, self.num_ranks, deadline)
        if running.num_ranks != self.num_ranks:
            raise JoinError(
                f"the group has room for {running.num_ranks} ranks, and this process was told of {self.num_ranks}; "
                "start it with the members' own settings"
            )
        # Whoever is not waited for comes into one buffer in one step and into the next in another.
        while len(running.shapes) > 1 and not self._is_expected_by_others():
            if time.monotonic() >= deadline:
                raise JoinError(
                    f"the layers of this group have {len(running.shapes)} shapes, and no member waits for rank "
                    f"{self.rank}; let the engine commit its coming on every member (commit_ep_size)"
                )
            time.sleep(_LOOK_S)
        for fields in running.shapes:
            shape = LayerShape(**fields)
            group = replace(self._group_of(shape), num_ranks=self.num_ranks)
            self._buffers[shape] = Buffer(group, self._config_of(shape), join=True)
        self.joins = False
        self._acknowledged |= set(self.missing())  # they were gone before this rank came
        notices.tell_running(self.group, self.num_ranks, self._buffers)
        self._expect_with_others()

    def _is_expected_by_others(self) -> bool:
        return any(rank == self.rank for _, rank, _ in notices.find_expected(self.group, range(self.num_ranks)))

    def _deadline(self, timeout: str) -> float:
        return time.monotonic() + self.timeouts.get(timeout, getattr(Config, timeout)) / 1000

    def close(self) -> None:
        """Leaves the group. Not collective, bounded, may be repeated."""
        with self._lock:
            for buffer in [*self._buffers.values(), *self._alone.values()]:
                buffer.close()
