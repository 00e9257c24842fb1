"""Lives that end and begin in a group of processes: each scenario returns what went wrong in it."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from fault_a2a.buffer import Buffer
from fault_a2a.config import Config
from fault_a2a.errors import FaultA2AError, RankEvictedError
from fault_a2a.joins import WayIn
from tests.process_rounds import FIRST_ROUND, Rounds, Wrong, begun_of, disagreements, losses, small, suspicions_of_live
from tests.processes import Here, Ranks, Report
from tests.rig import Checker, Tally

ROUNDS_PER_STEP = 3


@dataclass(frozen=True)
class Steps(Rounds):
    """As ``Rounds``, with a step start in front of every so many rounds, and a small collective behind it."""

    def one_round(self, here: Here, checker: Checker, number: int) -> None:
        if (number - FIRST_ROUND) % ROUNDS_PER_STEP == 0:
            if self.marks_step(here, number):
                checker.buffer.begin_step()
            self.gather(here, checker, number)
        super().one_round(here, checker, number)

    def marks_step(self, here: Here, number: int) -> bool:
        return True

    def gather(self, here: Here, checker: Checker, number: int) -> None:
        """Newcomers must count collectives as the members do."""
        words, who = checker.buffer.all_gather(torch.tensor([here.rank, number]))
        wanted = [[rank, number] if is_in else [0, 0] for rank, is_in in enumerate(who.contributed.tolist())]
        if words.tolist() != wanted or not who.contributed[here.rank]:
            checker.tally.corrupt.append(f"round {number}: gathered {words.tolist()} from {who}")


def judge_lives(reports: Mapping[int, Report], steps: Steps, config: Config, gone: Mapping[int, int]) -> Wrong:
    """What must hold whoever came and went. ``gone``: of each life that ended, the last round that it had begun."""
    work = steps.work(config, config.num_experts // 2)  # of small(): two experts a rank and one more
    wrong = disagreements(reports) + suspicions_of_live(reports, set(gone)) + ended_whole(reports)
    return wrong + [text for report in reports.values() for text in losses(report, work, gone)]


def ended_whole(reports: Mapping[int, Report]) -> Wrong:
    wrong = [f"rank {rank}: {text}" for rank, report in reports.items() for text in report.tally.corrupt]
    errors = {rank: report.tally.error for rank, report in reports.items() if report.tally.error is not None}
    return wrong + [f"rank {rank} ended with {error!r}" for rank, error in errors.items()]


def all_in(reports: Mapping[int, Report], ranks: Iterable[int]) -> Wrong:
    wanted = tuple(ranks)
    views = {rank: report.views[-1][0] for rank, report in reports.items()}
    return [f"rank {rank} ends with {view.active_ranks}" for rank, view in views.items() if view.active_ranks != wanted]


def came_at_step_starts(reports: Mapping[int, Report]) -> Wrong:
    """A view that lets somebody in begins with the first round of a step, on every rank."""
    wrong = []
    for rank, report in reports.items():
        views = [view for view, _ in report.views]
        for before, view in zip(views, views[1:], strict=False):
            newcomers = set(view.active_ranks) - set(before.active_ranks)
            if newcomers and (view.first_round - FIRST_ROUND) % ROUNDS_PER_STEP:
                wrong.append(f"rank {rank}: {newcomers} came in at round {view.first_round}, in the midst of a step")
    return wrong


def replace_one(
    num_ranks: int,
    victim: int,
    config: Config,
    steps: Steps,
    guards_off: Iterable[str],
    *,
    from_round: int = 8,
    num_more: int = 8,
    ready_s: float = 60.0,
) -> tuple[dict[int, Report], dict[int, int]]:
    """Kills one rank and starts a new process in its place while the others go on: (reports, what it had begun)."""
    with Ranks(num_ranks, config, steps, guards_off) as ranks:
        ranks.wait_ready()
        ranks.wait_begun(from_round, *range(num_ranks))
        ranks.kill(victim)
        ranks.wait_gone(victim)
        gone = begun_of(ranks, [victim])
        ranks.replace(victim)
        heard = ranks.hear(victim, timeout_s=ready_s)
        assert heard == "ready", f"the new rank {victim} said {heard!r}"
        ranks.end_after(num_more)
        return ranks.reports(), gone


def replaced(num_ranks: int = 4, victim: int = 2, guards_off: Iterable[str] = (), **changes: object) -> Wrong:
    """One rank is killed; a new process takes its place while the others go on."""
    config, steps = small(num_ranks, **changes), Steps(seed=1)
    reports, gone = replace_one(num_ranks, victim, config, steps, guards_off, from_round=20, num_more=20)
    return judge_lives(reports, steps, config, gone) + all_in(reports, range(num_ranks)) + came_at_step_starts(reports)


# -- what a guard prevents ---------------------------------------------------------------------------------------------

SLOW_FROM = 20  # from this round on a victim's rows take their time: a signal from outside meets one half stored


def _slow_rows(here: Here, buffer: Buffer, number: int) -> None:
    if here.rank == 3 and not here.joins and number == SLOW_FROM:
        buffer.core.set_faults({"slow_row_ns": 40_000_000})


def zombie(seed: int = 0, num_spare_partitions: int = 0, guards_off: Iterable[str] = ()) -> Wrong:
    """Rank 3 is stopped in the middle of a row, evicted and replaced; it wakes and stores on while the new one sends.

    Without spare partitions the new life gets the number of the old one, so only the memory is another.
    """
    num_ranks = 4
    config = small(num_ranks, silence_ms=400, link_ms=1000, num_spare_partitions=num_spare_partitions)
    steps = Steps(seed=seed, before=_slow_rows)
    with Ranks(num_ranks, config, steps, guards_off) as ranks:
        ranks.wait_ready()
        ranks.wait_begun(SLOW_FROM, 3)
        time.sleep(0.005 + random.Random(seed).random() * 0.06)
        ranks.stop(3)
        gone = begun_of(ranks, [3])
        ranks.wait_begun(gone[3] + 2, 0, 1, 2)  # they have given it up
        former = ranks.replace(3)
        ranks.hear_all([3], "ready")
        ranks.wait_begun(max(ranks.board.begun) + 2, 3)
        former.wake()  # it stores to the end of its batch, and learns that it is out
        error = former.report().tally.error
        wrong = [] if isinstance(error, RankEvictedError) else [f"the old rank 3 ended with {error!r}"]
        last = ranks.end_after(6)
        ranks.board.ended[3] = 0
        reports = ranks.reports()
    wrong += [f"rank {rank} ended before round {last}" for rank in reports if ranks.board.begun[rank] < last]
    return wrong + judge_lives(reports, steps, config, gone) + all_in(reports, range(num_ranks))


@dataclass(frozen=True)
class LooksAndWaits(Steps):
    """Rank 3's newcomer looks at the members as they are, and does nothing more until the test says so."""

    def __call__(self, here: Here) -> None:
        if here.joins and here.rank == 3:
            self._hold_up(here)
        super().__call__(here)

    def _hold_up(self, here: Here) -> None:
        open_all = WayIn._open_all

        def look(way: WayIn) -> None:
            WayIn._open_all = open_all
            open_all(way)
            way.endpoint.go_on_joining()
            here.say("has looked")
            here.hear()

        WayIn._open_all = look


