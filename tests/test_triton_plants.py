"""Guards taken out of Triton's kernels, bugs planted into them, and drills: each is seen to matter.

In processes of their own, since a count that bounds a loop may end one."""

from __future__ import annotations

import dataclasses
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

pytest.importorskip("triton", reason="install triton==3.7.1: requirements-dev.txt has it")

from fault_a2a._core import core
from fault_a2a.buffer import Buffer
from fault_a2a.kernels.triton import layout, rank, target, window, words
from fault_a2a.testing.virtual import VirtualRanks
from tests import scenarios
from tests.apart import exit_code
from tests.ballots import ROOT
from tests.drills import run_drills
from tests.rig import Checker, SameRouting, Tally, Work, raised, run_checked, shown, suspicions_of
from tests.scenarios import LIES, Wrong, corrupt, one_view_per_round, without
from tests.test_cuda_host import all_on
from tests.test_triton import tiny

NOTHING = "the scenario shows nothing"
SMALL = ["--ranks", "3", "--hidden", "128", "--tokens", "4", "--steps", "6", "--kill", "1@3"]


@contextmanager
def out_of_triton(*guards: str) -> Iterator[None]:
    """The named guards are out of Triton's kernels in this process. The host and the CPU's ranks keep theirs, so what
    goes wrong is these kernels' doing."""
    off = sum(layout.GUARDS[guard] for guard in guards)

    def take_out(self: rank.Rank) -> None:
        self.at = dataclasses.replace(self.at, guards_off=core.guards_off() | off)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank.Rank, "_take_guards_out", take_out)
        yield


def group(*backends: str, **changes: object) -> VirtualRanks:
    """A rank a backend, few tokens. A wait that a busy machine makes long is not a fault."""
    config = tiny(**{"link_ms": 60_000, "settle_ms": 20, **changes})
    return VirtualRanks(len(backends), config, backends=backends, poison=True)


def lied_to(lie: str, seed: int = 7) -> Wrong:
    """Rank 1, the CPU's, writes wrong numbers. What rank 0 has wrong afterwards."""
    config = tiny(link_ms=60_000, stall_ms=6000)
    with VirtualRanks(2, config, backends=("triton", "cpu"), poison=True, first_epoch=256) as ranks:
        ranks.buffers[1].core.set_faults({"lies": LIES[lie], "seed": seed})
        work = SameRouting(config, 2)
        tallies = raised(ranks.run(lambda buffer: Checker(buffer, work).run(1)))
        wrong, stats = tallies[0].corrupt, ranks.buffers[0].verbs.stats()
        # Numbers that lie refuse a dispatch; a word that does, or rows that are missing, cost the choices.
        is_refused = tallies[0].lost if lie in ("old_epoch", "combine_count") else stats["num_rejected"]
        return wrong if is_refused else [*wrong, "the liar was believed"]


def late_rank() -> Wrong:
    """What stands in rank 1's word is two rounds old, for longer than rank 0 needs to look at it."""
    with group("triton", "cpu") as ranks:
        ranks.buffers[1].arm("dispatch.gate", ranks.buffers[0].num_rounds + 2, "sleep_us", 2_000_000)
        return run_checked(ranks, Work(ranks.config, 2, seed=2), 3)[0].corrupt


def not_answered() -> Wrong:
    """Rank 1 lies to rank 0, which takes nothing of it. It must be told so, and not be left to wait."""
    with group("triton", "cpu", stall_ms=3000) as ranks:
        ranks.buffers[1].core.set_faults({"lies": LIES["expert"], "lies_from_round": 2, "seed": 7})
        run_checked(ranks, SameRouting(ranks.config, 2), 3)
        if not ranks.buffers[0].verbs.stats()["num_rejected"]:
            return [NOTHING]
        return [f"the liar found {found.kind}" for found in ranks.buffers[1].evidence()]


def closed_while_waiting(patience_s: float = 6.0) -> Wrong:
    """Rank 0 waits for one that never comes, and is closed meanwhile. Its call must end."""
    with group("triton", "cpu") as ranks:
        buffers = ranks.buffers
        work = Work(ranks.config, 2)
        waiting = threading.Thread(target=ranks.run, args=(lambda buffer: Checker(buffer, work).run(1), [0]))
        waiting.start()
        time.sleep(1.0)
        closing = threading.Thread(target=buffers[0].close)
        closing.start()
        waiting.join(patience_s)
        wrong = ["rank 0 still waits"] if waiting.is_alive() else []
        buffers[1].close()  # which ends the wait if nothing else does
        for thread in (waiting, closing):
            thread.join()
        return wrong


