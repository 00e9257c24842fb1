"""Deaths, stops and pauses of real processes: each scenario returns what went wrong in it, which must be nothing."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fault_a2a.buffer import Buffer
from fault_a2a.errors import ConstructError, FaultA2AError, QuorumLostError, RankEvictedError
from fault_a2a.group import Group
from tests.process_rounds import FIRST_ROUND, Rounds, Wrong, begun_of, judge, no_view_change, small
from tests.processes import Here, Ranks
from tests.rig import Checker

# -- pauses that are no deaths -----------------------------------------------------------------------------------------


def gil_held(seconds: float = 2.5) -> Wrong:
    """Two ranks hold the GIL among their experts, far longer than the silence timeout: one in C, one in a loop."""
    config = small(6, silence_ms=500)
    task = Rounds(between=partial(_hold_gil, round_number=4, seconds=seconds))
    with Ranks(6, config, task) as ranks:
        ranks.wait_ready()
        ranks.board.last_round[0] = 7
        reports = ranks.reports()
    return judge(reports, task.work(config, 6), gone={}, last_round=7) + no_view_change(reports)


def _hold_gil(here: Here, _: Buffer, number: int, round_number: int, seconds: float) -> None:
    if number != round_number:
        return
    if here.rank == 1:
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))
    if here.rank == 4:
        sys.setswitchinterval(1e6)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pass
        sys.setswitchinterval(0.005)


def gil_held_by_the_proposer(agreement: str, seconds: float = 2.0) -> Wrong:
    """A rank dies while the one that would propose the next view holds the GIL: the view changes, and nobody waits."""
    config = small(4, agreement=agreement)
    task = Rounds(between=partial(_hold_gil_and_say, rank=0, round_number=4, seconds=seconds))
    with Ranks(4, config, task) as ranks:
        ranks.wait_ready()
        ranks.hear_all([0], "holding")
        time.sleep(0.1)
        killed_ns = time.monotonic_ns()
        ranks.kill(2)
        ranks.wait_gone(2)
        gone = begun_of(ranks, [2])
        ranks.board.last_round[0] = 8
        reports = ranks.reports(gone)
    wrong = judge(reports, task.work(config, 4), gone, last_round=8)
    for rank, report in reports.items():
        needed_s = (report.views[-1][1] - killed_ns) / 1e9
        if needed_s > seconds - 0.5:
            wrong.append(f"rank {rank} installed the next view {needed_s:.2f} s after the death")
    return wrong


def _hold_gil_and_say(here: Here, _: Buffer, number: int, rank: int, round_number: int, seconds: float) -> None:
    if (here.rank, number) == (rank, round_number):
        here.say("holding")
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def slow_experts(seconds: float = 1.5) -> Wrong:
    """One rank computes for several link timeouts; what the others sent one another has long come."""
    config = small(6, link_ms=300, silence_ms=300)
    task = Rounds(between=partial(_compute_on, rank=1, round_number=4, seconds=seconds))
    with Ranks(6, config, task) as ranks:
        ranks.wait_ready()
        ranks.board.last_round[0] = 7
        reports = ranks.reports()
    return judge(reports, task.work(config, 6), gone={}, last_round=7) + no_view_change(reports)


def _compute_on(here: Here, _: Buffer, number: int, rank: int, round_number: int, seconds: float) -> None:
    if (here.rank, number) == (rank, round_number):
        time.sleep(seconds)


def late_first_round(apart_s: float) -> Wrong:
    """Half of the ranks enter their first round so much later than the others, who wait for them in it."""
    config = small(4, silence_ms=500)
    task = Rounds(at_first=partial(_sleep_in_turn, apart_s=apart_s))
    with Ranks(4, config, task) as ranks:
        ranks.wait_ready()
        ranks.board.last_round[0] = 4
        reports = ranks.reports()
    return judge(reports, task.work(config, 4), gone={}, last_round=4) + no_view_change(reports)


def _sleep_in_turn(here: Here, _: Buffer, apart_s: float) -> None:
    time.sleep(apart_s * (here.rank // 2))


def idle_group(idle_s: float = 1.5) -> Wrong:
    """Nobody is in a round, and one rank is stopped for most of that time: nobody waits, so nobody is late."""
    config = small(4, silence_ms=300)
    task = Rounds(before=partial(_wait_for_word, round_number=3))
    with Ranks(4, config, task) as ranks:
        ranks.wait_ready()
        ranks.hear_all(range(4), "idle")
        ranks.stop(2)
        time.sleep(idle_s)
        ranks.wake(2)
        time.sleep(0.1)  # for its beat to move again before anybody waits for it
        ranks.board.last_round[0] = 6
        ranks.tell("go on", range(4))
        reports = ranks.reports()
    return judge(reports, task.work(config, 4), gone={}, last_round=6) + no_view_change(reports)


def _wait_for_word(here: Here, _: Buffer, number: int, round_number: int) -> None:
    if number == round_number:
        here.say("idle")
        here.hear()


# -- a process that is stopped and woken -------------------------------------------------------------------------------


def stopped_and_woken(phase: str, stopped_s: float = 2.0, num_ranks: int = 5) -> Wrong:
    """A rank stopped in the middle of a round is evicted; woken, it goes on storing where nobody looks any more.

    The experts of that round compute for longer than it takes to evict it: whoever had its rows and never waited for it
    learns from the view alone that no answer will come.
    """
    config = small(num_ranks, silence_ms=300)
    task = Rounds(between=partial(_compute, long_round=5, seconds=0.8), armed=((2, phase, 5, "stop"),))
    others = [rank for rank in range(num_ranks) if rank != 2]
    with Ranks(num_ranks, config, task) as ranks:
        ranks.wait_ready()
        ranks.wait_stopped(2)
        gone = begun_of(ranks, [2])
        time.sleep(stopped_s)
        reached = min(ranks.board.begun[rank] for rank in others)
        ranks.wake(2)
        last = ranks.end_after(20)
        reports = ranks.reports(gone)
    wrong = judge(reports, task.work(config, num_ranks), gone, last, kinds=("silence",))
    if reached <= gone[2] + 1:
        wrong.append(
            f"{stopped_s} s after rank 2 was stopped in round {gone[2]}, somebody was still in round {reached}"
        )
    if not isinstance(reports[2].tally.error, RankEvictedError):
        wrong.append(f"rank 2, woken, ended with {reports[2].tally.error!r}")
    if not any(one.rank == 2 for rank in others for one in reports[rank].evidence):
        wrong.append("nobody suspected rank 2")
    return wrong


def _compute(_: Here, __: Buffer, number: int, long_round: int, seconds: float) -> None:
    time.sleep(seconds if number == long_round else 0.005)


# -- SIGKILL -----------------------------------------------------------------------------------------------------------


def killed_at_random(num_deaths: int, seed: int) -> Wrong:
    """SIGKILL at random instants, one rank after another, in groups of 4 to 8 that have lost few or none before."""
    dice = random.Random(f"kill/{seed}")
    wrong: Wrong = []
    while num_deaths > 0:
        num_ranks = dice.randint(5, 8)
        order = dice.sample(range(num_ranks), min(num_deaths, num_ranks - 3))
        wrong += killed(num_ranks, [[rank] for rank in order], seed=dice.getrandbits(32))
        num_deaths -= len(order)
    return wrong


def killed(num_ranks: int, strikes: list[list[int]], seed: int, agreement: str = "windows") -> Wrong:
    """Each strike kills its ranks at one instant, somewhere in a round; the rest go on."""
    dice = random.Random(seed)
    config = small(num_ranks, agreement=agreement)
    task = Rounds(seed=seed % 1000)
    gone: dict[int, int] = {}
    with Ranks(num_ranks, config, task) as ranks:
        ranks.wait_ready()
        for victims in strikes:
            ranks.wait_begun(max(ranks.board.begun) + dice.randint(0, 3), victims[0])
            time.sleep(dice.uniform(0, 0.05))  # about a round
            ranks.kill(*victims)
            for rank in victims:
                ranks.wait_gone(rank)
            gone |= begun_of(ranks, victims)
        last = ranks.end_after(12)
        reports = ranks.reports(gone)
    case = f"killed({num_ranks}, {strikes}, seed={seed}): "
    return [case + text for text in judge(reports, task.work(config, num_ranks), gone, last)]


# -- no cascade --------------------------------------------------------------------------------------------------------

SILENCE_MS, COMPUTE_MS, STALL_MS = 100, 350, 2000
HALFWAY = "dispatch.half_signalled"


def no_cascade(num_deaths: int, seed: int, action: str = "kill", guards_off: Iterable[str] = ()) -> Wrong:
    """Victims whose rows reached half of the group, among ranks that compute for up to several silence timeouts."""
    dice = random.Random(f"cascade/{seed}/{action}")
    wrong: Wrong = []
    while num_deaths > 0:
        victims = dice.sample(range(8), min(num_deaths, 3))
        wrong += _cascade(victims, dice.getrandbits(16), action, tuple(guards_off))
        num_deaths -= len(victims)
    return wrong


def _cascade(victims: list[int], seed: int, action: str, guards_off: tuple[str, ...]) -> Wrong:
    config = small(8, silence_ms=SILENCE_MS, stall_ms=STALL_MS)
    rounds = [FIRST_ROUND + 2 + 3 * i for i in range(len(victims))]
    armed = tuple((rank, HALFWAY, number, action) for rank, number in zip(victims, rounds, strict=True))
    around = tuple(number + more for number in rounds for more in (0, 1))
    task = Rounds(seed=seed, compute_ms=COMPUTE_MS, compute_rounds=around, armed=armed)
    gone = dict(zip(victims, rounds, strict=True))
    with Ranks(8, config, task, guards_off) as ranks:
        ranks.wait_ready()
        ranks.board.last_round[0] = last = rounds[-1] + 3
        if action == "kill":
            ranks.killed.update(victims)
        else:
            _wake_the_evicted(ranks, victims, rounds)
        reports = ranks.reports(gone)
    case = f"_cascade({victims}, {seed}, {action!r}): "
    kinds = ("exit",) if action == "kill" else ("silence",)
    return [case + text for text in judge(reports, task.work(config, 8), gone, last, kinds)]


def _wake_the_evicted(ranks: Ranks, victims: list[int], rounds: list[int]) -> None:
    others = [rank for rank in range(ranks.num_ranks) if rank not in victims]
    for rank, number in zip(victims, rounds, strict=True):
        ranks.wait_stopped(rank)
        ranks.wait_begun(number + 2, *others)  # they hold at the gate until they have a view without it
        ranks.wake(rank)


def waiting_chain(guards_off: Iterable[str] = ()) -> Wrong:
    """Half of the group waits for a stopped rank, the others wait for that half: longer than the stall timeout."""
    config = small(6, silence_ms=1500, stall_ms=300)
    task = Rounds(armed=((3, HALFWAY, 4, "stop"),), at_first=partial(_bear_with, rank=3, stall_ms=30000))
    gone = {3: 4}
    with Ranks(6, config, task, guards_off) as ranks:
        ranks.wait_ready()
        ranks.board.last_round[0] = 8
        ranks.wait_stopped(3)
        ranks.wait_begun(8, 0, 1, 2, 4, 5)
        ranks.wake(3)
        reports = ranks.reports(gone)
    return judge(reports, task.work(config, 6), gone, 8, kinds=("silence",))


def _bear_with(_: Here, buffer: Buffer, rank: int, stall_ms: int) -> None:
    buffer.set_timeouts(rank, stall_ms=stall_ms)


# -- the store, the end and the beginning ------------------------------------------------------------------------------


@dataclass
class Ending:
    """How a rank's last calls went."""

    error: BaseException | None
    at_s: float  # of the error, by the clock of all processes
    close_s: float
    finished: list[int] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)


