"""Two micro-batches in flight, in vLLM's own micro-batch contexts, through vLLM's own MoE kernel."""

from functools import partial

import pytest

from tests.process_rounds import small
from tests.processes import Ranks
from tests.vllm import preload
from tests.vllm.layers import Layer
from tests.vllm.micro_batches import two_layers_at_once
from tests.vllm.scenarios import Death

preload()


@pytest.mark.parametrize("quantized", ["", "float32"])
@pytest.mark.parametrize("death", [None, Death()], ids=["healthy", "one killed"])
def test_two_micro_batches_take_the_two_lanes(quantized: str, death: Death | None) -> None:
    task = partial(two_layers_at_once, layer=Layer(quantized=quantized), death=death)
    with Ranks(4, small(4), task) as ranks:
        dying = {death.rank} if death else set()
        ranks.killed |= dying
        living = [rank for rank in range(4) if rank not in dying]
        ranks.hear_all(living, "done")
        ranks.tell("close", living)
        wrong = [line for rank in living for line in ranks.result(rank)]
    assert not wrong, "\n".join(wrong)