def replaced_while_another_joins(guards_off: Iterable[str] = ()) -> Wrong:
    """Rank 2 is stopped and out when rank 3's newcomer looks at it, and replaced before that one is in. Nobody may take
    the end of the stopped process for the end of the new rank 2."""
    num_ranks = 4
    config, steps = small(num_ranks, silence_ms=400, link_ms=1000), LooksAndWaits(seed=1)
    with Ranks(num_ranks, config, steps, guards_off) as ranks:
        ranks.wait_ready()
        ranks.wait_begun(8, *range(num_ranks))
        ranks.kill(3)
        ranks.wait_gone(3)
        ranks.stop(2)
        gone = begun_of(ranks, [2, 3])
        ranks.wait_begun(gone[2] + 2, 0, 1)  # they have given it up
        ranks.replace(3)
        ranks.hear_all([3], "has looked")
        former = ranks.replace(2)
        ranks.hear_all([2], "ready")
        ranks.tell("go on", [3])
        ranks.hear_all([3], "ready")
        former.process.kill()
        former.process.join()
        ranks.wait_begun(max(ranks.board.begun) + 6, *range(num_ranks))
        ranks.end_after(6)
        reports = ranks.reports()
    return judge_lives(reports, steps, config, gone) + all_in(reports, range(num_ranks))


def _late_to_the_step(here: Here, buffer: Buffer, number: int) -> None:
    if here.rank == 0 and number % ROUNDS_PER_STEP == (FIRST_ROUND - 1) % ROUNDS_PER_STEP:
        time.sleep(0.05)


