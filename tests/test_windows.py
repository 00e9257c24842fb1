"""The life of windows in a device's memory: mapped, let go, mapped anew, and never under a running kernel.

The device is the twin's driver (tests/window_scenarios.py). Not run on a GPU.
"""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist

from fault_a2a._core import core
from fault_a2a.buffer import Buffer
from fault_a2a.errors import ConstructError
from fault_a2a.group import Group
from fault_a2a.testing.virtual import VirtualRanks, run_threads
from tests import window_scenarios as scenarios
from tests.graphs import CapturedRounds
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


def test_a_step_start_waits_for_the_rounds_that_a_graph_replays() -> None:
    """Who reads a counter between two replays sees a round that is open, and the step start comes when it is done."""
    config = small()
    work = Work(config, 2, seed=2)
    with VirtualRanks(2, config) as ranks:

        def one(buffer: Buffer) -> Tally:
            number, rounds = buffer.num_rounds, CapturedRounds(buffer, work, "twin")
            rounds.dispatch(number)
            assert buffer.num_rounds == number + 1, "it has begun"
            core.hold_twin_launches(True)  # what follows is launched, and the device is not there yet
            rounds.combine()
            buffer.begin_step()
            core.hold_twin_launches(False)
            return Checker(buffer, work).run(1)

        assert [tally.corrupt for tally in raised(ranks.run(one))] == [[], []]


def test_a_step_start_refuses_a_round_that_nobody_has_launched_the_end_of() -> None:
    config = small()
    work = Work(config, 2, seed=2)
    with VirtualRanks(2, config) as ranks:

        def one(buffer: Buffer) -> None:
            rounds = CapturedRounds(buffer, work, "twin")
            rounds.dispatch(buffer.num_rounds)
            assert buffer.num_rounds > 0
            with pytest.raises(RuntimeError, match="open"):
                buffer.begin_step()
            rounds.combine()
            buffer.begin_step()

        raised(ranks.run(one))


@contextmanager
def slow_driver(**ms: int) -> Iterator[None]:
    core.slow_twin_driver(**ms)
    try:
        yield
    finally:
        core.slow_twin_driver()


def test_founders_wait_for_doors_that_take_their_time() -> None:
    config = small()
    with slow_driver(access_ms=50, export_ms=300), VirtualRanks(3, config) as ranks:
        run_on(ranks, Work(config, 3, seed=2), [0, 1, 2])


def test_a_door_answers_while_its_rank_swaps_the_windows_of_others() -> None:
    config = small()
    with VirtualRanks(3, config) as ranks:
        survivor, other = ranks.buffers[0], ranks.buffers[2]
        ranks.buffers[1].core.crash()
        wait_for_view(ranks, [0, 2])
        run_on(ranks, Work(config, 3, seed=2), [0, 2])
        with slow_driver(access_ms=1500):
            step_start = threading.Thread(target=survivor.begin_step)
            step_start.start()
            time.sleep(0.3)
            assert other.core.ask_door(owner=0, partition=2, timeout_ms=500)
            assert step_start.is_alive(), "it was to be asked in the midst of the swap"
            step_start.join()


def test_a_buffer_that_is_collected_stops_no_other_thread() -> None:
    """Its device is waited for, and the rounds that it waits for are of other ranks, in threads of this process."""
    ranks = VirtualRanks(2, small())
    ranks.close()
    spans, is_over = [0.0], threading.Event()

    def keep_time() -> None:
        last = time.monotonic()
        while not is_over.wait(0.01):
            spans.append(time.monotonic() - last)
            last = time.monotonic()

    clock = threading.Thread(target=keep_time)
    clock.start()
    with slow_driver(finish_ms=1500):
        from_s = time.monotonic()
        ranks.buffers.clear()
        gc.collect()
        assert time.monotonic() - from_s > 1.5, "nothing was waited for"
    is_over.set()
    clock.join()
    assert max(spans) < 1.0


def test_replaced() -> None:
    assert scenarios.replaced() == []


def test_a_newcomer_that_dies_on_its_way_in_is_let_go_too() -> None:
    assert scenarios.dies_on_its_way_in() == []


def test_one_that_is_evicted_alive_is_let_go() -> None:
    assert scenarios.evicted_alive() == []


def test_one_that_is_evicted_and_comes_back_imports_anew() -> None:
    assert scenarios.evicted_and_back() == []


def test_growth() -> None:
    assert scenarios.grows() == []


# -- several hosts, which are not there yet


def on_two_hosts(monkeypatch: pytest.MonkeyPatch, backend: str) -> str:
    """What two ranks are told that find themselves on two hosts."""
    hosts = itertools.count()
    monkeypatch.setattr("fault_a2a.buffer.host_of_this_process", lambda: f"host-{next(hosts)}")
    store, config = dist.HashStore(), small(backend=backend, construct_timeout_ms=5000)
    errors = []

    def one(rank: int) -> None:
        try:
            Buffer(Group(store, rank, 2), config)
        except ConstructError as error:
            errors.append(str(error))

    run_threads([lambda: one(0), lambda: one(1)])
    assert len(errors) == 2
    return errors[0]


def test_ranks_on_two_hosts_are_told_what_their_windows_would_need(monkeypatch: pytest.MonkeyPatch) -> None:
    error = on_two_hosts(monkeypatch, "cuda")
    assert error.startswith("group: ranks [") and "connects the processes of one host" in error
    assert "Between hosts windows on a GPU go by fabric handles, which are not to be had here" in error
    assert "keep the group on one host" in error


def test_without_a_gpu_nobody_speaks_of_fabrics(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "fabric" not in on_two_hosts(monkeypatch, "cpu")


def test_the_twin_hands_windows_over_on_a_host_only() -> None:
    assert core.why_no_windows(0, across_hosts=False) == ""
    assert "exports no fabric handles" in core.why_no_windows(0, across_hosts=True)


def test_without_a_driver_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAULT_A2A_TWIN_DRIVER")
    why = core.why_no_windows(0, across_hosts=False)
    assert not why or ("install" in why or "nvidia-smi" in why)
