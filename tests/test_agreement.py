"""Agreement on a view: every schedule of a few members, and real processes without a store or a majority alive."""

import pytest

from tests import agreement_scenarios as scenarios
from tests.ballots import WENT_WRONG, run


def test_no_schedule_decides_two_views_and_none_is_stuck() -> None:
    walked = run("ballots")
    print(walked.stdout)
    assert walked.returncode == 0, walked.stdout
    assert walked.stdout.count("two views: never, stuck: never") == 2
    assert walked.stdout.count("rank 3 ends with 100, decided was 100") == 2  # the schedule of five members


def test_groups_on_seeded_schedules_agree_and_go_on() -> None:
    walked = run("agreement_schedules", "600")
    print(walked.stdout)
    assert walked.returncode == 0, walked.stdout


@pytest.mark.parametrize(
    ("guard", "first_seed", "what"),
    [("all_promised", 1, "never promised"), ("frozen_records", 16200, "two views of one epoch")],
)
def test_seeded_schedules_find_what_a_guard_prevents(guard: str, first_seed: int, what: str) -> None:
    walked = run("agreement_schedules", "50", str(first_seed), guard)
    assert walked.returncode == WENT_WRONG, walked.stdout
    assert what in walked.stdout


def test_views_change_without_the_store() -> None:
    assert scenarios.store_lost_then_deaths() == []


@pytest.mark.parametrize(
    "dead_ms", [0.0, 0.5, 2.0, *(pytest.param(ms, marks=pytest.mark.slow) for ms in (0.2, 1.0, 5.0))]
)
def test_the_proposer_dies_in_mid_agreement(dead_ms: float) -> None:
    assert scenarios.proposer_dies_with(dead_ms=dead_ms) == []


def test_seven_of_eight_killed_leave_a_group_of_one() -> None:
    assert scenarios.last_one_of(8) == []


@pytest.mark.parametrize(
    ("num_ranks", "stopped"),
    [
        *((2, [1]), (2, [0]), (4, [2, 3]), (4, [0, 1]), (5, [0, 2, 4])),
        pytest.param(6, [1, 3, 5], marks=pytest.mark.slow),
    ],
    ids=["higher of two", "lower of two", "upper half", "lower half", "most", "half without the lowest"],
)
def test_stopped_at_once_and_woken(num_ranks: int, stopped: list[int]) -> None:
    assert scenarios.some_stopped(num_ranks, stopped) == []


def test_two_ranks_whose_link_is_cut() -> None:
    assert scenarios.two_with_a_cut_link() == []