def standstill() -> Wrong:
    """Rank 0 waits for rank 1, both stand still for longer than a stall lasts, as on a host that stops, and rank 1
    comes soon after."""
    with group("triton", "cpu", stall_ms=3000) as ranks:
        ranks.buffers[1].arm("dispatch.gate", 3, "sleep_us", 6_000_000)

        def stop_looking() -> None:
            while ranks.buffers[0].num_rounds < 4:
                time.sleep(0.01)
            time.sleep(0.3)
            with target._one_at_a_time:  # without it nothing is interpreted
                time.sleep(4.0)

        stopping = threading.Thread(target=stop_looking)
        stopping.start()
        tallies = run_checked(ranks, Work(ranks.config, 2), 4)
        stopping.join()
        return corrupt(tallies) + [str(found) for found in suspicions_of(ranks, {0, 1})]


def promise_in_between(slow_store: bool = False) -> Wrong:
    """Rank 1 dies before round 5, rank 2 is late with its promise, and rank 0, which has promised, is at the gate.

    It comes there after its promise, or with ``slow_store`` before: its kernel publishes that it has begun, and that
    takes longer than the promise does.
    """
    with group("triton", "cpu", "cpu", silence_ms=60_000, stall_ms=60_000) as ranks, slow_to_publish(slow_store):
        if not slow_store:
            ranks.buffers[0].arm("dispatch.gate", 5, "sleep_us", 1_500_000)
        ranks.buffers[1].arm("dispatch.gate", 5, "crash")
        ranks.buffers[2].arm("dispatch.gate", 5, "sleep_us", 4_000_000)
        work = Work(ranks.config, 3)

        def one(buffer: Buffer) -> Tally:
            checker = Checker(buffer, work)
            checker.run(4)
            if buffer.rank == 1:
                time.sleep(0.7)
            if buffer.rank == 2:
                buffer.core.pause_pulse(3000)
            return checker.run(3)

        tallies = raised(ranks.run(one))
        return corrupt(tallies) + one_view_per_round(ranks, work, tallies)


@contextmanager
def slow_to_publish(is_slow: bool) -> Iterator[None]:
    """To publish a started round, round 5, takes Triton's kernels a while."""
    publish = window.publish

    def slow(address: Any, value: Any, *mask: Any) -> None:
        # Of all that is published only this is the number of a round and nothing else.
        if int(value.handle.data.flat[0]) == 6:
            time.sleep(1.5)
        publish(address, value, *mask)

    with pytest.MonkeyPatch.context() as patch:
        if is_slow:
            patch.setattr(window, "publish", slow)
        yield


def late_rows(plant: int) -> Wrong:
    """Rank 0 pauses when its rows are stored, or, planted, when its signal is. What rank 1 has wrong afterwards."""
    with group("triton", "cpu", settle_ms=50) as ranks:
        buffer = ranks.buffers[0]
        buffer.verbs.plant = plant  # type: ignore[attr-defined]
        buffer.arm("dispatch.rows_sent", buffer.num_rounds + 2, "sleep_us", 1_000_000)
        tallies = run_checked(ranks, SameRouting(ranks.config, 2), 3)
        wrong = tallies[1].corrupt
        if tallies[1].lost or tallies[0].lost:
            wrong.append("choices of ranks that did nothing wrong are lost")
        return wrong


def on(backends: tuple[str, ...], scenario: Callable[[], Wrong]) -> Wrong:
    """A scenario of tests/scenarios.py, with groups of these ranks."""
    with all_on(*backends):
        return scenario()


