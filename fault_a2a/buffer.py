"""The public object: a rank's buffer, with dispatch, combine, and what it knows of its group."""

from __future__ import annotations

import json
import os
import time
import weakref
from collections.abc import Callable
from typing import Any, Literal, overload

import torch

from fault_a2a import ops
from fault_a2a._core import core
from fault_a2a.backends import resolved
from fault_a2a.checks import check_kind, check_kinds
from fault_a2a.collectives import Collectives
from fault_a2a.config import MAX_MS, MIN_BEATS_PER_SILENCE, Config
from fault_a2a.core_fields import core_fields
from fault_a2a.core_status import error_of
from fault_a2a.errors import ClosedError, ConstructError, FaultA2AError
from fault_a2a.gpu import device_of, gpu_fields, of_several_hosts
from fault_a2a.group import Group, as_group, forget_names, host_of_this_process
from fault_a2a.halves import Halves
from fault_a2a.joins import WayIn, tell_life
from fault_a2a.lent_memory import LendsMemory
from fault_a2a.lives import Membership
from fault_a2a.membership import MembershipThread, View, arbiter_for
from fault_a2a.placement import as_whole_number
from fault_a2a.planted_faults import PlantedFaults
from fault_a2a.rounds import Handle, Outcome, Received, RecvHook, SourceStats, Verbs, check_is_handle, verbs_for


