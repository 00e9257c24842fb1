"""The life of windows in a device's memory: mapped, let go, mapped anew, and never under a running kernel.

The device is the twin's driver (tests/window_scenarios.py). Not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fault_a2a.buffer import Buffer
from fault_a2a.testing.virtual import VirtualRanks
from tests import window_scenarios as scenarios
from tests.rig import Checker, Tally, Work, raised
from tests.test_conformance import wait_for_view
from tests.window_scenarios import small, window_at

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def twin() -> Iterator[None]:
    with scenarios.twin_driver():
        yield


def run_on(ranks: VirtualRanks, work: Work, living: list[int], num_rounds: int = 2) -> None:
    tallies = raised(ranks.run(lambda buffer: Checker(buffer, work).run(num_rounds), living))
    assert [tally.corrupt for tally in tallies] == [[] for _ in living]


def test_the_window_of_the_dead_is_let_go_at_the_next_step_start() -> None:
    config = small()
    work = Work(config, 3, seed=2)
    with VirtualRanks(3, config) as ranks:
        survivor = ranks.buffers[0]
        theirs, address = window_at(survivor, 1), survivor.core.window_addresses()[1][1]
        run_on(ranks, work, [0, 1, 2])
        ranks.buffers[1].core.crash()
        wait_for_view(ranks, [0, 2])
        run_on(ranks, work, [0, 2])
        assert window_at(survivor, 1) == theirs, "kernels may run until the step start"
        survivor.begin_step()
        assert window_at(survivor, 1) not in (theirs, "")
        assert survivor.core.window_addresses()[1][1] == address
        run_on(ranks, work, [0, 2])


def test_not_while_a_round_is_left_to_run_in_which_it_is_a_member() -> None:
    config = small()
    work = Work(config, 3, seed=2)
    with VirtualRanks(3, config) as ranks:
        survivor, ahead = ranks.buffers[0], ranks.buffers[2]
        theirs = window_at(survivor, 1)
        run_on(ranks, work, [0, 1, 2])
        last = ahead.num_rounds  # which the survivor has not begun
        received, handle, receive = ahead.dispatch(*work.tokens(2, last), return_recv_hook=True)
        ranks.buffers[1].core.crash()
        wait_for_view(ranks, [0, 2])
        assert survivor.num_rounds == last < survivor.view.first_round
        survivor.begin_step()
        assert window_at(survivor, 1) == theirs

        def finish(buffer: Buffer) -> Tally:
            checker = Checker(buffer, work)
            if buffer is survivor:
                return checker.run(1)
            receive()
            checker.check_received(received, handle, last)
            checker.check_output(*buffer.combine(checker.experts(received), handle), last)
            return checker.tally

        assert [tally.corrupt for tally in raised(ranks.run(finish, [0, 2]))] == [[], []]
        survivor.begin_step()
        assert window_at(survivor, 1) != theirs


def test_a_buffer_that_is_closed_holds_nobodys_window() -> None:
    with VirtualRanks(3, small()) as ranks:
        buffer = ranks.buffers[0]
        others = [window_at(buffer, rank) for rank in (1, 2)]
        assert len({*others, ""}) == 3
        buffer.close()
        nobodys = [window_at(buffer, rank) for rank in (1, 2)]
        assert len(set(nobodys)) == 1 and not {*nobodys} & {*others, ""}


def test_replaced() -> None:
    assert scenarios.replaced() == []


def test_a_newcomer_that_dies_on_its_way_in_is_let_go_too() -> None:
    assert scenarios.dies_on_its_way_in() == []


def test_one_that_is_evicted_alive_is_let_go() -> None:
    assert scenarios.evicted_alive() == []


def test_growth() -> None:
    assert scenarios.grows() == []