def store_gone(num_ranks: int = 5) -> Wrong:
    """Where the store decides and is gone, survivors finish the open round, then stop with an error, and close."""
    config = small(num_ranks, agreement_timeout_ms=1500, agreement="store")
    with Ranks(num_ranks, config, _until_quorum_is_lost) as ranks:
        ranks.wait_ready()
        ranks.wait_begun(4, 0)
        ranks.kill_store()
        ranks.wait_begun(max(ranks.board.begun) + 3, 0)  # a running view needs no store
        killed_s = time.monotonic()
        ranks.kill(1)
        ranks.wait_gone(1)
        last = ranks.board.begun[1]
        endings: dict[int, Ending] = {rank: ranks.result(rank) for rank in range(num_ranks) if rank != 1}
    wrong = [f"rank {rank}: {text}" for rank, ending in endings.items() for text in ending.corrupt]
    for rank, ending in endings.items():
        if not isinstance(ending.error, QuorumLostError):
            wrong.append(f"rank {rank} ended with {ending.error!r}")
        if not 1.4 < ending.at_s - killed_s < 4.0:
            wrong.append(f"rank {rank} gave up after {ending.at_s - killed_s:.2f} s; agreement_timeout_ms is 1500")
        if ending.close_s > 1.5:
            wrong.append(f"rank {rank} needed {ending.close_s:.2f} s to close")
        if ending.finished[-1] not in (last - 1, last, last + 1):
            wrong.append(f"rank {rank} finished round {ending.finished[-1]}, rank 1 died in {last}")
    return wrong


