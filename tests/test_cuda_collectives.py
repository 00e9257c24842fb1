"""Small collectives, which run on the host, while a graph's rounds run on the device. Not run on a GPU.

The device is the twin's driver (tests/window_scenarios.py). A thread of a rank replays, as a stream would; another one
is in the collective.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from fault_a2a._core import core
from fault_a2a.buffer import Buffer
from fault_a2a.testing.virtual import VirtualRanks
from tests import window_scenarios as scenarios
from tests.graphs import CapturedRounds
from tests.rig import Work
from tests.window_scenarios import small

pytestmark = pytest.mark.usefixtures("one_thread")
PATIENCE_S = 10.0


@pytest.fixture(autouse=True)
def twin() -> Iterator[None]:
    with scenarios.twin_driver():
        yield


class Apart:
    """One rank whose device and whose host each have a thread."""

    def __init__(self, buffer: Buffer, work: Work) -> None:
        self.buffer, self.number = buffer, buffer.num_rounds
        self._device, self._host = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.rounds: CapturedRounds = self.on_device(CapturedRounds, buffer, work, "twin").result(PATIENCE_S)

    def on_device(self, call: Callable, *args: object) -> Future:
        return self._device.submit(call, *args)

    def dispatch(self) -> Future:
        return self.on_device(self.rounds.dispatch, self.number)

    def combine(self) -> Future:
        return self.on_device(self.rounds.combine)

    def gather(self) -> Future:
        return self._host.submit(self.buffer.all_gather, torch.ones(1))

    def progress(self, field: str) -> int:
        """What peers see on this rank's page of where it is. Asks no lock: a collective holds that of calls."""
        page = self.buffer.core.addresses()["page"]
        value = ctypes.c_uint64.from_address(page + core.word_offsets()["page_progress"]).value
        shift, bits = core.word_fields()[field]
        return value >> shift & (1 << bits) - 1

    def accused(self) -> list[tuple[int, str]]:
        return [(rank, kind) for rank, kind, _ in self.buffer.core.evidence()]

    def close(self) -> None:
        self._device.shutdown()
        self._host.shutdown()


class Group:
    def __init__(self, num_ranks: int, **changes: object) -> None:
        self.config = small(**changes)
        self.ranks = VirtualRanks(num_ranks, self.config)
        work = Work(self.config, num_ranks, seed=5)
        self.apart = [Apart(buffer, work) for buffer in self.ranks.buffers]

    def __enter__(self) -> list[Apart]:
        return self.apart

    def __exit__(self, *_: object) -> None:
        self.ranks.close()  # every wait ends
        for one in self.apart:
            one.close()


def all_done(calls: list[Future]) -> list[Any]:
    return [call.result(PATIENCE_S) for call in calls]


def settle() -> None:
    """Whoever was told to wait does so by now."""
    time.sleep(0.2)


def test_a_round_that_hears_a_peer_does_not_stop_the_collectives_clock() -> None:
    with Group(2, silence_ms=300) as (first, second):
        gathered = first.gather()
        settle()
        waiting = first.dispatch()
        settle()
        all_done([second.dispatch(), waiting])
        first.buffer.core.set_faults({"unheard": [1]})  # and it comes to no collective
        _, contributions = gathered.result(PATIENCE_S)
        assert contributions.contributed.tolist() == [1, 0]
        assert first.accused() == [(1, "silence")]


def test_a_collective_that_hears_a_peer_does_not_stop_the_rounds_clock() -> None:
    with Group(2, silence_ms=300) as (first, second):
        waiting = first.dispatch()
        settle()
        all_done([first.gather(), second.gather()])
        first.buffer.core.set_faults({"unheard": [1]})  # and it comes to no round
        waiting.result(PATIENCE_S)
        assert first.accused() == [(1, "silence")]


@pytest.mark.parametrize("half", ["dispatch", "combine"])
def test_nobody_is_accused_who_waits_on_its_device(half: str) -> None:
    """Rank 0 is in a collective, with the round launched to which rank 2 comes late. Rank 1 waits for that one too, and
    is no further with its host."""
    with Group(3) as (first, second, late):
        if half == "combine":
            all_done([one.dispatch() for one in (first, second, late)])
            assert first.buffer.num_rounds == first.number + 1, "the host's copy has the round, not yet answered"
        first.buffer.set_timeouts(1, stall_ms=800)
        launched = [getattr(one, half)() for one in (first, second)]
        gathered = [first.gather()]
        time.sleep(2.0)
        all_done([*launched, getattr(late, half)()])
        gathered += [second.gather(), late.gather()]
        assert [result[1].contributed.tolist() for result in all_done(gathered)] == [[1, 1, 1]] * 3
        assert [one.accused() for one in (first, second, late)] == [[], [], []]


def test_what_a_rank_shows_does_not_go_back_after_a_collective() -> None:
    with Group(2) as ranks:
        for _ in range(3):
            all_done([one.dispatch() for one in ranks])
            all_done([one.combine() for one in ranks])
        shown = [one.progress("round") for one in ranks]
        assert shown == [one.number + 2 for one in ranks]
        all_done([one.gather() for one in ranks])
        assert [one.progress("round") for one in ranks] == shown
