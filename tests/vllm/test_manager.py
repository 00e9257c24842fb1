"""vLLM's manager over fault_a2a: faults, their acknowledgement, and groups that change."""

from functools import partial
from typing import Any

from tests.process_rounds import small
from tests.processes import Ranks
from tests.vllm import preload
from tests.vllm.elastic import scale_down
from tests.vllm.faults import DEATH, fault_until_recovery
from tests.vllm.layers import Layer

preload()


def seen_by_survivors(on_fault: str) -> list[list[Any]]:
    with Ranks(4, small(4), partial(fault_until_recovery, on_fault=on_fault)) as ranks:
        ranks.killed.add(DEATH.rank)
        living = [rank for rank in range(4) if rank != DEATH.rank]
        ranks.hear_all(living, "done")
        ranks.tell("close", living)
        return [ranks.result(rank) for rank in living]


def test_a_fault_is_told_until_vllm_has_recovered_and_the_dead_stay_masked() -> None:
    for seen in seen_by_survivors("report"):
        faults = {step: fault for step, fault, _ in seen}
        masks = {step: mask for step, _, mask in seen}
        assert not any(faults[step] for step in range(DEATH.step - 1)), "others may be a step ahead, not two"
        assert all(faults[step] for step in range(DEATH.step + 1, 6))
        assert not any(faults[step] for step in (6, 7)), "acknowledged, and told again"
        assert masks[DEATH.step - 2] == [0, 0, 0, 0]
        assert masks[5] == masks[7] == [0, 0, 1, 0], "vLLM's polarity: 1 is gone"


def test_serving_goes_on_where_the_user_wants_it_to() -> None:
    for seen in seen_by_survivors("serve"):
        assert not any(fault for _, fault, _ in seen), seen
        assert seen[-1][2] == [0, 0, 1, 0]


def test_a_group_warms_up_alone_and_goes_on_smaller() -> None:
    with Ranks(4, small(4), partial(scale_down, layer=Layer())) as ranks:
        ranks.hear_all(range(4), "ran with four")
        ranks.tell("scale down", [3])
        ranks.hear_all([3], "left")
        ranks.tell("scale down", range(3))
        ranks.hear_all(range(3), "ran with three")
        ranks.tell("close", range(3))
        wrong = [line for rank in range(4) for line in ranks.result(rank)]
    assert not wrong, "\n".join(wrong)