class Buffer(Halves, Collectives, LendsMemory, Membership, PlantedFaults):
    """One rank's end of the all-to-all.

    Construction is collective and blocks, at most ``config.construct_timeout_ms``. Everything else is per rank.
    One thread at a time may be inside ``dispatch`` or ``combine``; they release the GIL while they wait.

    Args:
        group: a ``fault_a2a.Group``, or a ``torch.distributed`` process group.
        config: the same on every rank.
        join: become ``group.rank`` of a group that runs already, in the place of a life that was evicted. Blocks until
            the members, all of whom call ``begin_step``, have let this process in; not collective.

    Raises:
        TypeError: ``group`` or ``config`` is something else.
        ValueError: ``config`` does not fit this group or machine (its placement or ``max_num_ranks``; Triton's kernels
            on a GPU that cannot reach the windows); or ``join`` with virtual ranks.
        ImportError: ``backend="triton"``, and Triton is not installed.
        RuntimeError: ``backend="cuda"``, and there is no libnvrtc, or it does not compile the kernels.
        ConstructError: ranks are missing, on another host, or were built with another ``config``; or
            ``backend="cuda"``, and torch finds no GPU.
        JoinError: with ``join``: no member was found, or they do not fit this process, did not let it in in time, or
            evicted it again before it could begin. They are not affected.
    """

    def __init__(self, group: Any, config: Config, *, join: bool = False) -> None:
        self.group: Group = as_group(group)
        if not isinstance(config, Config):
            raise TypeError(f"config is a {type(config).__name__}; give a fault_a2a.Config")
        if join and self.group.fabric is not None:
            raise ValueError("join: virtual ranks cannot join; give a Group of processes, without a fabric")
        config = resolved(config)
        self.config = config
        self.device = device_of(config.backend)
        self.placement = config.placement_for(self.num_ranks)
        self.num_local_experts = self.placement.num_local_experts(self.group.rank)
        self.capacity = config.capacity(self.num_ranks)
        self._callbacks: list[Callable[[View], None]] = []
        self._begin_life(join)

    def _begin_life(self, join: bool) -> None:
        self._closed = False
        self._membership: MembershipThread | None = None
        deadline = time.monotonic() + self.config.construct_timeout_ms / 1000
        if join:
            self._come_in(deadline)
        else:
            self.core = self._build_core(deadline)
            self.verbs: Verbs = self.core
            try:
                self._meet_group(deadline)
            except BaseException:
                self.close()
                forget_names(self._token)
                raise
        # Somebody who drops the buffer, or ends the process, leaves the group: the native threads would keep its place
        # for ever, or meet a dying interpreter.
        self._finalizer = weakref.finalize(self, _leave, self.verbs, self._membership)

    # -- construction ------------------------------------------------------------------------------------------------

    @property
    def recv_shape(self) -> list[int]:
        """Of ``recv.x`` as the operator returns it; the packed format is cut to the received rows afterwards."""
        if self.config.recv_format == "batched":
            return [self.num_local_experts, self.capacity, self.config.hidden]
        # A row has one place for each of its experts here.
        return [self.capacity * min(self.config.num_topk, self.num_local_experts), self.config.hidden]

    @property
    def scales_shape(self) -> list[int]:
        """Of ``recv.scales`` as the operator returns it: nothing if rows have none."""
        return [*self.recv_shape[:-1], self.config.num_scales] if self.config.num_scales else [0]

    @property
    def weights_shape(self) -> list[int]:
        """Of ``recv.weights`` as the operator returns it: nothing if they are applied at the owner."""
        return self.recv_shape[:-1] if self.config.weights_at == "expert" else [0]

    def _build_core(self, deadline: float) -> Any:
        self.group, lines = self.group.introduce(self._introduction(), deadline)
        config, group, introductions = self.config, self.group, [line.split(maxsplit=2) for line in lines]
        self._check_same_config([json.loads(config_text) for _, _, config_text in introductions])
        self._token = introductions[0][1]
        hosts = [host for host, _, _ in introductions]
        others = [rank for rank, host in enumerate(hosts) if host != hosts[group.rank]]
        if others and group.fabric is None:
            raise ConstructError(
                f"group: ranks {others} are on another host or see another /dev/shm than rank {group.rank}; "
                "this release connects the processes of one host (containers must share /dev/shm)."
                + of_several_hosts(config.backend, self.device)
            )
        fields = {**core_fields(config, self.num_ranks, group.rank), "num_founders": group.num_ranks}
        fields |= gpu_fields(config, self.device)
        if group.fabric is not None:
            return core.Endpoint(fields, group.fabric.of(fields), "")
        return core.Endpoint(fields, None, self._token)

    def _introduction(self) -> str:
        """Where this process runs, a token that makes the names of this group's shared memory its own, the config."""
        token = f"{time.time_ns():x}{core.now_ns() & 0xFFFFFF:x}"
        return f"{host_of_this_process()} {token} {json.dumps(self.config.compared(self.num_ranks))}"

    def _check_same_config(self, configs: list[dict[str, str]]) -> None:
        for name, value in configs[self.rank].items():
            others = {rank: config.get(name) for rank, config in enumerate(configs) if config.get(name) != value}
            if others:
                rank, other = next(iter(others.items()))
                raise ConstructError(
                    f"ranks {list(others)} were built with another Config than rank {self.rank}: {name} is {other} on "
                    f"rank {rank} and {value} here"
                )

    def _come_in(self, deadline: float) -> None:
        way = WayIn(self.group, self.config, self.device, self.num_ranks, os.getpid(), deadline)
        self.group, self.core = way.group, way.endpoint
        self.verbs = self.core
        try:
            way.go()
            self._open_for_calls(joined=True)
        except BaseException:
            self.close()
            raise

    def _open_for_calls(self, joined: bool = False) -> None:
        fields = core_fields(self.config, self.num_ranks, self.group.rank)
        self.verbs = verbs_for(self.config.backend, self.core, fields, self.device)
        self.id = ops.register(self)
        self._open_memory(self.recv_shape, self.device)
        arbiter = arbiter_for(self.config, self.group)
        self._membership = MembershipThread(self.core, arbiter, self.rank, self._callbacks, joined)

    def _meet_group(self, deadline: float) -> None:
        try:
            self.core.create()
            self.group.meet("created", deadline)
            self.core.open_peers(max(int((deadline - time.monotonic()) * 1000), 0))
            self.group.meet("opened", deadline)
            self._open_for_calls()
            self._warm_up()
            if self.group.fabric is None:
                tell_life(self.group, self.core, os.getpid(), self.config.compared(self.num_ranks))
            self.group.meet("warm", deadline, trouble=self._who_gave_up)
        except FaultA2AError:
            raise
        except RuntimeError as error:
            raise ConstructError(str(error)) from error
        self.core.serve()

    def _warm_up(self) -> None:
        """One empty round through the whole machine, in which only an exit can end a wait."""
        config = self.config
        empty = self._empty([0, config.num_topk], torch.float32)
        x = self._empty([0, config.hidden], config.recv_dtype)
        scales = self._empty([0, config.num_scales], config.scale_dtype) if config.num_scales else None
        received, handle = self.dispatch(x, empty.long(), empty, scales)
        self.combine(self._empty(list(received.x.shape), config.dtype), handle)
        if self._who_gave_up():
            raise ConstructError(self._who_gave_up())

    def _who_gave_up(self) -> str:
        """A sentence about the ranks that died or left during construction; those that left only follow the dead."""
        kinds = {one.rank: one.kind for one in self.evidence()}
        for kind, what in (("exit", "died"), ("left", "gave up")):
            ranks = sorted(rank for rank in kinds if kinds[rank] == kind)
            if ranks:
                return f"ranks {ranks} of group '{self.group.name}' {what} during construction"
        return ""

    # -- the two verbs -----------------------------------------------------------------------------------------------

    @overload
    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        scales: torch.Tensor | None = None,
        *,
        return_recv_hook: Literal[False] = False,
    ) -> tuple[Received, Handle]: ...

    @overload
    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        scales: torch.Tensor | None = None,
        *,
        return_recv_hook: Literal[True],
    ) -> tuple[Received, Handle, RecvHook]: ...

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        scales: torch.Tensor | None = None,
        *,
        return_recv_hook: bool = False,
    ) -> tuple[Received, Handle] | tuple[Received, Handle, RecvHook]:
        """Sends each token to the ranks that hold its experts, and receives what others sent to mine.

        Every active rank calls it the same number of times, with 0 to ``num_max_tokens_per_rank`` tokens. Blocks until
        every active rank's rows are here or its loss is certain; dead peers raise nothing. Not collective in the sense
        that a missing peer could hang it. At most two rounds may be open, one on each lane.

        Capturable with ``backend="cuda"`` and batches of one chunk; tests capture calls without hooks only. A replay
        raises nothing: with a wrong choice, or on a rank that may not go on, its counts are 0 and its choices lost.

        Args:
            x: ``[num_tokens, hidden]``, ``config.dtype``, contiguous, on ``device`` as all tensors; or quantised, in
                ``config.dispatch_dtype``.
            topk_idx: int64 or int32 ``[num_tokens, num_topk]``; -1 for no expert; no expert twice in a row.
            topk_weights: float32 ``[num_tokens, num_topk]``.
            scales: of an ``x`` that comes quantised, ``[num_tokens, config.num_scales]``, ``config.scale_dtype``.
            return_recv_hook: send only, and return a hook that receives, so that other work fits in between. Waits for
                nobody then but at the gate, while a view is being changed. ``x`` must not change before the hook has
                been called; in the packed format ``recv.x`` has its largest shape, of which ``offsets[-1]`` rows count.

        Raises:
            ValueError, TypeError: naming the argument, before anything is sent.
            RuntimeError: a third round would be open.
            RankEvictedError, QuorumLostError, ClosedError: this rank may not go on.
        """
        check_kinds(self.device, x=x, topk_idx=topk_idx, topk_weights=topk_weights)
        if return_recv_hook:
            tensors, hook = self._dispatch_send(x, topk_idx, topk_weights, scales)
            return *self._received(tensors, topk_weights), hook
        tensors = torch.ops.fault_a2a.dispatch(x, topk_idx, topk_weights, self.id, scales)
        received, handle = self._received(tensors, topk_weights)
        is_shaped = torch.compiler.is_compiling() or self.is_captured()
        if self.config.recv_format == "packed" and not is_shaped:
            received = received.cut_to(int(handle.tensor[3]))
        return received, handle

    def _received(self, tensors: tuple[torch.Tensor, ...], topk_weights: torch.Tensor) -> tuple[Received, Handle]:
        """What the operator returned, as its caller sees it."""
        x, num_tokens, offsets, handle, recv_scales, recv_weights = tensors
        scales = None if self.config.num_scales is None else recv_scales
        weights = None if self.config.weights_at == "owner" else recv_weights
        return Received(x, num_tokens, offsets, scales, weights), Handle(handle, topk_weights, self)

    @overload
    def combine(
        self,
        y: torch.Tensor,
        handle: Handle,
        *,
        out: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        return_recv_hook: Literal[False] = False,
    ) -> tuple[torch.Tensor, Outcome]: ...

    @overload
    def combine(
        self,
        y: torch.Tensor,
        handle: Handle,
        *,
        out: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        return_recv_hook: Literal[True],
    ) -> tuple[torch.Tensor, Outcome, RecvHook]: ...

    def combine(
        self,
        y: torch.Tensor,
        handle: Handle,
        *,
        out: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        return_recv_hook: bool = False,
    ) -> tuple[torch.Tensor, Outcome] | tuple[torch.Tensor, Outcome, RecvHook]:
        """Returns each expert row to its owner and sums what came back for my tokens.

        Blocks as ``dispatch`` does, and can be captured where its dispatch was. Sums are float32, in the order of the
        choices, multiply and add rounded separately.

        Args:
            y: the experts' output, contiguous, in the shape of ``recv.x`` and in ``config.dtype``, also where
                ``recv.x`` came in ``config.dispatch_dtype``.
            handle: of the dispatch; good once.
            out: ``[num_tokens, hidden]``, ``config.dtype``, contiguous: written in place and returned, instead of a new
                tensor. Not for compiled code.
            topk_weights: float32 ``[num_tokens, num_topk]``, contiguous, in place of those of the dispatch; only with
                ``reduce="owner"`` and ``weights_at="owner"``. Not for compiled code.
            return_recv_hook: send only, and return a hook that sums. Waits for nobody then. ``y`` must not change
                before the hook has been called, and the round stays open until it has been.

        Returns:
            ``out`` ``[num_tokens, hidden]`` in ``config.dtype``, and the ``Outcome``. ``out`` holds exactly the
            delivered choices.

        Raises:
            ValueError, TypeError: naming the argument, before anything is sent; a handle of another buffer too.
            RuntimeError: the handle's round is not open any more, or its hook has not been called yet.
            RankEvictedError, QuorumLostError, ClosedError: this rank may not go on.
        """
        check_is_handle(handle)
        check_kind("y", y, self.device)
        if return_recv_hook:
            return self._combine_send(y, handle, out, topk_weights)
        if out is not None or topk_weights is not None:
            out, outcome, hook = self._combine_send(y, handle, out, topk_weights)
            hook()
            return out, outcome
        out, codes, lost = torch.ops.fault_a2a.combine(y, handle.topk_weights, handle.tensor, self.id)
        return out, Outcome(codes, lost)

    def abandon(self, handle: Handle) -> None:
        """Closes a round whose experts failed here: peers get nothing for the rows they sent, and are told so.

        Blocks as ``combine`` does. The other ranks and later rounds are not affected. Not capturable.

        Raises:
            ValueError, TypeError: ``handle`` is of another buffer, or none.
            RuntimeError: its round is not open any more.
            RankEvictedError, QuorumLostError, ClosedError: this rank may not go on.
        """
        check_is_handle(handle)
        round_number, *_ = self._check_handle(handle.tensor)
        self._raise_for(self.verbs.abandon(round_number))

    # -- checks: before anything is sent -----------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this buffer is closed.")

    def _raise_for(self, status: str) -> None:
        if status != "ok":
            raise error_of(status, self)

    # -- what this rank knows ----------------------------------------------------------------------------------------

    @property
    def num_ranks(self) -> int:
        """Ranks that there is room for; which of them are in, ``view`` says."""
        return self.config.num_ranks_for(self.group.num_ranks)

    @property
    def num_rounds(self) -> int:
        """The number of the next round: it counts dispatches, construction's warm-up included."""
        return int(self.verbs.stats()["next_round"])

    def source_stats(self) -> list[SourceStats]:
        """One line a rank. Does not block; cheap enough to read once a second."""
        lines = enumerate(self.verbs.source_stats())
        return [SourceStats(rank, *(ns / 1000 for ns in line[:3]), *line[3:]) for rank, line in lines]

    def set_timeouts(self, rank: int, silence_ms: int | None = None, stall_ms: int | None = None) -> None:
        """Changes how long this rank bears with ``rank``, at once. Not collective, does not block.

        It says nothing of how long the others bear with ``rank``: call it on each of them. A ``rejoin`` of this rank
        brings back what ``config`` has.

        Args:
            rank: the peer that is waited for.
            silence_ms: as in ``Config``, ``4 * config.beat_ms`` to a day; ``None`` leaves the value as it is.
            stall_ms: as in ``Config``, 1 to a day; ``None`` leaves the value as it is.

        Raises:
            TypeError, ValueError: naming the argument; nothing is changed then.
        """
        if not 0 <= as_whole_number("rank", rank) < self.num_ranks:
            raise ValueError(f"rank is {rank}; give a number from 0 to {self.num_ranks - 1}")
        # A shorter silence could not be measured: see Config.
        shortest = {"silence_ms": MIN_BEATS_PER_SILENCE * self.config.beat_ms, "stall_ms": 1}
        for name, value in (("silence_ms", silence_ms), ("stall_ms", stall_ms)):
            if value is not None and not shortest[name] <= as_whole_number(name, value) <= MAX_MS:
                raise ValueError(f"{name} is {value}; give {shortest[name]} to {MAX_MS} milliseconds")
        self.core.set_timeouts(rank, silence_ms or 0, stall_ms or 0)

    # -- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Leaves the group: answers open rounds and publishes ``left``. Not collective, bounded, may be repeated."""
        if self._closed:
            return
        self._closed = True
        _leave(self.verbs, self._membership)

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _leave(verbs: Verbs, membership: MembershipThread | None) -> None:
    verbs.close()
    if membership is not None:
        membership.stop()
