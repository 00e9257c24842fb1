"""A rank's place is taken by a new process, or a rank comes back, through vLLM's own executor, worker and groups."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
import vllm.distributed.device_communicators.all2all as vllm_all2all
from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel
from vllm.model_executor.layers.fused_moe.all2all_utils import get_ep_all2all_manager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.worker.worker_base import WorkerWrapperBase

from fault_a2a.errors import RankEvictedError
from fault_a2a.integrations.rank_buffers import RankBuffers
from fault_a2a.integrations.vllm import register
from tests.processes import Here
from tests.vllm.layers import Layer
from tests.vllm.scenarios import Death, vllm_groups, vllm_kernel

NUM_BEFORE, NUM_AFTER = 6, 8


class LayersForAWorker:
    """Stands for vLLM's worker below its wrapper: a model that is nothing but MoE layers, each with its own kernel."""

    def __init__(self, rank: int, layers: list[Layer], kernels: list[Any]) -> None:
        self.rank, self.layers, self.kernels = rank, layers, kernels
        self.step = 0
        self.outs: list[torch.Tensor] = []

    def execute_model(self, scheduler_output: SchedulerOutput) -> None:
        if scheduler_output.total_num_scheduled_tokens:
            self.execute_dummy_batch()

    def execute_dummy_batch(self) -> None:
        both = zip(self.layers, self.kernels, strict=True)
        self.outs = [layer.run(kernel, self.rank, self.step) for layer, kernel in both]


