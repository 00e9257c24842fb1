"""Windows in a device's memory while ranks come and go, seen from outside of the core. Each scenario returns what went
wrong. The device is the twin's driver, whose memory is files: the system knows what lies at an address, and who has it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from fault_a2a._core import core
from fault_a2a.buffer import Buffer
from fault_a2a.config import Config
from fault_a2a.errors import RankEvictedError
from fault_a2a.testing.virtual import VirtualRanks
from tests import join_scenarios, process_rounds
from tests.graphs import CapturedRounds
from tests.join_scenarios import (
    ROUNDS_PER_STEP,
    ComesBack,
    Steps,
    all_in,
    came_at_step_starts,
    ended_whole,
    judge_lives,
)
from tests.process_rounds import begun_of, disagreements, suspicions_of_live
from tests.processes import Here, Ranks
from tests.rig import Checker, Tally, Work
from tests.scenarios import Wrong, corrupt

_PATIENCE_S = 30.0


@contextmanager
def twin_driver() -> Iterator[None]:
    """The CUDA driver of this process is the twin's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAULT_A2A_TWIN_DRIVER", "1")
        yield


def small(**changes: object) -> Config:
    fields: dict = {"num_experts": 6, "hidden": 32, "num_topk": 2, "num_max_tokens_per_rank": 6, "settle_ms": 5}
    return Config(**{**fields, "backend": "cuda", **changes})


def window_at(buffer: Buffer, owner: int) -> str:
    """Which memory lies where this rank stores what it sends to ``owner``; "" if none does."""
    address = buffer.core.window_addresses()[1][owner]
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, device, inode = line.split()[:5]
        first, end = (int(edge, 16) for edge in span.split("-"))
        if first <= address < end:
            return f"{device} {inode}" if int(inode) else ""
    return ""


def is_held(memory: str) -> bool:
    """Whether this process has that memory mapped or open, wherever."""
    mapped = {" ".join(line.split()[3:5]) for line in Path("/proc/self/maps").read_text().splitlines()}
    return memory in mapped | set(_open_files())


def _open_files() -> Iterator[str]:
    for name in os.listdir("/proc/self/fd"):
        try:
            found = os.stat(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # that of the listing
            continue
        yield f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x} {found.st_ino}"


# -- never under a running kernel --------------------------------------------------------------------------------------


def swapped_under_kernels(victim: int = 1) -> Wrong:
    """A rank dies. The others come to the next step start with a round launched that the device has not begun."""
    config = small()
    work = Work(config, 3, seed=7)
    everybody, survivors = threading.Barrier(3), threading.Barrier(2)

    def one(buffer: Buffer) -> Tally:
        rounds = CapturedRounds(buffer, work, "twin")
        everybody.wait(_PATIENCE_S)
        for _ in range(3):
            rounds.replay(buffer.num_rounds)
        if buffer.rank == victim:
            buffer.core.crash()
            return rounds.checker.tally
        theirs = window_at(buffer, victim)
        _wait_until_out(buffer, victim)
        for _ in range(2):
            rounds.replay(buffer.num_rounds)
        survivors.wait(_PATIENCE_S)  # both come to the step start with what both have launched
        core.hold_twin_launches(True)
        rounds.launch(buffer.num_rounds)
        if window_at(buffer, victim) != theirs:
            rounds.checker.tally.corrupt.append("a window was swapped before the step start")
        buffer.begin_step()
        core.hold_twin_launches(False)
        if window_at(buffer, victim) == theirs:
            rounds.checker.tally.corrupt.append("the window of the dead is still mapped")
        for _ in range(3):
            rounds.replay(buffer.num_rounds)
        return rounds.checker.tally

    with twin_driver(), VirtualRanks(3, config, poison=True) as ranks:
        tallies = ranks.run(one)
    wrong = [f"rank {rank}: {error!r}" for rank, error in enumerate(tallies) if isinstance(error, BaseException)]
    return wrong or corrupt(tallies)


