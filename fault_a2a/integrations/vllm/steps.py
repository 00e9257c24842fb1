"""Where vLLM's steps begin: in its worker, before a batch and before a dummy batch.

vLLM runs its data-parallel ranks in lockstep: in each step an engine calls either ``execute_model`` with tokens, or
``execute_dummy_batch`` if it has no requests while others do. So both mark a step start, and every rank of the
expert-parallel group marks the same ones; a rank that is called with nothing scheduled runs no layer and marks none.

Why here and not where a forward pass begins (vLLM's forward context): drafters run forward passes of their own within a
step, and a newcomer that came in before one of them would run its first layer where the others run a drafter's. The
expert numbers would fit, and the answers would be wrong. Nor in our own first layer: no Python runs there once the
layer is in a captured graph. Step starts lie outside of graphs and of compiled code, so no operator is needed for them.
"""

from __future__ import annotations

import functools
from typing import Any

from fault_a2a.integrations.vllm.all2all import FaultA2AManager
from fault_a2a.integrations.vllm.touchpoints import STEP_STARTS_MARKED


def mark(wrapper: Any) -> None:
    """From now on ``wrapper`` marks step starts, for the process. May be called repeatedly.

    Args:
        wrapper: vLLM's WorkerWrapperBase, through which each of its executors calls a worker.
    """
    if hasattr(wrapper, STEP_STARTS_MARKED):
        return
    execute_model = wrapper.execute_model

    @functools.wraps(execute_model)
    def execute_model_in_step(self: Any, scheduler_output: Any) -> Any:
        if scheduler_output.total_num_scheduled_tokens > 0:
            FaultA2AManager.begin_step()
        return execute_model(self, scheduler_output)

    def execute_dummy_batch(self: Any) -> Any:
        FaultA2AManager.begin_step()
        return self.worker.execute_dummy_batch()

    wrapper.execute_model = execute_model_in_step
    wrapper.execute_dummy_batch = execute_dummy_batch  # else it would be found on the worker, by __getattr__
    setattr(wrapper, STEP_STARTS_MARKED, True)
