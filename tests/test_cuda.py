"""backend="cuda" from Python to its kernels: windows handed over, launches, captured graphs, deaths.

Without a GPU everything below the driver's functions is the twin: its memory is this host's, and its kernels are the
same sources. With one, `pytest -m gpu` runs the same tests on it. Not run on a GPU yet.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fault_a2a.buffer import Buffer
from fault_a2a.config import Config
from fault_a2a.core_fields import phases
from fault_a2a.errors import ClosedError, ConstructError
from fault_a2a.testing.virtual import VirtualRanks
from tests import scenarios
from tests.drills import run_drills
from tests.graphs import CapturedRounds
from tests.groups import every_third, name_of
from tests.join_scenarios import Steps, all_in, came_at_step_starts, judge_lives, replace_one
from tests.process_rounds import small as process_config
from tests.processes import Here
from tests.rig import Checker, Tally, Work, run_checked
from tests.test_conformance import FORMATS, RoutedWork, config_of, conform, wait_for_view

pytestmark = pytest.mark.usefixtures("one_thread", "device")


@pytest.fixture(params=["twin", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "twin":
        monkeypatch.setenv("FAULT_A2A_TWIN_DRIVER", "1")
    elif not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    return str(request.param)


# Deaths inside a kernel: its points, at which a fault strikes, are compiled for the twin only.
on_the_twin = pytest.mark.parametrize("device", ["twin"], indirect=True)


def group_of(num_ranks: int, config: Config) -> VirtualRanks:
    return VirtualRanks(num_ranks, config, backends=["cuda"], poison=True)


def small(**changes: object) -> Config:
    fields: dict = {"num_experts": 8, "hidden": 64, "num_topk": 3, "num_max_tokens_per_rank": 6, "settle_ms": 5}
    return Config(**{**fields, "backend": "cuda", **changes})


# --- the same as everywhere else


@pytest.mark.parametrize("formats", every_third((formats,) for formats in FORMATS))
def test_all_alive(formats: tuple) -> None:
    config = config_of(formats)
    with group_of(3, config) as ranks:
        tallies = conform(ranks, RoutedWork(config, 3, seed=1))
    assert sum(tally.lost + tally.unroutable for tally in tallies) == 0 < sum(tally.choices for tally in tallies)


@on_the_twin
@pytest.mark.parametrize(("formats", "phase"), every_third(zip(itertools.cycle(FORMATS), phases(), strict=False)))
def test_one_dies_inside_a_round(formats: tuple, phase: str) -> None:
    config = config_of(formats)
    with group_of(4, config) as ranks:
        tallies = conform(ranks, RoutedWork(config, 4, seed=3), victim=len(phase) % 4, phase=phase)
    assert sum(tally.unroutable for tally in tallies) > 0


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.int32])
def test_quantised_on_the_way_out(scale_dtype: torch.dtype) -> None:
    config = small(hidden=256, dispatch_dtype=torch.float8_e4m3fn, scale_dtype=scale_dtype)
    with group_of(3, config) as ranks:
        tallies = run_checked(ranks, Work(config, 3, seed=2), 4)
    assert scenarios.corrupt(tallies) == [] and sum(tally.lost for tally in tallies) == 0


@pytest.mark.parametrize("formats", FORMATS[::5], ids=name_of)
def test_streams(formats: tuple) -> None:
    """Batches longer than a window: launched in pairs until they have ended."""
    config = config_of(formats, num_max_tokens_per_rank=24, num_chunk_tokens=3)
    with group_of(3, config) as ranks:
        tallies = conform(ranks, RoutedWork(config, 3, seed=1))
    assert sum(tally.lost + tally.unroutable for tally in tallies) == 0 < sum(tally.choices for tally in tallies)


@on_the_twin
@pytest.mark.parametrize("phase", ["dispatch.chunk", "dispatch.chunk_taken", "combine.chunk"])
def test_one_dies_inside_a_stream(phase: str) -> None:
    config = config_of(num_max_tokens_per_rank=24, num_chunk_tokens=3, num_experts=8)
    work = Work(config, 4, seed=3)
    with group_of(4, config) as ranks:
        ranks.buffers[1].arm(phase, 3, "crash", skip=4)
        tallies = run_checked(ranks, work, 5)
        assert [type(tally.error) for tally in tallies if tally.error] == [ClosedError]
        wrong = scenarios.corrupt(tallies) + scenarios.one_view_per_round(ranks, work, tallies)
        assert wrong + scenarios.lost_between_live(ranks, work, tallies, {1}) == []


@pytest.mark.parametrize("num_chunk_tokens", [24, 3])
def test_one_dies_between_the_verbs(num_chunk_tokens: int) -> None:
    """By its host's doing, which a GPU can show too."""
    config = config_of(num_max_tokens_per_rank=24, num_chunk_tokens=num_chunk_tokens, num_experts=8)
    work = Work(config, 4, seed=3)

    def dies(buffer: Buffer, number: int) -> None:
        if buffer.rank == 1 and number == 3:
            buffer.core.crash()
            raise ClosedError("it is dead, and calls nothing more")

    with group_of(4, config) as ranks:
        tallies = run_checked(ranks, work, 8, between=dies)
        assert [type(tally.error) for tally in tallies] == [type(None), ClosedError, type(None), type(None)]
        wrong = scenarios.corrupt(tallies) + scenarios.one_view_per_round(ranks, work, tallies)
        assert wrong + scenarios.lost_between_live(ranks, work, tallies, {1}) == []
    assert all(tally.lost_by_round[3] > 0 < tally.unroutable for tally in tallies if tally.rank != 1)


