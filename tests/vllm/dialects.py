"""vLLM's own classes for NIXL EP and DeepEP, unmodified, over the modules that speak those dialects."""

from __future__ import annotations

import os
from typing import Any

import torch
import vllm.distributed.device_communicators.all2all as vllm_all2all
from vllm.utils import import_utils

from fault_a2a.integrations import deep_ep, nixl_ep
from tests.processes import Here
from tests.vllm.layers import Layer
from tests.vllm.scenarios import vllm_groups, vllm_kernel


def no_gpu() -> None:
    """What vLLM's classes do to a GPU, they do to nothing here."""
    torch.accelerator.synchronize = lambda *_: None


def by_nixl_dialect(here: Here, layer: Layer) -> tuple[Any, Any]:
    """vLLM's NixlEPAll2AllManager and NixlEPPrepareAndFinalize, by vLLM's own config, groups and factories."""
    os.environ["FAULT_A2A_STALL_MS"] = "10000"
    no_gpu()
    nixl_ep.install()
    nixl_ep.install()
    assert import_utils.has_nixl_ep()
    import vllm.model_executor.layers.fused_moe.all2all_utils as utils
    from vllm.model_executor.layers.fused_moe.prepare_finalize import nixl_ep as own

    # Where there is CUDA, all2all_utils imports these by itself; the communicator for CPUs knows one backend.
    utils.NixlEPPrepareAndFinalize = own.NixlEPPrepareAndFinalize
    utils.NIXL_EP_QUANT_BLOCK_SHAPE = own.NIXL_EP_QUANT_BLOCK_SHAPE
    manager = vllm_all2all.NixlEPAll2AllManager
    vllm_all2all.AgRsAll2AllManager = manager
    manager._mask = torch.zeros([here.num_ranks], dtype=torch.int32)  # vLLM puts it on a GPU
    with vllm_groups(here):
        kernel = vllm_kernel(layer, here.rank)
    assert type(kernel.prepare_finalize).__module__.startswith("vllm.")
    return kernel, manager._buffer.buffer._buffers


def by_deep_ep_dialect(here: Here, layer: Layer) -> tuple[Any, Any]:
    """vLLM's DeepEPLLAll2AllManager and DeepEPLLPrepareAndFinalize, by the same way."""
    os.environ["FAULT_A2A_STALL_MS"] = "10000"
    no_gpu()
    deep_ep.install()
    assert import_utils.has_deep_ep()
    import vllm.model_executor.layers.fused_moe.all2all_utils as utils
    from vllm.model_executor.layers.fused_moe.prepare_finalize import deepep_ll as own

    utils.DeepEPLLPrepareAndFinalize = own.DeepEPLLPrepareAndFinalize
    utils.DEEPEP_QUANT_BLOCK_SHAPE = own.DEEPEP_QUANT_BLOCK_SHAPE
    manager = vllm_all2all.DeepEPLLAll2AllManager
    vllm_all2all.AgRsAll2AllManager = manager
    manager._mask = torch.zeros([here.num_ranks], dtype=torch.int32)  # vLLM puts it on a GPU
    with vllm_groups(here, "deepep_low_latency"):
        kernel = vllm_kernel(layer, here.rank, "deepep_low_latency")
    assert type(kernel.prepare_finalize).__module__.startswith("vllm.")
    return kernel, manager._buffer._buffers


def deep_ep_manager_knows(here: Here, step: int, is_dead: bool) -> list[str]:
    """vLLM's own manager, and what a caller may mask by itself."""
    from vllm.model_executor.layers.fused_moe.all2all_utils import get_ep_all2all_manager

    manager = get_ep_all2all_manager()
    assert type(manager) is vllm_all2all.DeepEPLLAll2AllManager
    mask, fault, wrong = manager.query_active_mask().tolist(), bool(manager.query_fault()), []
    if mask not in ([0] * here.num_ranks, [0, 0, int(is_dead), 0]) or fault != any(mask):
        wrong.append(f"rank {here.rank} step {step}: mask {mask}, fault {fault}")
    if step == 6:
        other = (here.rank + 1) % here.num_ranks
        manager._buffer.low_latency_update_mask_buffer(other, True)
        if manager.query_active_mask()[other] != 1:
            wrong.append(f"rank {here.rank}: rank {other} was masked and is not")
        manager.clean_buffers()
        if manager.query_active_mask().tolist() != [0, 0, int(is_dead), 0]:
            wrong.append(f"rank {here.rank}: mask {manager.query_active_mask()} after it was cleaned")
    return wrong


def nixl_manager_knows(here: Here, step: int, is_dead: bool) -> list[str]:
    """vLLM's own manager reads the mask of the module, and faults as it does over NIXL."""
    from vllm.model_executor.layers.fused_moe.all2all_utils import get_ep_all2all_manager

    manager = get_ep_all2all_manager()
    assert type(manager) is vllm_all2all.NixlEPAll2AllManager
    mask, fault = manager.query_active_mask().tolist(), bool(manager.query_fault())
    wrong = []
    if mask not in ([0] * here.num_ranks, [0, 0, int(is_dead), 0]) or fault != any(mask):
        wrong.append(f"rank {here.rank} step {step}: mask {mask}, fault {fault}")
    if step == 6:
        manager.clean_buffers()
        if manager.query_active_mask().tolist() != mask:
            wrong.append(f"rank {here.rank}: cleaning the buffers changed the mask of the dead")
    return wrong
