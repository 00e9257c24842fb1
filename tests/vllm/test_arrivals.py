"""Ranks that join and come back under vLLM: by its executor, worker wrapper, configuration, groups and factories."""

from functools import partial

import pytest

from tests.process_rounds import small
from tests.processes import Ranks
from tests.vllm import preload
from tests.vllm.arrivals import NUM_AFTER, NUM_BEFORE, come_back, one_comes, one_leaves_and_comes
from tests.vllm.layers import Layer
from tests.vllm.scenarios import Death

preload()


def hear_steps(ranks: Ranks, who: list[int], steps: range) -> None:
    for step in steps:
        for rank in who:
            heard = ranks.hear(rank, timeout_s=120)
            assert heard == ("step", step), f"rank {rank} said {heard} in place of step {step}"


def run_on_together(ranks: Ranks) -> None:
    everybody = list(range(4))
    hear_steps(ranks, everybody, range(NUM_BEFORE, NUM_BEFORE + NUM_AFTER))
    ranks.hear_all(everybody, "done")
    ranks.tell("close", everybody)
    wrong = [line for rank in everybody for line in ranks.result(rank)]
    assert not wrong, "\n".join(wrong)


# Layers of two shapes have two buffers, which the newcomer must come into at the same step start.
TWO_SHAPES = [Layer(), Layer(hidden=72)]


@pytest.mark.parametrize("layers", [[Layer(), Layer()], TWO_SHAPES], ids=["one shape", "two shapes"])
@pytest.mark.parametrize("phase", ["dispatch.half_signalled", "combine.half_signalled"])
def test_a_new_process_takes_the_place_of_a_killed_rank(phase: str, layers: list[Layer]) -> None:
    death = Death(phase=phase)
    with Ranks(4, small(4), partial(one_comes, layers=layers, death=death)) as ranks:
        ranks.killed.add(death.rank)
        living = [rank for rank in range(4) if rank != death.rank]
        hear_steps(ranks, living, range(NUM_BEFORE))
        ranks.wait_gone(death.rank)
        ranks.replace(death.rank)
        ranks.tell("a new process is there", living)
        run_on_together(ranks)


def test_a_group_grows_to_what_elastic_ep_max_dp_size_leaves_room_for() -> None:
    with Ranks(4, small(4), partial(one_comes, layers=[Layer(), Layer()], death=None), num_founders=2) as ranks:
        founders = [0, 1]
        hear_steps(ranks, founders, range(NUM_BEFORE))
        assert [ranks.grow(), ranks.grow()] == [2, 3]
        ranks.tell("two more are there", founders)
        run_on_together(ranks)


def test_a_group_grows_again_after_a_rank_left_as_planned() -> None:
    last, others = 3, [0, 1, 2]
    with Ranks(4, small(4), partial(one_leaves_and_comes, layer=Layer())) as ranks:
        ranks.hear_all(range(4), "ran with all")
        ranks.tell("scale down", [last])
        wrong = ranks.result(last)
        ranks.tell("scale down", others)
        ranks.hear_all(others, "ran with fewer")
        ranks.replace(last)
        ranks.tell("scale up", others)
        ranks.hear_all(range(4), "done")
        ranks.tell("close", range(4))
        wrong += [line for rank in range(4) for line in ranks.result(rank)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("victims", [[2], [2, 3]], ids=["one", "two"])
def test_ranks_that_hung_come_back_through_vllms_recovery(victims: list[int]) -> None:
    others = [rank for rank in range(4) if rank not in victims]
    with Ranks(4, small(4), partial(come_back, layer=Layer(), victims=set(victims))) as ranks:
        ranks.hear_all(range(4), "ran")
        for victim in victims:
            ranks.stop(victim)
        ranks.tell("go on", others)
        ranks.hear_all(others, "cleaned")
        for victim in victims:
            ranks.wake(victim)
        ranks.tell("go on", victims)
        ranks.hear_all(victims, "cleaned")
        ranks.tell("all are", range(4))
        ranks.hear_all(range(4), "done")
        ranks.tell("close", range(4))
        wrong = [line for rank in range(4) for line in ranks.result(rank)]
    assert not wrong, "\n".join(wrong)