def test_a_stream_is_not_captured(device: str) -> None:
    config = small(num_chunk_tokens=2)
    work = Work(config, 1, seed=3)
    with group_of(1, config) as ranks:
        with pytest.raises(RuntimeError, match=r"num_chunk_tokens: 2 of 6 tokens make a stream.*cannot be captured"):
            CapturedRounds(ranks.buffers[0], work, device)
        assert run_checked(ranks, work, 2)[0].corrupt == []


def test_rows_go_through_the_windows_of_the_device() -> None:
    """The fabric's partitions, which collectives use, keep the words they were prepared with."""
    config = small()
    with group_of(2, config) as ranks:
        places = [base + at for base in ranks.buffers[0].core.addresses()["inbound"] for at in (0, 64, 128, 192)]
        before = [ctypes.c_uint64.from_address(place).value for place in places]
        run_checked(ranks, Work(config, 2, seed=2), 4)
        assert [ctypes.c_uint64.from_address(place).value for place in places] == before
        assert ranks.buffers[0].num_rounds > 4


def test_collectives_run_beside_rounds() -> None:
    config = small()

    def work(buffer: Buffer) -> Tally:
        checker = Checker(buffer, Work(config, 3, seed=5))
        for number in range(4):
            total, contributions = buffer.all_reduce(torch.tensor([buffer.rank + number]))
            assert contributions.complete and total.item() == 3 + 3 * number
            checker.run(1)
        return checker.tally

    with group_of(3, config) as ranks:
        tallies = ranks.run(work)
    assert [tally.corrupt for tally in tallies] == [[], [], []]


# --- what is particular to it


@pytest.mark.parametrize(
    ("name", "expert", "error"), [("bad", 99, "topk_idx\\[1, 0\\] is 99"), ("repeated", 3, "names expert 3 twice")]
)
def test_a_wrong_choice_is_named_before_anything_is_sent(name: str, expert: int, error: str) -> None:
    config = small()

    def work(buffer: Buffer) -> None:
        x, idx, weights = (tensor.to(buffer.device) for tensor in Work(config, 2, seed=1).tokens(buffer.rank, 0))
        idx = idx.clone()
        idx[1] = torch.tensor([expert, 3, 4])
        with pytest.raises(ValueError, match=error):
            buffer.dispatch(x, idx, weights)
        assert Checker(buffer, Work(config, 2, seed=1)).run(2).corrupt == []

    with group_of(2, config) as ranks:
        assert ranks.run(work) == [None, None]


def test_a_third_round_leaves_the_two_open_ones_alone() -> None:
    """Guard: handles of rounds that may not begin are not those of open ones."""
    config = small()

    def work(buffer: Buffer) -> list[str]:
        checker = Checker(buffer, Work(config, 2, seed=1))
        first, second = buffer.num_rounds, buffer.num_rounds + 1
        open_rounds = [checker.dispatch(first), checker.dispatch(second)]
        with pytest.raises(RuntimeError, match="two rounds are open"):
            buffer.dispatch(*(tensor.to(buffer.device) for tensor in checker.work.tokens(buffer.rank, 0)))
        for number, (received, handle) in zip((first, second), open_rounds, strict=True):
            checker.combine(received, handle, number)
        return checker.tally.corrupt

    with group_of(2, config) as ranks:
        assert ranks.run(work) == [[], []]


def test_hosts_and_devices_do_not_mix() -> None:
    """A window is on the host or on a GPU; found out at construction, before a byte goes anywhere."""
    with pytest.raises(ConstructError, match=r"windows is on .* on rank . and on .* here"):
        VirtualRanks(2, small(construct_timeout_ms=5000), backends=["cuda", "cpu"])


# --- captured graphs


