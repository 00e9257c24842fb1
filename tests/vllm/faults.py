"""How a fault looks to vLLM, until it is acknowledged."""

from __future__ import annotations

import os
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.all2all_utils import get_ep_all2all_manager

from tests.processes import Here
from tests.vllm.layers import Layer
from tests.vllm.scenarios import Death, by_vllm

DEATH = Death()


def fault_until_recovery(here: Here, on_fault: str) -> list[Any]:
    """(step, fault, mask) of each step; after step 5 vLLM's recovery is called."""
    os.environ["FAULT_A2A_ON_FAULT"] = on_fault
    layer = Layer()
    kernel, buffers = by_vllm(here, layer)
    manager = get_ep_all2all_manager()
    seen: list[Any] = []
    for step in range(8):
        DEATH.arm(here, step, buffers)
        layer.run(kernel, here.rank, step)
        fault = manager.query_fault()
        assert fault.dtype == torch.bool and fault.dim() == 0
        seen.append((step, bool(fault), manager.query_active_mask().tolist()))
        if step == 5:
            manager.clean_buffers()
    try:
        manager.update_mask(DEATH.rank, False)
        seen.append("unmasked the dead")
    except RuntimeError as error:
        if "cannot be unmasked" not in str(error):
            seen.append(str(error))
    manager.update_mask(DEATH.rank, True)  # it is
    here.say("done")
    here.hear()
    buffers.close()
    return seen
