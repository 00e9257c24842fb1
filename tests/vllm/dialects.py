"""vLLM's own classes for NIXL EP and DeepEP, unmodified, over the modules that speak those dialects."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import vllm.distributed.device_communicators.all2all as vllm_all2all
from vllm.utils import import_utils

from fault_a2a.group import Group
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
    """vLLM's DeepEPLLPrepareAndFinalize over a Buffer that is made as DeepEP's is."""
    os.environ["FAULT_A2A_STALL_MS"] = "10000"
    sys.modules["deep_ep"] = deep_ep
    from vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_ll import DeepEPLLPrepareAndFinalize

    sizes = {"num_max_dispatch_tokens_per_rank": layer.num_max_tokens, "hidden": layer.hidden}
    num_bytes = deep_ep.Buffer.get_low_latency_rdma_size_hint(
        **sizes, num_ranks=layer.num_ranks, num_experts=layer.num_experts
    )
    buffer = deep_ep.Buffer(
        group=Group(here.store, here.rank, here.num_ranks),
        num_nvl_bytes=0,
        num_rdma_bytes=num_bytes,
        low_latency_mode=True,
        num_qps_per_rank=layer.num_local_experts,
        allow_nvlink_for_low_latency_mode=True,
        allow_mnnvl=False,
        explicitly_destroy=True,
        enable_shrink=True,
    )
    prepare_finalize = DeepEPLLPrepareAndFinalize(
        buffer,
        max_tokens_per_rank=layer.num_max_tokens,
        num_dispatchers=layer.num_ranks,
        use_fp8_dispatch=bool(layer.quantized),
    )
    here.deep_ep_buffer = buffer  # type: ignore[attr-defined]
    return layer.kernel(prepare_finalize, here.rank), buffer._buffers


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


def deep_ep_mask_knows(here: Here, step: int, is_dead: bool) -> list[str]:
    buffer, wrong = here.deep_ep_buffer, []  # type: ignore[attr-defined]
    status = torch.full([here.num_ranks], 7, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    if status.tolist() not in ([0] * here.num_ranks, [0, 0, int(is_dead), 0]):
        wrong.append(f"rank {here.rank} step {step}: mask {status.tolist()}")
    if step == 6:
        other = (here.rank + 1) % here.num_ranks
        buffer.low_latency_update_mask_buffer(other, True)
        buffer.low_latency_query_mask_buffer(status)
        if status[other] != 1:
            wrong.append(f"rank {here.rank}: rank {other} was masked and is not")
        buffer.low_latency_clean_mask_buffer()
        buffer.low_latency_query_mask_buffer(status)
        if status.tolist() != [0, 0, int(is_dead), 0]:
            wrong.append(f"rank {here.rank}: mask {status.tolist()} after it was cleaned")
    return wrong
