"""vLLM's all-to-all manager over fault_a2a: who is gone, in vLLM's polarity, and what vLLM may ask for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.distributed.device_communicators.base_device_communicator import All2AllManagerBase

from fault_a2a import metrics
from fault_a2a.integrations import settings
from fault_a2a.integrations.rank_buffers import RankBuffers
from fault_a2a.log_events import tell


class FaultA2AManager(All2AllManagerBase):
    """The manager of an expert-parallel group.

    vLLM makes a new one whenever its groups change and the layers keep what ``get_handle`` gave them, so the buffers
    belong to the process and not to a manager.
    """

    _buffers: ClassVar[RankBuffers | None] = None
    _ep_size: ClassVar[int] = 0
    _lock: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, cpu_group: Any, tcp_store_group: Any = None) -> None:
        super().__init__(cpu_group, tcp_store_group)
        self.support_fault_tolerance = True

    @property
    def max_num_ep_ranks(self) -> int:
        """Ranks that received rows have room for."""
        return self._made().num_ranks

    def get_handle(self, kwargs: dict[str, Any]) -> RankBuffers:
        """What every layer of this process works on. Not collective: a buffer is made by the first layer that runs.

        In a process that joins a group that runs (vLLM's own scale-up, or ``FAULT_A2A_JOIN=1``), layers run alone until
        its first step begins.

        Args:
            kwargs: of a layer: ``max_num_tokens_per_dp_rank``, ``token_hidden_size``, ``num_local_experts``. Layers may
                differ in all of them.
        """
        cls = FaultA2AManager
        with cls._lock:
            if cls._buffers is None:
                group = self.tcp_store_group if self.tcp_store_group is not None else self.cpu_group
                joins = bool(envs.VLLM_ELASTIC_EP_SCALE_UP_LAUNCH) or settings.JOIN.value() == "1"
                if joins:
                    _check_step_starts(f"rank {self.rank} cannot join")
                made = RankBuffers(group, max_num_ranks=self._room(), joins=joins, **settings.timeouts())
                port = int(settings.METRICS_PORT.value())
                if port:
                    metrics.serve(lambda: made.all, port + self.rank)
                cls._buffers = made
                cls._ep_size = self.world_size
            return cls._buffers

    def _room(self) -> int:
        """Ranks that the group may ever have: ``--elastic-ep-max-dp-size``, in ranks."""
        parallel = get_current_vllm_config().parallel_config
        if not parallel.enable_elastic_ep:
            return self.world_size
        return self.world_size * parallel.elastic_ep_max_dp_size // parallel.data_parallel_size

    @classmethod
    def begin_step(cls) -> None:
        """Marks the start of one of vLLM's steps; see ``RankBuffers.begin_step``, which says how it blocks and raises.

        Called by vLLM's worker before each batch, dummy ones included. Nothing before a layer has asked for a handle.
        """
        if FaultA2AManager._buffers is not None:
            FaultA2AManager._buffers.begin_step()

    def _made(self) -> RankBuffers:
        buffers = FaultA2AManager._buffers
        if buffers is None:
            raise RuntimeError("no layer has asked for a handle yet; call get_handle first")
        return buffers

    # -- faults --------------------------------------------------------------------------------------------------------

    def query_active_mask(self) -> torch.Tensor:
        """int32 ``[ranks of the group]``, **1 = gone**, in vLLM's polarity. Does not block."""
        buffers = self._made()
        masked = buffers.mask_status()[: FaultA2AManager._ep_size]
        return torch.tensor(masked, dtype=torch.int32, device=buffers.device)

    def query_fault(self) -> torch.Tensor:
        """A bool scalar: is a rank gone, or a choice lost, that was not acknowledged? Does not block.

        With ``FAULT_A2A_ON_FAULT=serve`` it is never true: what happened is acknowledged here, the step in which it
        happened is served with what it had, and the steps after it by the experts that are left. A rank that may not go
        on without the others learns so from its next layer, which raises.
        """
        fault = self._made().has_fault()
        if fault and settings.ON_FAULT_SETTING.value() == "serve":
            self.acknowledge_fault()
            fault = False
        return torch.tensor(fault, device=self._made().device)

    def acknowledge_fault(self) -> None:
        """``query_fault`` tells only of what comes after this. Ranks that are gone stay gone."""
        newly_gone = self._made().acknowledge()
        if newly_gone:
            buffers = self._made()
            epoch = max(buffer.view.epoch for buffer in buffers.all)
            tell("fault_acknowledged", rank=buffers.rank, epoch=epoch, gone=newly_gone)

    def clean_buffers(self) -> None:
        """vLLM's recovery: rounds that an exception left open are closed, and the fault is acknowledged.

        A rank that the group left out while it lived (it hung, or its link did) comes back at the next step start, and
        the others wait for it there: vLLM calls this on every rank before any of them goes on. Blocks as
        ``Buffer.abandon`` does if there are open rounds. Rows need no cleaning: words carry their round and
        epoch, so those of a step that failed are not taken later.
        """
        if FaultA2AManager._buffers is not None:
            FaultA2AManager._buffers.abandon_open()
            self.acknowledge_fault()
            if settings.STEP_STARTS.value() == "1":
                FaultA2AManager._buffers.come_back()

    def update_mask(self, rank: int, masked: bool) -> None:
        """From now on this rank's tokens go around ``rank``, or no longer do.

        Its place in the group is not touched: who is in is decided by the group, on evidence.

        Raises:
            ValueError: ``rank`` is none of this group's, or this rank itself.
            RuntimeError: a rank that the group left out was to be unmasked.
        """
        buffers = self._made()
        if not 0 <= rank < buffers.num_ranks or rank == buffers.rank:
            raise ValueError(
                f"rank is {rank}; give another rank than {buffers.rank}, from 0 to {buffers.num_ranks - 1}"
            )
        if masked:
            buffers.masked.add(rank)
        elif buffers.gone()[rank]:
            raise RuntimeError(f"rank {rank} was left out by the group and cannot be unmasked; start it again, to join")
        else:
            buffers.masked.discard(rank)

    # -- elastic expert parallelism ------------------------------------------------------------------------------------

    def stage_ep_size(self) -> None:
        """Prepares for ``world_size`` ranks: newcomers find this one on the store of this manager's group.

        Called on every member, on the manager of the groups that are to come. Does not block. A rank whose place a new
        process takes is staged as one that is new: with as many ranks as before.

        Raises:
            NotImplementedError: there is no room for so many, no layer has run yet, or step starts are not marked.
        """
        self._check_size()
        buffers = self._made()
        if self._to_come():
            _check_step_starts(f"ranks {self._to_come()} cannot join")
            if not buffers.all:
                raise NotImplementedError("no layer has run yet, so there is nothing to join; run a step first")
        buffers.be_found_at(self.tcp_store_group if self.tcp_store_group is not None else self.cpu_group)

    def commit_ep_size(self) -> None:
        """From now on the group is the first ``world_size`` ranks. Does not block.

        Ranks beyond have left already, or are left out as soon as a round would wait for them. Ranks that are not in
        are waited for by the next step start, to which they come in their own first step.

        Raises:
            NotImplementedError: as ``stage_ep_size``.
        """
        self._check_size()
        buffers = self._made()
        gone, missing = buffers.gone(), buffers.missing()
        for rank in range(self.world_size, buffers.num_ranks):
            if not gone[rank] or rank in missing:  # and not what there is only room for
                buffers.leave_out(rank)
        buffers.expect(self._to_come())
        FaultA2AManager._ep_size = self.world_size

    def _to_come(self) -> list[int]:
        return [rank for rank, gone in enumerate(self._made().gone()[: self.world_size]) if gone]

    def _check_size(self) -> None:
        num_ranks = self._made().num_ranks
        if self.world_size > num_ranks:
            raise NotImplementedError(
                f"the group has room for {num_ranks} ranks and cannot grow to {self.world_size}; restart it with "
                "--elastic-ep-max-dp-size for as many as it may ever have"
            )

    @contextmanager
    def mask_remote_ranks(self) -> Iterator[None]:
        """While it lasts, layers run on this rank's own experts and send nothing: to warm up before others come."""
        buffers = self._made()
        buffers.warms_up = True
        try:
            yield
        finally:
            buffers.warms_up = False

    # -- the rest ------------------------------------------------------------------------------------------------------

    def max_sms_used(self) -> int | None:
        return 0

    def destroy(self) -> None:
        """Not the end of the buffers: vLLM does this whenever its groups change. They leave with the process."""


def _check_step_starts(what_cannot: str) -> None:
    if settings.STEP_STARTS.value() != "1":
        raise NotImplementedError(
            f"{what_cannot}: ranks come only at step starts, and FAULT_A2A_STEP_STARTS=0 leaves them unmarked; set it "
            "to 1 on every rank"
        )