def one_late_rank(guards_off: Iterable[str] = ()) -> Wrong:
    """Rank 0 comes late to every step start: when it learns of the newcomer, the others are past. Nobody may be let in
    where they are."""
    num_ranks, victim = 4, 2
    config, steps = small(num_ranks), Steps(seed=1, between=_late_to_the_step)
    reports, gone = replace_one(num_ranks, victim, config, steps, guards_off)
    return came_at_step_starts(reports) + judge_lives(reports, steps, config, gone)


@dataclass(frozen=True)
class UnevenSteps(Steps):
    """Rank 0 marks one step start in eight."""

    def marks_step(self, here: Here, number: int) -> bool:
        return here.rank != 0 or (number - FIRST_ROUND) // ROUNDS_PER_STEP % 8 == 0


def one_rank_marks_few_steps(guards_off: Iterable[str] = ()) -> Wrong:
    """The others hold at step starts to which rank 0 does not come: they must see that, and go on."""
    num_ranks, victim = 4, 2
    config, steps = small(num_ranks, join_hold_ms=60_000), UnevenSteps(seed=1)
    try:
        reports, gone = replace_one(num_ranks, victim, config, steps, guards_off, ready_s=6.0)
    except TimeoutError:
        return ["a rank holds for ever"]
    return judge_lives(reports, steps, config, gone) + all_in(reports, range(num_ranks))


def silent_newcomer(guards_off: Iterable[str] = ()) -> Wrong:
    """A newcomer is stopped on its way in, and killed. Nobody waits for it longer than it may."""
    num_ranks, victim = 3, 2
    config, steps = small(num_ranks), Steps(seed=1, compute_ms=2)
    with Ranks(num_ranks, config, steps, guards_off) as ranks:
        ranks.wait_ready()
        ranks.wait_begun(8, *range(num_ranks))
        for delay_ms in (0, 2, 5, 10, 20, 40):
            ranks.kill(victim)
            ranks.wait_gone(victim)
            ranks.replace(victim)
            time.sleep(0.08 + delay_ms / 1000)
            ranks.stop(victim)
            first = ranks.board.begun[1]
            ranks.wait_until(lambda first=first: ranks.board.begun[1] > first + 6, "rank 1 to go on", timeout_s=10.0)
        ranks.kill(victim)
        ranks.wait_gone(victim)
        ranks.end_after(8)
        reports = ranks.reports(gone=[victim])
    return disagreements(reports) + suspicions_of_live(reports, {victim}) + ended_whole(reports)


# -- deaths on the way -------------------------------------------------------------------------------------------------


def dies_while_one_joins(victim: int, joins_as: int = 3, seed: int = 0, num_tries: int = 6) -> Wrong:
    """While a newcomer is on its way in, ``victim`` dies: a member, the proposer (the lowest rank), or the newcomer."""
    num_ranks = 5
    config, steps = small(num_ranks), Steps(seed=seed, compute_ms=1)
    dice = random.Random(seed)
    with Ranks(num_ranks, config, steps) as ranks:
        ranks.wait_ready()
        ranks.wait_begun(8, *range(num_ranks))
        for _ in range(num_tries):
            ranks.kill(joins_as)
            ranks.wait_gone(joins_as)
            ranks.replace(joins_as)
            time.sleep(dice.uniform(0.03, 0.2))
            ranks.kill(victim)
            ranks.wait_gone(victim)
            if victim != joins_as:
                ranks.hear_all([joins_as], "ready")
                ranks.replace(victim)
                ranks.hear_all([victim], "ready")
        if victim == joins_as:
            ranks.replace(victim)
            ranks.hear_all([victim], "ready")
        ranks.end_after(8)
        reports = ranks.reports()
    wrong = disagreements(reports) + suspicions_of_live(reports, {victim, joins_as}) + ended_whole(reports)
    return wrong + all_in(reports, range(num_ranks)) + came_at_step_starts(reports)


# -- the same process, again -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ComesBack(Steps):
    """A rank that is evicted comes back as a new life, as often as it takes."""

    def __call__(self, here: Here) -> None:
        buffer = here.open()
        told: list[str] = []
        buffer.on_view_change(lambda view: told.append(view.reason))
        tally = self.until_the_end(here, buffer)
        num_lives = 1
        while isinstance(tally.error, RankEvictedError):
            num_lives += 1
            received_at = buffer.recv_shape
            view = buffer.rejoin()
            assert view.active_mask[here.rank] and buffer.recv_shape == received_at
            here.say("back")
            tally = self.until_the_end(here, buffer)
        here.end_together(buffer, tally)
        if here.rank == 1:
            # Of this rank; the others' leaving, at the end, it may hear of too.
            of_me = ["joined" in reason for reason in told if "rank 1 " in reason]
            assert of_me == [False, True] * (num_lives - 1), told

    def until_the_end(self, here: Here, buffer: Buffer) -> Tally:
        checker = Checker(buffer, self.work(here.config, here.num_ranks))
        try:
            while (number := buffer.num_rounds) <= here.board.last_round[0]:
                self.one_round(here, checker, number)
        except FaultA2AError as error:
            checker.tally.error = error
        return checker.tally