def _until_quorum_is_lost(here: Here) -> Ending:
    buffer = here.open()
    task = Rounds()
    checker = Checker(buffer, task.work(here.config, here.num_ranks))
    error = None
    try:
        while True:
            task.one_round(here, checker, buffer.num_rounds)
    except FaultA2AError as raised:
        error = raised
    ended = time.monotonic()
    buffer.close()
    closed = time.monotonic()
    finished = sorted(checker.tally.outcomes)
    return Ending(error, ended, closed - ended, finished, checker.tally.corrupt)


def one_leaves(num_ranks: int = 5) -> Wrong:
    """A planned leave between two rounds costs nothing that the one who left had finished."""
    config = small(num_ranks)
    task = Rounds(before=_leave_in_round_6)
    with Ranks(num_ranks, config, task) as ranks:
        ranks.wait_ready()
        ranks.killed.add(3)  # it sends no report
        ranks.board.last_round[0] = 14
        reports = ranks.reports(gone=[3])
    return judge(reports, task.work(config, num_ranks), {3: 6}, 14, kinds=("left",))


def _leave_in_round_6(here: Here, buffer: Buffer, number: int) -> None:
    if here.rank == 3 and number == 6:
        buffer.close()
        os._exit(0)


def dies_in_construction(point: str) -> Wrong:
    """A rank dies on its way to a meeting point of construction; the others name it, and leave no name behind."""
    config = small(4, construct_timeout_ms=1500)
    with Ranks(4, config, partial(_die_at, victim=2, point=point)) as ranks:
        ranks.killed.add(2)
        heard = {rank: ranks.result(rank) for rank in (0, 1, 3)}
        left = ranks.names()
    wrong = [f"names left in /dev/shm: {left}"] if left else []
    for rank, (error, seconds) in heard.items():
        if not isinstance(error, ConstructError) or "ranks [2]" not in str(error):
            wrong.append(f"rank {rank} ended with {error!r}")
        if seconds > 3.5:
            wrong.append(f"rank {rank} needed {seconds:.2f} s; construct_timeout_ms is 1500")
    return wrong