def replay_through_a_death(config: Config, device: str, last: int, victim: int, dies_at: int) -> list[Tally | None]:
    """Rank ``victim`` dies inside round ``dies_at``; the others replay on, and what they captured stays as it was."""
    work = Work(config, 3, seed=7)
    meeting = threading.Barrier(3)

    def one(buffer: Buffer) -> Tally | None:
        rounds = CapturedRounds(buffer, work, device)
        meeting.wait(60)
        while (number := buffer.num_rounds) < last:
            if buffer.rank == victim and number == dies_at:
                rounds.dispatch(number)
                buffer.core.crash()
                return None
            rounds.replay(number)
        return rounds.checker.tally

    with group_of(3, config) as ranks:
        tallies = ranks.run(one)
        wait_for_view(ranks, [rank for rank in range(3) if rank != victim])
        for tally in tallies:
            if isinstance(tally, BaseException):
                raise tally
    return tallies


@pytest.mark.parametrize("recv_format", ["batched", "packed"])
def test_a_graph_replays_through_a_death(device: str, recv_format: str) -> None:
    """Round numbers, lanes, views and losses are found at each replay: nothing is captured anew."""
    config = small(recv_format=recv_format)
    tallies = replay_through_a_death(config, device, last=14, victim=1, dies_at=6)
    for tally in (tallies[0], tallies[2]):
        assert tally is not None and tally.corrupt == []
        assert tally.rounds >= 12 and tally.lost > 0 < tally.unroutable
        lost_in = sorted(number for number, lost in tally.lost_by_round.items() if lost)
        assert lost_in == [6], "the round in which it died, and no other"
        # After the view without it, its experts are unroutable and nothing is lost.
        assert tally.lost_by_round[13] == 0 < tally.unroutable_by_round[13]


def test_nothing_is_raised_and_nothing_sent_for_a_wrong_choice_in_a_graph(device: str) -> None:
    """A replay cannot raise: the round does not begin, counts are 0, every choice is lost, and the next one is well."""
    config = small()
    work = Work(config, 1, seed=3)
    with group_of(1, config) as ranks:
        rounds = CapturedRounds(ranks.buffers[0], work, device)
        number = ranks.buffers[0].num_rounds
        rounds.replay(number)
        rounds.inputs[1][0, 0] = 99
        rounds._dispatch.replay()
        assert int(rounds.received.num_tokens.sum()) == 0 == int(rounds.received.offsets.sum())
        rounds._combine.replay()
        assert bool(rounds.outcome.lost)
        assert ranks.buffers[0].num_rounds == number + 1
        rounds.replay(number + 1)
        assert rounds.checker.tally.corrupt == []


# --- between processes


@dataclass(frozen=True)
class GraphSteps(Steps):
    """Rounds from one capture a process, whoever comes and goes."""

    device: str = "twin"

    def __call__(self, here: Here) -> None:
        if self.device == "twin":  # this process was forked from one that may not have it
            os.environ["FAULT_A2A_TWIN_DRIVER"] = "1"
        captured.clear()
        super().__call__(here)

    def exchange(self, here: Here, checker: Checker, number: int) -> None:
        if not captured:
            captured.append(
                CapturedRounds(checker.buffer, self.work(here.config, here.num_ranks), self.device, checker)
            )
        captured[0].replay(number)


captured: list[CapturedRounds] = []  # of this process


def test_a_graph_replays_through_the_replacement_of_a_rank(device: str) -> None:
    """Survivors never capture again: the newcomer's window lies where that of the dead rank lay."""
    config, steps = process_config(4, backend="cuda"), GraphSteps(seed=1, device=device)
    reports, gone = replace_one(4, 2, config, steps, (), from_round=12, num_more=12)
    assert judge_lives(reports, steps, config, gone) + all_in(reports, range(4)) + came_at_step_starts(reports) == []
    assert all(report.tally.rounds > 12 for rank, report in reports.items() if rank != 2)


@pytest.fixture
def drilled(device: str) -> Iterator[Sequence[dict]]:
    shape = ["--ranks", "4", "--hidden", "256", "--tokens", "8", "--steps", "20", "--backend", "cuda"]
    before = set(Path("/dev/shm").glob("fa2a-*"))
    faults = (["--kill", "1@10"], ["--stop", "2@8:900", "--silence-ms", "200"], ["--kill", "1@5", "--rejoin", "1@10"])
    yield run_drills([[*shape, *fault] for fault in faults], timeout_s=240)
    deadline = time.monotonic() + 10
    while not set(Path("/dev/shm").glob("fa2a-*")) <= before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert set(Path("/dev/shm").glob("fa2a-*")) <= before


def test_processes_hand_their_windows_over_and_lose_a_rank(drilled: Sequence[dict]) -> None:
    # Who was killed in the last one is back.
    for answer, gone, evidence in zip(drilled, ([1], [2], []), ("exit", "silence", "exit"), strict=True):
        assert answer["ok"], answer["problems"]
        assert answer["evicted"] == gone and answer["corrupt_rows"] == 0 and answer["accounting_exact"]
        assert {kind for line in answer["faults"] for kind in line["evidence"]} == {evidence}