def _wait_until_out(buffer: Buffer, victim: int) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while victim in buffer.view.active_ranks:
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank {victim} was not evicted in {_PATIENCE_S} s")
        time.sleep(0.001)


# -- between processes -------------------------------------------------------------------------------------------------


class Watch:
    """What lay at one address of this rank, each time that it was something else, and what stayed of it here."""

    def __init__(self, buffer: Buffer, owner: int) -> None:
        self.buffer, self.owner = buffer, owner
        self.seen: list[str] = []
        self.held_on: set[str] = set()

    def look(self) -> str:
        now = window_at(self.buffer, self.owner)
        if not self.seen or self.seen[-1] != now:
            if self.seen and is_held(self.seen[-1]):
                self.held_on.add(self.seen[-1])
            self.seen.append(now)
        return now

    def story(self) -> str:
        """After ``close()``, which leaves nobody's memory at the address: "A - B" is that of two ranks, and nobody's in
        between. "!" behind one: it was still held when another lay there."""
        nobodys = window_at(self.buffer, self.owner)
        names = {nobodys: "-", "": "nothing"}
        for memory in self.seen:
            names.setdefault(memory, chr(ord("A") + len(names) - 2) + "!" * (memory in self.held_on))
        return " ".join(names[memory] for memory in self.seen)


watches: list[Watch] = []  # of this process
told: list[str] = []  # by the test
former: list[str] = []  # what lay at an address of a life that is over


@dataclass(frozen=True)
class WatchedSteps(Steps):
    """Ranks watch, right after each step start, what lies where they store what they send to one of them.

    Attributes:
        watched: to whom.
        story: what those who construct the group must have seen in the end.
        held_up: rank 0 marks no step start until it hears from the test, and rank 1 tells of what it sees.
    """

    watched: int = 2
    story: str = ""
    held_up: bool = False

    def __call__(self, here: Here) -> None:
        os.environ["FAULT_A2A_TWIN_DRIVER"] = "1"  # this process was forked from one that may not have it
        watches.clear()
        told.clear()
        super().__call__(here)
        if not here.joins and not (self.held_up and here.rank == 0):
            assert watches[0].story() == self.story

    def marks_step(self, here: Here, number: int) -> bool:
        if not self.held_up or here.rank != 0:
            return True
        if not told and here.pipe.poll():
            told.append(here.hear())
        return bool(told)

    def gather(self, here: Here, checker: Checker, number: int) -> None:
        if not watches:
            watches.append(Watch(checker.buffer, self.watched))
        num_seen = len(watches[0].seen)
        watches[0].look()
        if self.held_up and here.rank == 1 and len(watches[0].seen) > max(num_seen, 1):
            here.say(f"change {len(watches[0].seen) - 1}")
        super().gather(here, checker, number)


def _config(num_ranks: int, **changes: object) -> Config:
    return process_rounds.small(num_ranks, backend="cuda", **changes)


def _let_go_of(ranks: Ranks, victim: int, num_steps: int = 4) -> dict[int, int]:
    """Kills a rank, and waits until the others have been at step starts without it."""
    ranks.kill(victim)
    ranks.wait_gone(victim)
    others = [rank for rank in range(ranks.num_founders) if rank != victim]
    ranks.wait_begun(max(ranks.board.begun) + num_steps * ROUNDS_PER_STEP, *others)
    return begun_of(ranks, [victim])


def replaced(num_ranks: int = 4, victim: int = 2) -> Wrong:
    """A rank is killed: its window is let go at a step start, and that of its replacement comes to the same address."""
    config, steps = _config(num_ranks), WatchedSteps(seed=1, watched=victim, story="A - B")
    with Ranks(num_ranks, config, steps) as ranks:
        ranks.wait_ready()
        ranks.wait_begun(8, *range(num_ranks))
        gone = _let_go_of(ranks, victim)
        ranks.replace(victim)
        ranks.hear_all([victim], "ready")
        ranks.end_after(8)
        reports = ranks.reports()
    return judge_lives(reports, steps, config, gone) + all_in(reports, range(num_ranks)) + came_at_step_starts(reports)