@dataclass(frozen=True)
class _MortalGroup(Group):
    """Dies in front of a meeting."""

    last_point: str = ""

    def meet(self, point: str, *rest: Any, **more: Any) -> list[str]:
        self._die_at(point)
        met = super().meet(point, *rest, **more)
        self._die_at("after " + point)
        return met

    def _die_at(self, point: str) -> None:
        if point == self.last_point:
            os.kill(os.getpid(), signal.SIGKILL)


def _die_at(here: Here, victim: int, point: str) -> tuple[BaseException | None, float]:
    last_point = point if here.rank == victim else ""
    group = _MortalGroup(here.store, here.rank, here.num_ranks, last_point=last_point)
    began = time.monotonic()
    try:
        Buffer(group, here.config)
    except Exception as error:
        return error, time.monotonic() - began
    return None, time.monotonic() - began


# -- timeouts that change ----------------------------------------------------------------------------------------------


def timeouts_changed() -> Wrong:
    """A stopped rank is borne with for as long as the table says, and the table is changed while the others wait."""
    config = small(4, silence_ms=300)
    task = Rounds(at_first=_take_orders, armed=((2, HALFWAY, 4, "stop"),))
    gone = {2: 4}
    with Ranks(4, config, task) as ranks:
        ranks.wait_ready()
        ranks.wait_stopped(2)
        time.sleep(1.0)
        patient = max(ranks.board.begun)
        ranks.tell(200, (0, 1, 3))
        told_s = time.monotonic()
        ranks.wait_begun(6, 0, 1, 3)
        needed_s = time.monotonic() - told_s
        ranks.wake(2)
        last = ranks.end_after(5)
        reports = ranks.reports(gone)
    wrong = judge(reports, task.work(config, 4), gone, last, kinds=("silence",))
    if patient > 5:
        wrong.append(f"round {patient} began while silence_ms for rank 2 was a minute")
    if needed_s > 5.0:
        wrong.append(f"rank 2 was evicted {needed_s:.1f} s after silence_ms had become 200")
    return wrong


def _take_orders(here: Here, buffer: Buffer) -> None:
    buffer.set_timeouts(2, silence_ms=60000)

    def obey() -> None:
        buffer.set_timeouts(2, silence_ms=here.hear())

    if here.rank != 2:
        threading.Thread(target=obey, daemon=True).start()
