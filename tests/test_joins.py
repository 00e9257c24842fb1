"""New processes take the place of dead ranks while the others go on, and a former life's stores hurt nobody."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from fault_a2a.buffer import Buffer
from fault_a2a.errors import ClosedError, JoinError
from fault_a2a.group import Group
from fault_a2a.testing.virtual import VirtualRanks
from tests import join_scenarios as scenarios
from tests.ballots import WENT_WRONG, run
from tests.process_rounds import small
from tests.rig import Work


@pytest.mark.parametrize("victim", [0, 2])
def test_a_new_process_takes_the_place_of_a_dead_one(victim: int) -> None:
    assert scenarios.replaced(victim=victim) == []


# Without a spare one it is what tests/test_guards.py has to show, too.
@pytest.mark.parametrize("num_spare_partitions", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_former_life_that_wakes_in_mid_row_hurts_nobody(num_spare_partitions: int) -> None:
    assert scenarios.zombie(seed=1, num_spare_partitions=num_spare_partitions) == []


@pytest.mark.slow  # waits for ten seconds
def test_a_newcomer_that_falls_silent_or_dies_holds_up_nobody() -> None:
    assert scenarios.silent_newcomer() == []


@pytest.mark.parametrize(("victim", "who"), [(4, "a member"), (0, "the proposer"), (3, "the newcomer")])
def test_a_death_while_a_newcomer_is_on_its_way_in(victim: int, who: str) -> None:
    assert scenarios.dies_while_one_joins(victim, seed=1, num_tries=4) == [], who


def test_an_evicted_rank_comes_back_in_the_same_process() -> None:
    assert scenarios.evicted_and_back() == []


@pytest.mark.parametrize("leaver", [0, 1])
def test_a_planned_leave_costs_no_choice(leaver: int) -> None:
    assert scenarios.one_leaves_at_a_step_start(leaver) == []


@pytest.fixture
def alone() -> Iterator[Buffer]:
    with VirtualRanks(1, small(1, num_topk=2)) as ranks:
        yield ranks.buffers[0]


def test_a_step_start_with_an_open_round_is_refused(alone: Buffer) -> None:
    _, handle = alone.dispatch(*Work(alone.config, 1).tokens(0, 1))
    with pytest.raises(RuntimeError, match="a round or a collective is open: end it before begin_step"):
        alone.begin_step()
    alone.abandon(handle)
    assert alone.begin_step() == alone.view


def test_who_is_in_cannot_rejoin_and_virtual_ranks_cannot_join(alone: Buffer) -> None:
    with pytest.raises(RuntimeError, match="rejoin: virtual ranks cannot come back"):
        alone.rejoin()
    with pytest.raises(ValueError, match=r"join: virtual ranks cannot join; give a Group of processes"):
        Buffer(alone.group, alone.config, join=True)


def test_a_rank_alone_leaves_at_once(alone: Buffer) -> None:
    assert alone.leave()
    with pytest.raises(ClosedError):
        alone.begin_step()


def test_a_leave_that_was_in_vain_does_not_come_about_in_silence() -> None:
    with VirtualRanks(2, small(2, num_topk=2)) as ranks:
        deadline = time.monotonic() + 20

        def steps(buffer: Buffer) -> tuple[int, ...]:
            if buffer.rank == 1:
                buffer.core.ask_to_leave()  # what leave() has done when it returns False
            while time.monotonic() < deadline and len(buffer.view.active_ranks) == 2:
                buffer.begin_step()
            return buffer.view.active_ranks

        stays, leaves = ranks.run(steps)
        assert stays == (0,)
        assert isinstance(leaves, ClosedError) and "rank 1 had asked to leave, and is out" in str(leaves)
        assert "buffer.rejoin()" in str(leaves)


def test_a_newcomer_without_a_group_is_told_so() -> None:
    group = Group(dist.HashStore(), 0, 2)
    with pytest.raises(JoinError, match="nobody of group 'default' has told of itself on this store") as refused:
        Buffer(group, small(2, construct_timeout_ms=50), join=True)
    # Whoever reads it must not restart the ranks that run.
    assert "leave them alone" in str(refused.value) and "on every rank" not in str(refused.value)


@pytest.mark.parametrize("kills_one", [False, True])
def test_a_group_grows_to_what_it_has_room_for(kills_one: bool) -> None:
    assert scenarios.grows(kills_one=kills_one) == []


def test_more_ranks_than_there_is_room_for_are_refused() -> None:
    with pytest.raises(ValueError, match="max_num_ranks: 1 is less than the 2 ranks of the group"):
        Buffer(Group(dist.HashStore(), 0, 2), small(2, max_num_ranks=1))


# -- every schedule, or many -------------------------------------------------------------------------------------------


def test_lives_begin_and_end_on_seeded_schedules() -> None:
    walked = run("join_schedules", "400")
    print(walked.stdout)
    assert walked.returncode == 0, walked.stdout


@pytest.mark.parametrize(
    ("guard", "what"), [("step_start", "a newcomer"), ("visitor_kept", "somebody who may come in did not")]
)
def test_seeded_schedules_find_what_a_guard_of_joins_prevents(guard: str, what: str) -> None:
    walked = run("join_schedules", "600", "1", guard)
    assert walked.returncode == WENT_WRONG and what in walked.stdout, walked.stdout