def evicted_alive(num_ranks: int = 3, victim: int = 2) -> Wrong:
    """The replacement is stopped until the others go on without it: that it lives does not keep its window here."""
    config = _config(num_ranks, silence_ms=400, link_ms=1000)
    steps = WatchedSteps(seed=1, watched=victim, story="A - B -")
    with Ranks(num_ranks, config, steps) as ranks:
        ranks.wait_ready()
        ranks.wait_begun(8, *range(num_ranks))
        _let_go_of(ranks, victim)
        ranks.replace(victim)
        ranks.hear_all([victim], "ready")
        ranks.wait_begun(max(ranks.board.begun) + ROUNDS_PER_STEP, *range(num_ranks))
        ranks.stop(victim)
        ranks.end_after(4 * ROUNDS_PER_STEP)
        others = [rank for rank in range(num_ranks) if rank != victim]
        ranks.wait_until(lambda: all(ranks.board.ended[rank] for rank in others), "the others to end")
        ranks.kill(victim)
        ranks.wait_gone(victim)
        reports = ranks.reports(gone=[victim])
    return disagreements(reports) + suspicions_of_live(reports, {victim}) + ended_whole(reports)


def dies_on_its_way_in(num_ranks: int = 3, victim: int = 2) -> Wrong:
    """A newcomer for whom room was made dies before it is in: its window is let go as well, and another one gets in."""
    config, steps = _config(num_ranks), WatchedSteps(seed=1, watched=victim, story="A - B - C", held_up=True)
    with Ranks(num_ranks, config, steps) as ranks:
        ranks.wait_ready()
        ranks.wait_begun(8, *range(num_ranks))
        gone = _let_go_of(ranks, victim)
        ranks.hear_all([1], "change 1")
        ranks.replace(victim)
        ranks.hear_all([1], "change 2")  # it has made room; rank 0 comes to no step start
        ranks.kill(victim)
        ranks.wait_gone(victim)
        ranks.hear_all([1], "change 3")
        ranks.tell("mark", [0])
        ranks.replace(victim)
        ranks.hear_all([victim], "ready")
        ranks.hear_all([1], "change 4")
        ranks.end_after(8)
        reports = ranks.reports()
    return judge_lives(reports, steps, config, gone) + all_in(reports, range(num_ranks))


@dataclass(frozen=True)
class ComesBackThere(ComesBack):
    """On the device: what one life of the process imported, the next one does not hold."""

    def __call__(self, here: Here) -> None:
        os.environ["FAULT_A2A_TWIN_DRIVER"] = "1"
        super().__call__(here)

    def until_the_end(self, here: Here, buffer: Buffer) -> Tally:
        imports = [window_at(buffer, rank) for rank in range(here.num_ranks) if rank != here.rank]
        tally = super().until_the_end(here, buffer)
        if isinstance(tally.error, RankEvictedError):
            former.append(imports[0])
        elif any(map(is_held, former)):
            tally.corrupt.append("a window that the former life imported is still held")
        return tally


def evicted_and_back() -> Wrong:
    """A rank is evicted while it stands still, and comes back as a new life of its process."""
    return join_scenarios.evicted_and_back(1, ComesBackThere, backend="cuda")


def grows(num_founders: int = 2, num_ranks: int = 3) -> Wrong:
    """Where a rank that was never there would be lies memory from the beginning."""
    config = _config(num_ranks, max_num_ranks=num_ranks)
    steps = WatchedSteps(seed=4, watched=num_founders, story="- A")
    with Ranks(num_ranks, config, steps, num_founders=num_founders) as ranks:
        ranks.wait_ready()
        ranks.wait_begun(8, *range(num_founders))
        ranks.hear_all([ranks.grow()], "ready")
        ranks.end_after(8)
        reports = ranks.reports()
    return judge_lives(reports, steps, config, {}) + all_in(reports, range(num_ranks))
