"""Real processes that die, stop, pause and leave: the others go on, know what they lost, and suspect nobody else."""

import pytest

from tests import accuser_scenarios as accusers
from tests import namespace_scenarios as namespaces
from tests import process_scenarios as scenarios


def suspects_the_living(wrong: scenarios.Wrong) -> bool:
    return any("suspected live rank" in text for text in wrong)


# -- pauses that are no deaths -----------------------------------------------------------------------------------------


def test_holding_the_gil_for_longer_than_a_silence_is_none() -> None:
    assert scenarios.gil_held() == []


@pytest.mark.parametrize("agreement", ["windows", "store"])
def test_a_proposer_that_holds_the_gil_holds_up_nobody(agreement: str) -> None:
    assert scenarios.gil_held_by_the_proposer(agreement) == []


@pytest.mark.parametrize("apart_s", [1.5, pytest.param(10.0, marks=pytest.mark.slow)])
def test_ranks_that_enter_their_first_round_late_are_not_suspected(apart_s: float) -> None:
    assert scenarios.late_first_round(apart_s) == []


def test_an_idle_group_suspects_nobody() -> None:
    assert scenarios.idle_group() == []


def test_slow_experts_make_nobody_a_suspect() -> None:
    assert scenarios.slow_experts() == []


# -- stopped and woken -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "phase",
    ["dispatch.half_signalled", "combine.send_rows", pytest.param("dispatch.send_rows", marks=pytest.mark.slow)],
)
def test_a_stopped_rank_is_evicted_and_its_late_stores_change_nothing(phase: str) -> None:
    assert scenarios.stopped_and_woken(phase) == []


def test_timeouts_change_while_the_group_waits() -> None:
    assert scenarios.timeouts_changed() == []


# -- a sick watcher ----------------------------------------------------------------------------------------------------


def test_a_rank_that_accuses_everybody_goes_alone() -> None:
    assert accusers.accuses_everybody(seed=1) == []


def test_a_rank_that_accuses_one_after_another_costs_at_most_one() -> None:
    assert accusers.accuses_one_after_another(seed=1) == []


# -- SIGKILL -----------------------------------------------------------------------------------------------------------


def test_deaths_at_random_instants_cost_exactly_the_dead() -> None:
    assert scenarios.killed_at_random(num_deaths=6, seed=1) == []


@pytest.mark.parametrize(
    ("num_ranks", "victims"),
    [(5, [0]), (8, [2, 5]), (6, [5, 4, 3, 1, 0])],
    ids=["rank 0", "two at once", "all but one"],
)
def test_death_of(num_ranks: int, victims: list[int]) -> None:
    assert scenarios.killed(num_ranks, [victims], seed=1) == []


def test_deaths_where_the_store_decides() -> None:
    assert scenarios.killed(5, [[0], [3, 4]], seed=1, agreement="store") == []


# -- no cascade --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["kill", "stop"])
def test_who_waits_for_the_dead_is_not_late_itself(action: str) -> None:
    assert scenarios.no_cascade(num_deaths=3, seed=1, action=action) == []


def test_without_beats_the_living_are_suspected() -> None:
    assert suspects_the_living(scenarios.no_cascade(num_deaths=1, seed=1, guards_off=["beat"]))


def test_a_chain_of_waiting_ranks_does_not_stall() -> None:
    assert scenarios.waiting_chain() == []


def test_without_ticks_the_waiting_are_suspected() -> None:
    assert suspects_the_living(scenarios.waiting_chain(guards_off=["tick"]))


# -- the store, the end and the beginning ------------------------------------------------------------------------------


def test_where_the_store_decides_its_loss_ends_in_quorum_lost_and_nothing_hangs() -> None:
    assert scenarios.store_gone() == []


def test_a_leave_costs_no_finished_round() -> None:
    assert scenarios.one_leaves() == []


def test_a_death_in_another_pid_namespace_is_found_at_once() -> None:
    assert namespaces.the_rank_ends() == []


@pytest.mark.parametrize("point", ["start", "created", "after created", "after opened"])
def test_a_death_in_construction_is_named_and_leaves_no_names(point: str) -> None:
    assert scenarios.dies_in_construction(point) == []
