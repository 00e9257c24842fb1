"""New processes take the place of dead ranks while the others go on, and a former life's stores hurt nobody."""

from __future__ import annotations

import pytest

from tests import join_scenarios as scenarios


@pytest.mark.parametrize("victim", [0, 2])
def test_a_new_process_takes_the_place_of_a_dead_one(victim: int) -> None:
    assert scenarios.replaced(victim=victim) == []


@pytest.mark.parametrize("num_spare_partitions", [0, 1])
def test_a_former_life_that_wakes_in_mid_row_hurts_nobody(num_spare_partitions: int) -> None:
    assert scenarios.zombie(seed=1, num_spare_partitions=num_spare_partitions) == []


def test_a_newcomer_that_falls_silent_or_dies_holds_up_nobody() -> None:
    assert scenarios.silent_newcomer() == []
