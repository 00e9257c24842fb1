"""Lives that end and begin in a group of processes: each scenario returns what went wrong in it."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fault_a2a.buffer import Buffer
from fault_a2a.config import Config
from fault_a2a.errors import RankEvictedError
from tests.process_rounds import FIRST_ROUND, Rounds, Wrong, begun_of, disagreements, losses, small, suspicions_of_live
from tests.processes import Here, Ranks, Report
from tests.rig import Checker

ROUNDS_PER_STEP = 3


@dataclass(frozen=True)
class Steps(Rounds):
    """As ``Rounds``, with a step start in front of every so many rounds."""

    def one_round(self, here: Here, checker: Checker, number: int) -> None:
        if (number - FIRST_ROUND) % ROUNDS_PER_STEP == 0:
            checker.buffer.begin_step()
        super().one_round(here, checker, number)


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


def replaced(num_ranks: int = 4, victim: int = 2, guards_off: Iterable[str] = (), **changes: object) -> Wrong:
    """One rank is killed; a new process takes its place while the others go on."""
    config, steps = small(num_ranks, **changes), Steps(seed=1)
    with Ranks(num_ranks, config, steps, guards_off) as ranks:
        ranks.wait_ready()
        ranks.wait_begun(20, *range(num_ranks))
        ranks.kill(victim)
        ranks.wait_gone(victim)
        gone = begun_of(ranks, [victim])
        ranks.replace(victim)
        ranks.hear_all([victim], "ready")
        ranks.end_after(20)
        reports = ranks.reports()
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


def _late_to_the_step(here: Here, buffer: Buffer, number: int) -> None:
    if here.rank == 0 and number % ROUNDS_PER_STEP == (FIRST_ROUND - 1) % ROUNDS_PER_STEP:
        time.sleep(0.05)


def one_late_rank(guards_off: Iterable[str] = ()) -> Wrong:
    """Rank 0 comes late to every step start: when it learns of the newcomer, the others are past. Nobody may be let in
    where they are."""
    num_ranks, victim = 4, 2
    config, steps = small(num_ranks), Steps(seed=1, between=_late_to_the_step)
    with Ranks(num_ranks, config, steps, guards_off) as ranks:
        ranks.wait_ready()
        ranks.wait_begun(8, *range(num_ranks))
        ranks.kill(victim)
        ranks.wait_gone(victim)
        gone = begun_of(ranks, [victim])
        ranks.replace(victim)
        ranks.hear_all([victim], "ready")
        ranks.end_after(8)
        reports = ranks.reports()
    return came_at_step_starts(reports) + judge_lives(reports, steps, config, gone)


@dataclass(frozen=True)
class UnevenSteps(Steps):
    """Rank 0 marks one step start in eight."""

    def one_round(self, here: Here, checker: Checker, number: int) -> None:
        if here.rank == 0 and (number - FIRST_ROUND) // ROUNDS_PER_STEP % 8:
            Rounds.one_round(self, here, checker, number)
        else:
            super().one_round(here, checker, number)


def one_rank_marks_few_steps(guards_off: Iterable[str] = ()) -> Wrong:
    """The others hold at step starts to which rank 0 does not come: they must see that, and go on."""
    num_ranks, victim = 4, 2
    config, steps = small(num_ranks, join_hold_ms=60_000), UnevenSteps(seed=1)
    try:
        with Ranks(num_ranks, config, steps, guards_off) as ranks:
            ranks.wait_ready()
            ranks.wait_begun(8, *range(num_ranks))
            ranks.kill(victim)
            ranks.wait_gone(victim)
            gone = begun_of(ranks, [victim])
            ranks.replace(victim)
            ranks.hear(victim, timeout_s=6.0)
            ranks.end_after(8)
            reports = ranks.reports()
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