@dataclass
class Engine:
    """One rank's: vLLM's own executor and worker wrapper, which mark step starts, over ``LayersForAWorker``."""

    here: Here
    worker: LayersForAWorker
    buffers: RankBuffers
    executor: UniProcExecutor = field(init=False)

    def __post_init__(self) -> None:
        self.executor = UniProcExecutor.__new__(UniProcExecutor)
        self.executor.driver_worker = WorkerWrapperBase()
        self.executor.driver_worker.worker = self.worker
        self.executor.driver_worker.mm_receiver_cache = None

    def run(self, step: int) -> None:
        """As vLLM's busy loop: tokens, if there are any, and else a dummy batch, for the sake of the others."""
        self.worker.step = step
        scheduled = SchedulerOutput.make_empty()
        scheduled.total_num_scheduled_tokens = len(self.worker.layers[0].tokens(self.here.rank, step)[0])
        self.executor.execute_model(scheduled)
        if not scheduled.total_num_scheduled_tokens:
            self.executor.execute_dummy_batch()

    def judged(self, step: int, dead: set[int], healthy: bool) -> list[str]:
        """Runs a step; what is wrong with it. Of several layers the outcome of the last is known."""
        self.run(step)
        last, out = self.worker.layers[-1], self.worker.outs[-1]
        wrong = last.wrong(self.here.rank, step, out, self.buffers.newest_outcome, dead, healthy)
        for layer, out in zip(self.worker.layers[:-1], self.worker.outs[:-1], strict=True):
            _, topk_ids, _ = layer.tokens(self.here.rank, step)
            alive = torch.tensor([rank not in dead for rank in range(layer.num_ranks)])
            expected = layer.expected(self.here.rank, step, alive[topk_ids // layer.num_local_experts])
            error = (out.float() - expected).abs().max().item() if healthy and out.numel() else 0.0
            if not error <= 0.03:
                wrong.append(f"rank {self.here.rank} step {step}: a layer is off by {error}")
        return wrong


def start(here: Here, layers: list[Layer], num_ranks: int, max_num_ranks: int | None) -> Engine:
    """The kernels as vLLM makes them, by its config, groups and factories, under the name ``fault_a2a``."""
    os.environ |= {"FAULT_A2A_VLLM": "1", "FAULT_A2A_STALL_MS": "10000", "FAULT_A2A_JOIN": str(int(here.joins))}
    register()
    # The communicator for CPUs knows one backend, which it imports when it needs it.
    vllm_all2all.AgRsAll2AllManager = vllm_all2all.NixlEPAll2AllManager
    with vllm_groups(here, "fault_a2a", num_ranks=num_ranks, max_num_ranks=max_num_ranks):
        kernels = [vllm_kernel(layer, here.rank) for layer in layers]
        buffers = get_ep_all2all_manager().get_handle({})
    return Engine(here, LayersForAWorker(here.rank, layers, kernels), buffers)


def regroup(here: Here, num_ranks: int, room: int | None, missing: set[int]) -> list[str]:
    """vLLM's groups anew, with the manager that comes with them; what is wrong with what it says."""
    destroy_model_parallel()
    destroy_distributed_environment()
    if missing and here.rank == 0:
        here.store.set("newcomers_meet_at", str(here.store.add("vllm_groups_of/0", 0) + 1))
    with vllm_groups(here, "fault_a2a", num_ranks=num_ranks, max_num_ranks=room):
        manager = get_ep_all2all_manager()
        manager.stage_ep_size()
        manager.commit_ep_size()
        mask = manager.query_active_mask().tolist()
    if mask != [int(rank in missing) for rank in range(num_ranks)]:
        return [f"rank {here.rank}: mask {mask} before the newcomer came"]
    return []


def one_comes(
    here: Here, layers: list[Layer], death: Death | None, num_before: int = NUM_BEFORE, num_after: int = NUM_AFTER
) -> list[str]:
    """Founders run, then a newcomer takes the place of the one that died, or one beyond them; all run on together."""
    room = None if here.num_founders == here.num_ranks else here.num_ranks
    missing = {death.rank} if death else set(range(here.num_founders, here.num_ranks))
    engine = start(here, layers, here.num_ranks if here.joins else here.num_founders, room)
    wrong: list[str] = []
    if here.joins:
        for layer, kernel in zip(layers, engine.worker.kernels, strict=True):
            layer.run(kernel, here.rank, 0)  # as an engine's own warm-up: alone, and no business of the others
    else:
        for step in range(num_before):
            if death is not None:
                death.arm(here, step, engine.buffers)
            is_whole = death is None or step < death.step
            dead = set() if death and is_whole else missing
            wrong += engine.judged(step, dead, healthy=is_whole or step > death.step + 1)
            here.say(("step", step))
        here.hear()
        wrong += regroup(here, here.num_ranks, room, missing)
    for step in range(num_before, num_before + num_after):
        wrong += engine.judged(step, set(), healthy=True)
        here.say(("step", step))
    manager = get_ep_all2all_manager()
    if any(manager.query_active_mask().tolist()):
        wrong.append(f"rank {here.rank}: mask {manager.query_active_mask()} with everybody in")
    if here.joins and bool(manager.query_fault()):
        wrong.append(f"rank {here.rank}: a newcomer sees a fault")
    here.say("done")
    here.hear()
    engine.buffers.close()
    return wrong


def one_leaves_and_comes(here: Here, layer: Layer) -> list[str]:
    """The last rank leaves as planned, and a new process takes its place: vLLM's scale-down, and scale-up again."""
    last = here.num_ranks - 1
    engine = start(here, [layer], here.num_ranks, here.num_ranks)
    wrong: list[str] = []
    if not here.joins:
        wrong += engine.judged(0, set(), healthy=True)
        here.say("ran with all")
        here.hear()
        if here.rank == last:
            engine.buffers.close()
            return wrong
        wrong += regroup(here, last, here.num_ranks, set())
        for step in range(1, NUM_BEFORE):
            wrong += engine.judged(step, {last}, healthy=step > 1)
        here.say("ran with fewer")
        here.hear()
        wrong += regroup(here, here.num_ranks, here.num_ranks, {last})
    for step in range(NUM_BEFORE, NUM_BEFORE + NUM_AFTER):
        wrong += engine.judged(step, set(), healthy=True)
    if engine.buffers.left_out:
        wrong.append(f"rank {here.rank}: still has no patience with {engine.buffers.left_out}")
    here.say("done")
    here.hear()
    engine.buffers.close()
    return wrong


def come_back(here: Here, layer: Layer, victims: set[int]) -> list[str]:
    """Ranks that hung are left out, and come back through vLLM's recovery."""
    os.environ["FAULT_A2A_SILENCE_MS"] = "500"
    engine = start(here, [layer], here.num_ranks, None)
    manager = get_ep_all2all_manager()
    wrong: list[str] = []
    for step in range(3):
        wrong += engine.judged(step, set(), healthy=True)
    here.say("ran")
    here.hear()  # here the victims are stopped
    if here.rank in victims:
        try:
            engine.run(3)
            wrong.append("a rank that was left out ran a step")
        except RankEvictedError:
            pass
    else:
        for step in range(3, NUM_BEFORE):
            wrong += engine.judged(step, victims, healthy=step > 4)
        if not bool(manager.query_fault()):
            wrong.append(f"rank {here.rank}: no fault")
    manager.clean_buffers()
    here.say("cleaned")
    here.hear()  # all have, as after the rendezvous with which vLLM's recovery ends
    for step in range(NUM_BEFORE, NUM_BEFORE + NUM_AFTER):
        wrong += engine.judged(step, set(), healthy=True)
    if any(manager.query_active_mask().tolist()) or bool(manager.query_fault()):
        wrong.append(f"rank {here.rank}: mask {manager.query_active_mask()}, fault {manager.query_fault()} at the end")
    here.say("done")
    here.hear()
    engine.buffers.close()
    return wrong
