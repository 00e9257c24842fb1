"""Two micro-batches of one layer in vLLM's own contexts: two threads that hand the rank to each other at each yield."""

from __future__ import annotations

import threading
from typing import Any

import torch
import vllm.v1.worker.ubatching as ubatching
from vllm import forward_context
from vllm.utils.torch_utils import current_stream

from tests.processes import Here
from tests.vllm.layers import Layer
from tests.vllm.scenarios import Death, by_hand


def contexts() -> list[Any]:
    """As ``make_ubatch_contexts`` makes them, but for events of a GPU, which only its stream switches would use."""
    ready, stream = threading.Barrier(3), current_stream()
    ubatching.current_stream = lambda: stream  # without a GPU each thread gets a stand-in of its own
    events = [threading.Event(), threading.Event()]
    ubatching._NUM_UBATCHES = 2
    ubatching._CURRENT_CONTEXTS[:] = [None, None]
    return [
        ubatching.UBatchContext(
            id=number,
            comm_stream=stream,
            compute_stream=stream,
            forward_context=forward_context._forward_context,
            ready_barrier=ready,
            cpu_wait_event=events[number],
            cpu_signal_event=events[1 - number],
            gpu_comm_done_event=None,
            gpu_compute_done_event=None,
        )
        for number in range(2)
    ]


def two_layers_at_once(here: Here, layer: Layer, death: Death | None = None, num_steps: int = 6) -> list[str]:
    """Each step is two micro-batches (the steps 2 n and 2 n + 1 of the layer), each through two layers."""
    kernel, buffers = by_hand(here, layer)
    layer.run(kernel, here.rank, 0)  # makes the buffer
    wrong: list[str] = []
    for step in range(num_steps):
        if death is not None:
            death.arm(here, step, buffers)
        both, outcomes = contexts(), {}

        def run(number: int, step: int = step, both: Any = both, outcomes: Any = outcomes) -> None:
            with both[number]:
                for depth in range(2):
                    out = layer.run(kernel, here.rank, 4 * step + 2 * depth + number)
                    outcomes[depth, number] = out

        threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(2)]
        for thread in threads:
            thread.start()
        both[0].ready_barrier.wait(30)
        both[0].cpu_wait_event.set()
        for thread in threads:
            thread.join(30)
        if len(outcomes) < 4:
            return [*wrong, f"rank {here.rank} step {step}: only {sorted(outcomes)} came to an end"]
        is_dead = death is not None and step >= death.step
        for (depth, number), out in outcomes.items():
            number_of_step = 4 * step + 2 * depth + number
            _, topk_ids, _ = layer.tokens(here.rank, number_of_step)
            alive = torch.ones_like(topk_ids, dtype=torch.bool)
            if is_dead:
                alive = topk_ids // layer.num_local_experts != death.rank
            if is_dead and step == death.step:
                continue  # how much of this step was delivered is only known of its last round
            expected = layer.expected(here.rank, number_of_step, alive)
            error = (out.float() - expected).abs().max().item() if out.numel() else 0.0
            if not error <= 0.03:
                wrong.append(f"rank {here.rank} step {step} layer {depth} batch {number}: off by {error}")
    here.say("done")
    here.hear()
    buffers.close()
    return wrong