def evicted_and_back(num_times: int = 2, task: type[ComesBack] = ComesBack, **changes: object) -> Wrong:
    """Rank 1 is stopped until it is evicted, woken, and comes back in the same process."""
    num_ranks = 4
    config, steps = small(num_ranks, silence_ms=300, **changes), task(seed=2)
    with Ranks(num_ranks, config, steps) as ranks:
        ranks.wait_ready()
        gone: dict[int, int] = {}
        for _ in range(num_times):
            ranks.wait_begun(max(ranks.board.begun) + 4, *range(num_ranks))
            ranks.stop(1)
            gone = begun_of(ranks, [1])
            ranks.wait_begun(gone[1] + 3, 0, 2, 3)
            ranks.wake(1)
            ranks.hear_all([1], "back")
        ranks.end_after(8)
        reports = ranks.reports()
    wrong = disagreements(reports) + suspicions_of_live(reports, {1}) + ended_whole(reports)
    return wrong + all_in(reports, range(num_ranks)) + came_at_step_starts(reports)


# -- a planned leave ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leaves(Steps):
    """Rank 1 leaves at the first step start from a certain round on at which it can."""

    leaver: int = 1
    from_round: int = 20

    def __call__(self, here: Here) -> None:
        buffer = here.open()
        checker = Checker(buffer, self.work(here.config, here.num_ranks))
        try:
            while (number := buffer.num_rounds) <= here.board.last_round[0]:
                is_step_start = (number - FIRST_ROUND) % ROUNDS_PER_STEP == 0
                if here.rank == self.leaver and number >= self.from_round and is_step_start:
                    if buffer.leave():
                        break
                    self.gather(here, checker, number)
                    Rounds.one_round(self, here, checker, number)
                else:
                    self.one_round(here, checker, number)
        except FaultA2AError as error:
            checker.tally.error = error
        here.end_together(buffer, checker.tally)


def one_leaves_at_a_step_start(leaver: int = 1) -> Wrong:
    """Nobody loses a choice, and nobody suspects anybody."""
    num_ranks = 4
    config, steps = small(num_ranks), Leaves(seed=3, leaver=leaver)
    with Ranks(num_ranks, config, steps) as ranks:
        ranks.wait_ready()
        others = [rank for rank in range(num_ranks) if rank != leaver]
        ranks.wait_until(lambda: bool(ranks.board.ended[leaver]), "the leaver to be out")
        ranks.end_after(8)
        reports = ranks.reports()
    wrong = judge_lives(reports, steps, config, {}) + all_in({rank: reports[rank] for rank in others}, others)
    lost = {rank: report.tally.lost for rank, report in reports.items() if report.tally.lost}
    return wrong + [f"choices lost over a planned leave: {lost}"] * bool(lost)


# -- growth ------------------------------------------------------------------------------------------------------------


def grows(num_founders: int = 2, num_ranks: int = 4, kills_one: bool = False) -> Wrong:
    """A group grows to what it has room for, one rank after the other, or with one of the members dying meanwhile."""
    config, steps = small(num_ranks, max_num_ranks=num_ranks), Steps(seed=4)
    with Ranks(num_ranks, config, steps, num_founders=num_founders) as ranks:
        ranks.wait_ready()
        ranks.wait_begun(12, *range(num_founders))
        newcomers = [ranks.grow() for _ in range(num_founders, num_ranks)]  # all at once; they come in one by one
        gone: dict[int, int] = {}
        if kills_one:
            ranks.kill(1)
            ranks.wait_gone(1)
            gone = begun_of(ranks, [1])
        ranks.hear_all(newcomers, "ready")
        if kills_one:
            ranks.replace(1)
            ranks.hear_all([1], "ready")
        ranks.end_after(12)
        reports = ranks.reports()
    wrong = disagreements(reports) + suspicions_of_live(reports, set(gone)) + ended_whole(reports)
    wrong += all_in(reports, range(num_ranks)) + came_at_step_starts(reports)
    # The choices on ranks that were not there yet are unroutable, all others are delivered.
    work = steps.work(config, num_ranks)
    return wrong + [text for report in reports.values() for text in losses(report, work, gone)]
