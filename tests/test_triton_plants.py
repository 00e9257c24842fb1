"""Bugs planted into Triton's kernels, and peers that lie to them: each is seen to matter. In processes of their own,
since a count that bounds a loop may end one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fault_a2a.testing.virtual import VirtualRanks
from tests.drills import ROOT, run_drills
from tests.rig import Checker, SameRouting, raised
from tests.scenarios import LIES
from tests.test_triton import tiny

pytest.importorskip("triton", reason="install triton==3.7.1: requirements-dev.txt has it")

TIMEOUT_S = 120
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


SCENARIOS = {"count": count_lie, "rows": late_rows}


def outcome(scenario: str, plant: str) -> str:
    """ "clean", or what became of the process that ran the scenario."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_triton_plants", scenario, plant],
        cwd=ROOT,
        env={**os.environ, "FAULT_A2A_CORE": "hooks", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    last = (done.stdout.splitlines() or [""])[-1]
    return last if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr[-500:]}"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_nothing_is_wrong(scenario: str) -> None:
    assert outcome(scenario, "NO_PLANT") == "clean"


@pytest.mark.parametrize(("scenario", "plant"), [("count", "PLANT_UNCLAMPED"), ("rows", "PLANT_SIGNAL_FIRST")])
def test_a_planted_bug_is_found(scenario: str, plant: str) -> None:
    assert outcome(scenario, plant) != "clean"


def test_drills() -> None:
    """Real processes, a real SIGKILL, and the judge's recomputation of every output to the last bit."""
    for answer in run_drills([[*SMALL, "--backend", backend] for backend in ("triton", "cpu,triton,cpu")]):
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


if __name__ == "__main__":
    import torch

    from fault_a2a.kernels.triton import rank

    torch.set_num_threads(1)
    found = SCENARIOS[sys.argv[1]](getattr(rank, sys.argv[2]))
    print("; ".join(found) or "clean", flush=True)
    os._exit(0)  # what a planted bug left behind is not looked at
