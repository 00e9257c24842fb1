"""What vLLM's manager is asked for when its groups change, over its own stateless groups."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
import vllm.distributed.device_communicators.all2all as vllm_all2all
from vllm.distributed.utils import StatelessProcessGroup, stateless_init_torch_distributed_process_group

from fault_a2a.integrations.vllm.all2all import FaultA2AManager
from fault_a2a.integrations.vllm.prepare_finalize import FaultA2APrepareAndFinalize
from tests.processes import Here
from tests.vllm.layers import Layer
from tests.vllm.scenarios import vllm_groups


def stateless_manager(here: Here, num_ranks: int, name: str) -> FaultA2AManager:
    """A manager over a group that torch.distributed does not know: the first ``num_ranks`` ranks."""
    store = dist.PrefixStore(name, here.store)
    group = StatelessProcessGroup(rank=here.rank, world_size=num_ranks, store=store)
    if here.rank == 0:
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            store.set("port", str(probe.getsockname()[1]))
    port = int(store.get("port"))
    cpu_group = stateless_init_torch_distributed_process_group("127.0.0.1", port, here.rank, num_ranks, backend="gloo")
    return FaultA2AManager(cpu_group, group)


def prepare_finalize(manager: FaultA2AManager, layer: Layer) -> Any:
    handle = manager.get_handle(
        {
            "max_num_tokens_per_dp_rank": layer.num_max_tokens,
            "token_hidden_size": layer.hidden,
            "num_local_experts": layer.num_local_experts,
        }
    )
    return FaultA2APrepareAndFinalize(
        handle,
        max_tokens_per_rank=layer.num_max_tokens,
        num_dispatchers=manager.max_num_ep_ranks,
        expert_capacity=layer.num_local_experts * manager.max_num_ep_ranks,
    )


def scale_down(here: Here, layer: Layer) -> list[str]:
    """Warm up alone, run with four, and go on with three once the last has left."""
    os.environ["FAULT_A2A_STALL_MS"] = "10000"
    vllm_all2all.AgRsAll2AllManager = FaultA2AManager
    wrong: list[str] = []
    with vllm_groups(here):
        manager = stateless_manager(here, here.num_ranks, "four")
        kernel = layer.kernel(prepare_finalize(manager, layer), here.rank)
        buffers = manager.get_handle({})
        wrong += alone(here, layer, manager, kernel)
        out = layer.run(kernel, here.rank, 1)
        wrong += layer.wrong(here.rank, 1, out, buffers.newest_outcome, set(), healthy=False)
        here.say("ran with four")
        here.hear()
        if here.rank == here.num_ranks - 1:
            buffers.close()
            here.say("left")
            return wrong
        smaller = stateless_manager(here, here.num_ranks - 1, "three")
        smaller.stage_ep_size()
        smaller.commit_ep_size()
        for step in range(2, 6):
            out = layer.run(kernel, here.rank, step)
            wrong += layer.wrong(here.rank, step, out, buffers.newest_outcome, {here.num_ranks - 1}, healthy=step > 2)
        if smaller.query_active_mask().tolist() != [0] * (here.num_ranks - 1):
            wrong.append(f"rank {here.rank}: mask {smaller.query_active_mask()} after the commit")
        if buffers.num_lost == 0 and bool(smaller.query_fault()):
            wrong.append(f"rank {here.rank}: a rank that left as planned is a fault")
        wrong += too_large(here, smaller) + without_step_starts(here, smaller)
        here.say("ran with three")
        here.hear()
        buffers.close()
    return wrong


def alone(here: Here, layer: Layer, manager: FaultA2AManager, kernel: Any) -> list[str]:
    """Nobody else is asked, or even there."""
    with manager.mask_remote_ranks():
        out = layer.run(kernel, here.rank, 0)
        mask = manager.query_active_mask().tolist()
    wrong = []
    if mask != [int(rank != here.rank) for rank in range(here.num_ranks)]:
        wrong.append(f"rank {here.rank} alone: mask {mask}")
    _, topk_ids, _ = layer.tokens(here.rank, 0)
    expected = layer.expected(here.rank, 0, topk_ids // layer.num_local_experts == here.rank)
    if out.numel() and not (out.float() - expected).abs().max() <= 0.03:
        wrong.append(f"rank {here.rank} alone: {(out.float() - expected).abs().max()} off its own experts' sum")
    if manager.query_active_mask().tolist() != [0] * here.num_ranks:
        wrong.append(f"rank {here.rank}: mask {manager.query_active_mask()} after the warm-up")
    return wrong


def too_large(here: Here, manager: FaultA2AManager) -> list[str]:
    """Not beyond what it has room for."""
    manager.world_size = here.num_ranks + 1
    for prepare in (manager.stage_ep_size, manager.commit_ep_size):
        try:
            prepare()
            return [f"the group grew to {manager.world_size}"]
        except NotImplementedError as error:
            if f"room for {here.num_ranks} ranks and cannot grow to {manager.world_size}" not in str(error):
                return [str(error)]
    return []


def without_step_starts(here: Here, manager: FaultA2AManager) -> list[str]:
    """Nobody could come, so nobody is asked to."""
    os.environ["FAULT_A2A_STEP_STARTS"] = "0"
    manager.world_size = here.num_ranks
    try:
        manager.stage_ep_size()
        return ["a rank was to join at step starts that nobody marks"]
    except NotImplementedError as error:
        told = f"ranks [{here.num_ranks - 1}] cannot join: ranks come only at step starts"
        return [] if told in str(error) else [str(error)]
