"""vLLM's own MoE kernel over fault_a2a in real processes, of which one is killed in the middle of a step."""

import pytest

from tests.process_rounds import small
from tests.processes import Ranks
from tests.vllm import preload
from tests.vllm.layers import Layer
from tests.vllm.scenarios import Death, Steps, by_hand, by_vllm, manager_knows

preload()


def run(steps: Steps) -> None:
    num_ranks = steps.layer.num_ranks
    with Ranks(num_ranks, small(num_ranks), steps) as ranks:
        dying = {steps.death.rank} if steps.death else set()
        ranks.killed |= dying
        living = [rank for rank in range(num_ranks) if rank not in dying]
        for step in range(steps.num_steps):
            for rank in living:
                assert ranks.hear(rank, timeout_s=120) == ("step", step)
        ranks.tell("close", living)
        wrong = [line for rank in living for line in ranks.result(rank)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("quantized", ["", "float32", "ue8m0"])
@pytest.mark.parametrize("phase", ["dispatch.half_signalled", "combine.half_signalled"])
def test_survivors_of_a_killed_rank_match_the_reference_on_their_outcome(quantized: str, phase: str) -> None:
    run(Steps(Layer(quantized=quantized), by_hand, Death(phase=phase)))


# vLLM's own list begins at 2048 and has eight entries; its experts want whole blocks of what they dequantise.
@pytest.mark.parametrize(("hidden", "quantized"), [(72, ""), (200, ""), (384, "float32"), (1152, "ue8m0")])
def test_any_hidden_size(hidden: int, quantized: str) -> None:
    run(Steps(Layer(hidden=hidden, quantized=quantized), by_hand, num_steps=3))


@pytest.mark.parametrize("quantized", ["", "float32", "ue8m0"])
@pytest.mark.parametrize("death", [None, Death()], ids=["healthy", "one killed"])
def test_the_same_through_vllms_own_config_groups_and_factories(death: Death | None, quantized: str) -> None:
    run(Steps(Layer(quantized=quantized), by_vllm, death, asks=manager_knows))