FIRST, SECOND, BOTH = ("triton", "cpu"), ("cpu", "triton"), ("triton",)
# guard -> (scenario, other guards that must be out because they cover the same accident). The CPU's kernels have tests
# of their own for each; what is particular to these is that every switch in them works. Which ranks are Triton's: those
# whose guard it is.
GUARDS: dict[str, tuple[Callable[[], Wrong], tuple[str, ...]]] = {
    "view_once": (
        partial(on, ("triton", "cpu", "cpu", "cpu"), partial(scenarios.death_between_dispatch_and_combine, 2, 4)),
        (),
    ),
    "clamp_count": (partial(lied_to, "count"), ("check_index",)),
    "check_index": (partial(lied_to, "expert"), ("claims_met",)),
    "claims_met": (partial(lied_to, "claims", seed=3), ()),
    "round_compare": (late_rank, ()),
    "epoch_compare": (partial(lied_to, "old_epoch"), ()),
    "combine_count": (partial(lied_to, "combine_count"), ()),
    "consent": (partial(on, FIRST, partial(scenarios.overtaken, scale=6, num_tokens=4)), ("recheck",)),
    "recheck": (partial(on, SECOND, partial(scenarios.overtaken, scale=6, num_tokens=4)), ("consent",)),
    "hold": (partial(on, FIRST, partial(scenarios.running_ahead, scale=14)), ("promise",)),
    "promise": (promise_in_between, ("hold",)),
    "promise_fence": (partial(promise_in_between, slow_store=True), ()),
    "later_declined": (
        partial(on, SECOND, partial(scenarios.overtaken_rank_catches_up, scale=6)),
        ("hold", "promise"),
    ),
    "mutual_wait": (partial(on, BOTH, partial(scenarios.crossed_orders, patience_s=12.0, stall_ms=3000)), ()),
    "one_answer": (not_answered, ()),
    "third_round": (partial(on, BOTH, scenarios.third_round), ()),
    "tick": (
        partial(on, ("cpu", "triton", "cpu"), partial(scenarios.waiting_longer_than_a_stall, scale=8)),
        (),
    ),
    "gap_restart": (standstill, ()),
    "incarnation": (partial(on, ("triton", "cpu", "cpu"), scenarios.foreign_incarnation), ()),
    "release_word": (closed_while_waiting, ()),
}
QUICK = ("check_index", "third_round")
# Half a minute each, of waits that must be longer than interpreted work is on a busy machine.
LONG = ("later_declined", "mutual_wait", "tick", "gap_restart")


def marks_of(guard: str) -> list[pytest.MarkDecorator]:
    if guard in QUICK:
        return []
    return [pytest.mark.exhaustive if guard in LONG else pytest.mark.slow]


def found_in(scenario: Callable[[], Wrong], others: tuple[str, ...], *guards: str) -> Wrong:
    """What a scenario finds with the ``guards`` out of Triton's kernels, and the ``others`` out of everybody's."""
    with without(*others), out_of_triton(*guards):
        wrong = shown(scenario)
    # A scenario that did not come about is not clean, and without the guard it is not red.
    return [text for text in wrong if not (guards and text.endswith(NOTHING))]


def test_every_switch_is_listed() -> None:
    assert list(GUARDS) == list(words.SWITCHES)


def test_every_guard_of_the_other_kernels_is_a_switch() -> None:
    """What they ask about themselves, or by the headers that they share. Triton's kernels have no streams."""
    headers = [ROOT / "csrc/protocol" / name for name in ("round.hpp", "signal.hpp", "stall.hpp", "wait.hpp")]
    sources = [*headers, *(ROOT / "kernels/cuda").glob("*.cu*"), *(ROOT / "kernels/cpu").glob("*.[ch]pp")]
    asked = {guard for path in sources for guard in re.findall(r"guarded\(guard_(\w+)\)", path.read_text())}
    not_in_rounds = {"chunk_compare", "chunk_consent", "fresh_words", "copy_fence"}
    not_in_rounds |= {"all_say", "frozen_set", "say_epoch", "quorum_ends"}
    not_here = {"evicted_is_suspect", "taken_back"}  # a view is installed by the host; docs/guards.md on the other
    assert asked - not_in_rounds - not_here == set(GUARDS)


@pytest.mark.parametrize("guard", [pytest.param(guard, marks=marks_of(guard)) for guard in GUARDS])
def test_guard(guard: str) -> None:
    """Clean with it, red without it."""
    scenario, others = GUARDS[guard]
    assert exit_code(partial(found_in, scenario, others)) == 0
    # An accident of timing may need a second try to happen; that it can happen is what is shown.
    assert any(exit_code(partial(found_in, scenario, others, guard)) for _ in range(3))


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
