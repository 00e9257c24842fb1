"""Ranks that come into the buffers of an engine that runs: expected or not, into one buffer or into several."""

from functools import partial
from typing import Any

import pytest
import torch.distributed as dist

from fault_a2a import Group, JoinError
from fault_a2a.integrations import notices
from fault_a2a.integrations.rank_buffers import LayerShape, RankBuffers
from tests import engine_arrivals
from tests.engine_arrivals import DELIVERED, SHAPES, UNROUTABLE, an_unexpected_one
from tests.process_rounds import small
from tests.processes import SERVER, Ranks

SERVER.set_forkserver_preload(["tests.process_scenarios", "tests.engine_arrivals"])
HALF, WHOLE = [DELIVERED, DELIVERED, UNROUTABLE, UNROUTABLE], [DELIVERED] * 4


def test_ranks_that_all_wait_for_come_into_every_buffer_at_one_step_start() -> None:
    with Ranks(4, small(4), engine_arrivals.expected_ones, num_founders=2) as ranks:
        ranks.hear_all([0, 1], "ran")
        assert [ranks.grow(), ranks.grow()] == [2, 3]
        ranks.tell("they come", [0, 1])
        ranks.hear_all(range(4), "done")
        ranks.tell("close", range(4))
        codes = [ranks.result(rank) for rank in range(4)]
    assert codes[:2] == [[[HALF, HALF]] * 2 + [[WHOLE, WHOLE]] * 3] * 2
    assert codes[2:] == [[[WHOLE, WHOLE]] * 3] * 2


def replace_rank_2(shapes: list[LayerShape], heard: str = "ran", dies_again: bool = False) -> list[Any]:
    """What came of a newcomer that nobody waits for: the results of all four, or of those that live."""
    with Ranks(4, small(4), partial(an_unexpected_one, shapes=shapes)) as ranks:
        ranks.hear_all(range(4), "ran")
        ranks.kill(2)
        ranks.wait_gone(2)
        ranks.replace(2)
        ranks.hear_all([2], heard)
        if dies_again:
            ranks.kill(2)
            ranks.wait_gone(2)
        ranks.end_after(6)
        running = [rank for rank in range(4) if rank != 2 or (heard == "ran" and not dies_again)]
        ranks.hear_all(running, "done")
        ranks.tell("close", running)
        return [ranks.result(rank) for rank in range(4) if rank not in ranks.killed]


def test_a_rank_that_nobody_waits_for_comes_into_one_buffer_while_the_others_go_on() -> None:
    results = replace_rank_2(SHAPES[:1])
    assert [codes for codes, _ in results] == [[WHOLE]] * 4
    assert [gone for _, gone in results] == [[2], [2], [], [2]]


def test_that_the_newcomer_dies_is_news_again() -> None:
    results = replace_rank_2(SHAPES[:1], dies_again=True)
    assert results == [([[DELIVERED, DELIVERED, UNROUTABLE, DELIVERED]], [2, 2])] * 3


def test_but_not_into_two_between_whose_steps_it_would_stand() -> None:
    *_, refusal, _ = replace_rank_2(SHAPES, "refused")
    assert "have 2 shapes, and no member waits for rank 2; let the engine commit its coming" in refusal


def test_nobody_waits_for_ever_for_one_that_was_announced() -> None:
    with Ranks(3, small(3), engine_arrivals.one_that_does_not_come, num_founders=2) as ranks:
        ranks.hear_all([0, 1], "done")
        ranks.tell("close", [0, 1])
        assert [ranks.result(rank) for rank in (0, 1)] == [[], []]


def test_a_rank_keeps_its_number_when_its_group_meets_elsewhere() -> None:
    buffers = RankBuffers(Group(dist.HashStore(), 0, 2))
    with pytest.raises(ValueError, match="rank 0 is 1 in it; a rank keeps its number"):
        buffers.be_found_at(Group(dist.HashStore(), 1, 2))


def refusal_of(store: dist.Store) -> str:
    newcomer = RankBuffers(Group(store, 1, 2), joins=True, construct_timeout_ms=50)
    with pytest.raises(JoinError) as refused:
        newcomer.begin_step()
    return str(refused.value)


def test_a_newcomer_without_a_group_says_what_it_looked_for() -> None:
    assert "nobody of group 'default' has told of its buffers on this store" in refusal_of(dist.HashStore())


def test_a_newcomer_that_was_told_of_another_size_says_which() -> None:
    store = dist.HashStore()
    notices.tell_running(Group(store, 0, 3), 3, SHAPES)
    told = "the group has room for 3 ranks, and this process was told of 2; start it with the members' own settings"
    assert told in refusal_of(store)
