"""Bugs planted into Triton's kernels, and peers that lie to them: each is seen to matter. In processes of their own,
since a count that bounds a loop may end one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

pytest.importorskip("triton", reason="install triton==3.7.1: requirements-dev.txt has it")

from fault_a2a.kernels.triton import rank
from fault_a2a.testing.virtual import VirtualRanks
from tests.apart import exit_code
from tests.drills import run_drills
from tests.rig import Checker, SameRouting, raised
from tests.scenarios import LIES
from tests.test_triton import tiny

SMALL = ["--ranks", "3", "--hidden", "128", "--tokens", "4", "--steps", "6", "--kill", "1@3"]


def count_lie(plant: int) -> list[str]:
    """Rank 1 says that it sent half a million rows. What rank 0 has wrong afterwards."""
    config = tiny()
    with VirtualRanks(2, config, backends=("triton", "cpu"), poison=True) as ranks:
        ranks.buffers[0].verbs.plant = plant  # type: ignore[attr-defined]
        ranks.buffers[1].core.set_faults({"lies": LIES["count"]})
        work = SameRouting(config, 2)
        tallies = raised(ranks.run(lambda buffer: Checker(buffer, work).run(1)))
        wrong = tallies[0].corrupt
        if ranks.buffers[0].verbs.stats()["num_rejected"] != 1:
            wrong.append("the source was not refused")
        return wrong


def late_rows(plant: int) -> list[str]:
    """Rank 0 pauses when its rows are stored, or, planted, when its signal is. What rank 1 has wrong afterwards."""
    config = tiny()
    with VirtualRanks(2, config, backends=("triton", "cpu"), poison=True) as ranks:
        buffer = ranks.buffers[0]
        buffer.verbs.plant = plant  # type: ignore[attr-defined]
        buffer.arm("dispatch.rows_sent", buffer.num_rounds + 2, "sleep_us", 1_000_000)
        work = SameRouting(config, 2)
        tallies = raised(ranks.run(lambda buffer: Checker(buffer, work).run(3)))
        wrong = tallies[1].corrupt
        if tallies[1].lost or tallies[0].lost:
            wrong.append("choices of ranks that did nothing wrong are lost")
        return wrong


@pytest.mark.parametrize("scenario", [count_lie, late_rows])
def test_nothing_is_wrong(scenario: Callable[[int], list[str]]) -> None:
    assert exit_code(partial(scenario, rank.NO_PLANT)) == 0


@pytest.mark.parametrize(
    ("scenario", "plant"), [(count_lie, rank.PLANT_UNCLAMPED), (late_rows, rank.PLANT_SIGNAL_FIRST)]
)
def test_a_planted_bug_is_found(scenario: Callable[[int], list[str]], plant: int) -> None:
    assert exit_code(partial(scenario, plant)) != 0


@pytest.mark.parametrize("backend", ["cpu,triton,cpu", pytest.param("triton", marks=pytest.mark.slow)])
def test_drills(backend: str) -> None:
    """Real processes, a real SIGKILL, and the judge's recomputation of every output to the last bit."""
    (answer,) = run_drills([[*SMALL, "--backend", backend]])
    assert answer["ok"] and answer["exit_code"] == 0, answer["problems"]
    assert answer["evicted"] == [1] and answer["accounting_exact"] and answer["steps_completed"] == 6


@pytest.mark.slow
def test_a_rank_on_triton_is_replaced() -> None:
    """The newcomer compiles, or builds its kernels, while the members of a mixed group run on."""
    sizes = ["--hidden", "64", "--experts", "6", "--topk", "2", "--tokens", "4", "--steps", "30"]
    faults = ["--kill", "1@2", "--rejoin", "1@4", "--compute-us", "400000"]
    (answer,) = run_drills([["--ranks", "3", *sizes, *faults, "--backend", "cpu,triton,cpu"]])
    assert answer["ok"], answer["problems"]
    assert answer["survivors"] == [0, 1, 2] and answer["accounting_exact"]
