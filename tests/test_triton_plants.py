"""Guards taken out of Triton's kernels, bugs planted into them, and drills: each is seen to matter.

In processes of their own, since a count that bounds a loop may end one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

pytest.importorskip("triton", reason="install triton==3.7.1: requirements-dev.txt has it")

from fault_a2a.kernels.triton import rank, words
from fault_a2a.testing.virtual import VirtualRanks
from tests import scenarios
from tests.apart import exit_code
from tests.drills import run_drills
from tests.rig import Checker, SameRouting, Work, raised
from tests.scenarios import LIES, without
from tests.test_cuda_host import all_on
from tests.test_triton import tiny

SMALL = ["--ranks", "3", "--hidden", "128", "--tokens", "4", "--steps", "6", "--kill", "1@3"]


def lied_to(lie: str, *guards_out: str, seed: int = 7) -> list[str]:
    """Rank 1, the CPU's, writes wrong numbers. What rank 0 has wrong afterwards."""
    config = tiny(link_ms=60_000)
    with VirtualRanks(2, config, backends=("triton", "cpu"), poison=True, first_epoch=256) as ranks:
        ranks.buffers[1].core.set_faults({"lies": LIES[lie], "seed": seed})
        work = SameRouting(config, 2)
        with without(*guards_out):
            tallies = raised(ranks.run(lambda buffer: Checker(buffer, work).run(1)))
        wrong, stats = tallies[0].corrupt, ranks.buffers[0].verbs.stats()
        # Numbers that lie refuse a dispatch; a word that does, or rows that are missing, cost the choices.
        is_refused = tallies[0].lost if lie in ("old_epoch", "combine_count") else stats["num_rejected"]
        return wrong if is_refused else [*wrong, "the liar was believed"]


def late_rank(*guards_out: str) -> list[str]:
    """What stands in rank 1's word is two rounds old, for longer than rank 0 needs to look at it."""
    config = tiny()
    with VirtualRanks(2, config, backends=("triton", "cpu"), poison=True) as ranks:
        ranks.buffers[1].arm("dispatch.gate", ranks.buffers[0].num_rounds + 2, "sleep_us", 2_000_000)
        with without(*guards_out):
            tallies = raised(ranks.run(lambda buffer: Checker(buffer, Work(config, 2, seed=2)).run(3)))
        return tallies[0].corrupt


def view_taken_again(*guards_out: str) -> list[str]:
    """Rank 2 dies between the verbs of a round, and the view without it is there when rank 0 combines."""
    with without(*guards_out), all_on("triton", "cpu", "cpu", "cpu"):
        wrong = scenarios.death_between_dispatch_and_combine(in_round=2, num_rounds=4)
    # The others are the CPU's, and have the same guard out.
    return [text for text in wrong if "rank 0" in text]


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


# guard -> (scenario, other guards that must be out because they cover the same accident). The CPU's kernels have tests
# of their own for each; what is particular to these is that every switch in them works.
GUARDS: dict[str, tuple[Callable[..., list[str]], tuple[str, ...]]] = {
    "view_once": (view_taken_again, ()),
    "clamp_count": (partial(lied_to, "count"), ("check_index",)),
    "check_index": (partial(lied_to, "expert"), ()),
    "claims_met": (partial(lied_to, "claims", seed=3), ()),
    "round_compare": (late_rank, ()),
    "epoch_compare": (partial(lied_to, "old_epoch"), ()),
    "combine_count": (partial(lied_to, "combine_count"), ()),
}


def test_every_switch_is_listed() -> None:
    assert list(GUARDS) == list(words.SWITCHES)


@pytest.mark.parametrize(
    "guard",
    [pytest.param(guard, marks=[] if guard in ("view_once", "clamp_count") else pytest.mark.slow) for guard in GUARDS],
)
def test_guard(guard: str) -> None:
    """Clean with it, red without it."""
    scenario, others = GUARDS[guard]
    assert exit_code(partial(scenario, *others)) == 0
    # An accident of timing may need a second try to happen; that it can happen is what is shown.
    assert any(exit_code(partial(scenario, guard, *others)) for _ in range(3))


def test_a_signal_before_its_rows_is_found() -> None:
    assert exit_code(partial(late_rows, rank.NO_PLANT)) == 0
    assert exit_code(partial(late_rows, rank.PLANT_SIGNAL_FIRST)) != 0


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
