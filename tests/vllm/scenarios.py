"""What ranks do in the tests on vLLM: MoE layers of its own kernel, step after step, while one of them is killed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import vllm.distributed.device_communicators.all2all as vllm_all2all
from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.fused_moe.all2all_utils import get_ep_all2all_manager
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend, make_unquantized_moe_kernel

from fault_a2a.group import Group
from fault_a2a.integrations.rank_buffers import RankBuffers
from fault_a2a.integrations.vllm import register
from fault_a2a.integrations.vllm.all2all import FaultA2AManager
from fault_a2a.integrations.vllm.prepare_finalize import FaultA2APrepareAndFinalize
from tests.processes import Here
from tests.vllm.layers import Layer

FAST = {"silence_ms": 2000, "stall_ms": 10000, "construct_timeout_ms": 60000, "agreement_timeout_ms": 10000}
WARM_UP_ROUNDS = 1


@dataclass(frozen=True)
class Death:
    """A rank is killed (SIGKILL, by itself) in the middle of a step."""

    rank: int = 2
    step: int = 3
    phase: str = "dispatch.half_signalled"

    def arm(self, here: Here, step: int, buffers: RankBuffers) -> None:
        if (here.rank, step) == (self.rank, self.step):
            buffer = buffers.all[0]
            buffer.arm(self.phase, buffer.num_rounds, "kill")


@dataclass(frozen=True)
class Steps:
    """Steps of one layer, each judged as soon as it is done.

    Attributes:
        make: builds the layer's kernel: (kernel, the buffers below it).
        asks: called after each step with the step's number and whether somebody may be dead; returns what is wrong.
    """

    layer: Layer
    make: Callable[[Here, Layer], tuple[Any, RankBuffers]]
    death: Death | None = None
    num_steps: int = 8
    asks: Callable[[Here, int, bool], list[str]] | None = None

    def __call__(self, here: Here) -> list[str]:
        kernel, buffers = self.make(here, self.layer)
        wrong: list[str] = []
        for step in range(self.num_steps):
            if self.death is not None:
                self.death.arm(here, step, buffers)
            out = self.layer.run(kernel, here.rank, step)
            # A rank that died once it had answered all is only missed in the next step, whose choices are then lost.
            is_after = self.death is not None and step > self.death.step + 1
            dead = {self.death.rank} if self.death is not None and step >= self.death.step else set()
            wrong += self.layer.wrong(here.rank, step, out, buffers.newest_outcome, dead, healthy=is_after)
            if self.asks is not None:
                # Others may be a step ahead.
                wrong += self.asks(here, step, self.death is not None and step >= self.death.step - 1)
            here.say(("step", step))
        here.hear()
        buffers.close()
        return wrong


# -- kernels, each made in another way ---------------------------------------------------------------------------------


def by_hand(here: Here, layer: Layer) -> tuple[Any, RankBuffers]:
    """vLLM's kernel over our prepare and finalize, without anything else of vLLM."""
    buffers = RankBuffers(Group(here.store, here.rank, here.num_ranks), **FAST)
    prepare_finalize = FaultA2APrepareAndFinalize(
        buffers,
        max_tokens_per_rank=layer.num_max_tokens,
        num_dispatchers=layer.num_ranks,
        expert_capacity=layer.num_experts,
        use_fp8_dispatch=bool(layer.quantized),
    )
    return layer.kernel(prepare_finalize, here.rank), buffers


def by_vllm(here: Here, layer: Layer) -> tuple[Any, RankBuffers]:
    """The kernel as vLLM makes it: its config, its groups, its choice of a backend by name, its factories."""
    os.environ |= {"FAULT_A2A_VLLM": "1", "FAULT_A2A_STALL_MS": "10000"}
    register()
    # The communicator for CPUs knows one backend, which it imports when it needs it.
    vllm_all2all.AgRsAll2AllManager = vllm_all2all.NixlEPAll2AllManager
    with vllm_groups(here):
        kernel = vllm_kernel(layer, here.rank)
        buffers = get_ep_all2all_manager().get_handle({})
    return kernel, buffers


def vllm_kernel(layer: Layer, rank: int, backend: str = "nixl_ep") -> Any:
    return make_unquantized_moe_kernel(
        quant_config=layer.quant_config(rank),
        moe_config=layer.moe_config(layer.parallel_config(rank, backend)),
        backend=UnquantizedMoeBackend.BATCHED_TRITON,
        experts_cls=layer.experts_class(),
        routing_tables=None,
    )


@contextmanager
def vllm_groups(
    here: Here, backend: str = "nixl_ep", *, num_ranks: int | None = None, max_num_ranks: int | None = None
) -> Iterator[None]:
    """vLLM's parallel state of ``num_ranks`` data-parallel ranks, which are one expert-parallel group.

    ``max_num_ranks``: for how many ``--elastic-ep-max-dp-size`` leaves room.
    """
    num_ranks = num_ranks or here.num_ranks
    parallel = ParallelConfig(
        data_parallel_size=num_ranks,
        data_parallel_rank=here.rank,
        enable_expert_parallel=True,
        all2all_backend=backend,
    )
    parallel.data_parallel_master_port = free_port(here)
    parallel._data_parallel_master_port_list = []
    parallel._coord_store_port = 0
    with set_current_vllm_config(VllmConfig(parallel_config=parallel)):
        init_distributed_environment(
            world_size=1, rank=0, distributed_init_method="env://", local_rank=here.rank, backend="gloo"
        )
        initialize_model_parallel(backend="gloo")
        if max_num_ranks is not None:
            # Only now: for groups that change vLLM takes communicators that need a GPU.
            parallel.enable_elastic_ep, parallel.elastic_ep_max_dp_size = True, max_num_ranks
        yield


def free_port(here: Here) -> int:
    """The same for all that meet; rank 0 finds one each time. A newcomer meets the others in their newest groups."""
    import socket

    number = here.store.add(f"vllm_groups_of/{here.rank}", 1)
    if here.joins:
        here.store.wait(["newcomers_meet_at"])
        number = int(here.store.get("newcomers_meet_at"))
    if here.rank == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            here.store.set(f"vllm_port/{number}", str(probe.getsockname()[1]))
    return int(here.store.get(f"vllm_port/{number}"))


# -- questions ---------------------------------------------------------------------------------------------------------


def manager_knows(here: Here, step: int, is_dead: bool) -> list[str]:
    """The mask in vLLM's polarity, the fault, and that an acknowledged one does not come back."""
    manager = get_ep_all2all_manager()
    wrong = []
    if not isinstance(manager, FaultA2AManager) or not manager.support_fault_tolerance:
        wrong.append(f"vLLM chose {type(manager).__name__}")
    mask = manager.query_active_mask()
    if mask.dtype != torch.int32 or mask.tolist() not in ([0] * here.num_ranks, [0, 0, int(is_dead), 0]):
        wrong.append(f"rank {here.rank} step {step}: mask {mask}")
    fault = manager.query_fault()
    if fault.dtype != torch.bool or fault.dim() != 0:
        wrong.append(f"rank {here.rank} step {step}: query_fault returned {fault}")
    return wrong
