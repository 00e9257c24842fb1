"""View changes of real processes without a store, a leader or a majority of the living: what must hold of each."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

from fault_a2a.buffer import Buffer
from fault_a2a.errors import FaultA2AError, QuorumLostError, RankEvictedError
from tests.process_rounds import Rounds, Wrong, begun_of, disagreements, judge, small
from tests.processes import Here, Ranks, Report
from tests.rig import Checker

HALFWAY = "dispatch.half_signalled"


def store_lost_then_deaths(num_ranks: int = 6) -> Wrong:
    """The store is killed in mid-run; two ranks die after it, one after the other: views change all the same."""
    config = small(num_ranks)
    task = Rounds()
    gone: dict[int, int] = {}
    with Ranks(num_ranks, config, task) as ranks:
        ranks.wait_ready()
        ranks.wait_begun(4, 0)
        ranks.kill_store()
        for victim in (1, 0):
            ranks.wait_begun(max(ranks.board.begun) + 3, 2)
            ranks.kill(victim)
            ranks.wait_gone(victim)
            gone |= begun_of(ranks, [victim])
        last = ranks.end_after(12)
        reports = ranks.reports(gone)
    wrong = judge(reports, task.work(config, num_ranks), gone, last)
    for rank, report in reports.items():
        if report.views[-1][0].epoch < 1:
            wrong.append(f"rank {rank} never changed its view")
    return wrong


def proposer_dies_with(num_ranks: int = 5, dead_ms: float = 0.0, seed: int = 0) -> Wrong:
    """Rank 3 dies, and rank 0, the first to propose a view without it, dies so much later: in mid-agreement."""
    config = small(num_ranks)
    task = Rounds(seed=seed)
    with Ranks(num_ranks, config, task) as ranks:
        ranks.wait_ready()
        ranks.wait_begun(5, 0)
        ranks.kill(3)
        time.sleep(dead_ms / 1000)
        ranks.kill(0)
        for rank in (0, 3):
            ranks.wait_gone(rank)
        gone = begun_of(ranks, [0, 3])
        last = ranks.end_after(12)
        reports = ranks.reports(gone)
    return [
        f"proposer_dies_with({dead_ms}): {text}" for text in judge(reports, task.work(config, num_ranks), gone, last)
    ]


# -- ranks that are suspended and come back ----------------------------------------------------------------------------


@dataclass
class Course:
    """How a rank's calls went: rounds, suspensions, and what ended it."""

    report: Report
    num_suspended: int = 0  # calls that ended in QuorumLostError
    longest_s: float = 0.0  # call
    finished_s: list[float] = field(default_factory=list)  # when each round was done, by the clock of all processes


def persevere(here: Here, cut: tuple[int, int] | None = None, cut_at: int = 5) -> Course:
    """Rounds until the board says stop or the rank is evicted; a call that ends in QuorumLostError is made again."""
    buffer = here.open()
    task = Rounds()
    checker = Checker(buffer, task.work(here.config, here.num_ranks))
    course = Course(Report(here.rank, checker.tally, [], []))
    try:
        while (number := buffer.num_rounds) <= here.board.last_round[0]:
            if cut is not None and here.rank in cut and number == cut_at:
                buffer.cut(cut[1 - cut.index(here.rank)])
            began = time.monotonic()
            try:
                task.one_round(here, checker, number)
                course.finished_s.append(time.monotonic())
            except QuorumLostError:
                course.num_suspended += 1
                if _was_told_to_stop(here, buffer):
                    break
            course.longest_s = max(course.longest_s, time.monotonic() - began)
    except FaultA2AError as error:
        checker.tally.error = error
    here.board.ended[here.rank] = 1
    course.report.views, course.report.evidence = buffer.views(), buffer.evidence()
    here.say("done")
    here.hear()
    buffer.close()
    return course


def _was_told_to_stop(here: Here, _: Buffer) -> bool:
    """A rank that stays suspended ends when the others have."""
    return all(here.board.ended[rank] for rank in range(here.num_ranks) if rank != here.rank)


def _close(ranks: Ranks) -> dict[int, Course]:
    everybody = range(ranks.num_ranks)
    ranks.hear_all(everybody, "done")
    ranks.tell("close", everybody)
    return {rank: ranks.result(rank) for rank in everybody}


def _common(courses: dict[int, Course], most_s: float) -> Wrong:
    wrong = [f"rank {rank}: {text}" for rank, course in courses.items() for text in course.report.tally.corrupt]
    wrong += disagreements({rank: course.report for rank, course in courses.items()})
    for rank, course in courses.items():
        if course.longest_s > most_s:
            wrong.append(f"a call of rank {rank} took {course.longest_s:.1f} s")
    return wrong


def some_stopped(num_ranks: int, stopped: Iterable[int], stopped_s: float = 2.0) -> Wrong:
    """Ranks are stopped at once and woken. With half of the group and its lowest rank, or more, the others go on and
    the stopped are evicted; else the others suspend themselves, and resume once enough of the stopped have woken.

    They wake one after the other, so the first ones may be enough to go on without one that does not beat yet. Of the
    others, who were well all the time, nobody may be lost.
    """
    stopped = tuple(stopped)
    others = [rank for rank in range(num_ranks) if rank not in stopped]
    may_go_on = 2 * len(others) > num_ranks or (2 * len(others) == num_ranks and 0 in others)
    config = small(num_ranks, silence_ms=300, agreement_timeout_ms=800)
    with Ranks(num_ranks, config, persevere) as ranks:
        ranks.wait_ready()
        ranks.wait_begun(5, *range(num_ranks))
        for rank in stopped:
            ranks.stop(rank)
        stopped_at = [ranks.board.begun[rank] for rank in range(num_ranks)]
        stopped_from_s = time.monotonic()
        time.sleep(stopped_s)
        reached = max(ranks.board.begun[rank] for rank in others)
        woken_s = time.monotonic()
        for rank in stopped:
            ranks.wake(rank)
        if not may_go_on:  # all are back once all have begun another round
            ranks.wait_begun(max(stopped_at) + 4, *range(num_ranks))
        ranks.end_after(10)
        courses = _close(ranks)

    wrong = _common(courses, most_s=stopped_s + 10.0)
    if (reached > max(stopped_at) + 2) != may_go_on:
        wrong.append(f"without {stopped}, stopped in rounds {stopped_at}, the others came to round {reached}")
    for rank, course in courses.items():
        error, active = course.report.tally.error, course.report.views[-1][0].active_ranks
        is_out = isinstance(error, RankEvictedError)
        if is_out != (rank not in active) or (error is not None and not is_out):
            wrong.append(f"rank {rank} ended with {error!r} and ranks {active}")
        if not set(others) <= set(active) or (may_go_on and set(stopped) & set(active)):
            wrong.append(f"rank {rank} ended with ranks {active}, and {stopped} were stopped")
        if num_ranks == 2 and not may_go_on and len(active) != 2:
            wrong.append("of two ranks the higher one cannot go on alone")
        if may_go_on or rank in stopped:
            continue
        if course.num_suspended == 0:
            wrong.append(f"rank {rank} was never suspended while {stopped} were stopped")
        # Rounds that were open when the others were stopped end when the stopped are suspected; no other begins.
        ran_on = [at_s for at_s in course.finished_s if stopped_from_s < at_s < woken_s]
        if len(ran_on) > 2:
            wrong.append(f"rank {rank} finished {len(ran_on)} rounds on its own")
    return wrong


def two_with_a_cut_link() -> Wrong:
    """Two ranks lose everything between them: the lower goes on alone, the higher cannot know and suspends itself."""
    config = small(2, silence_ms=300, link_ms=300, agreement_timeout_ms=800)
    with Ranks(2, config, partial(persevere, cut=(0, 1))) as ranks:
        ranks.wait_ready()
        ranks.wait_begun(9, 0)
        ranks.end_after(10)
        courses = _close(ranks)
    wrong = _common(courses, most_s=5.0)
    lower, higher = courses[0], courses[1]
    if lower.report.tally.error is not None or lower.report.views[-1][0].active_ranks != (0,):
        wrong.append(f"rank 0 ended with {lower.report.tally.error!r} and {lower.report.views[-1][0]}")
    if higher.num_suspended == 0 and not isinstance(higher.report.tally.error, RankEvictedError):
        wrong.append(f"rank 1 was neither suspended nor evicted: {higher.report.tally.error!r}")
    if len(higher.report.views) > 1:
        wrong.append(f"rank 1 installed {higher.report.views[-1][0]}")
    return wrong


def last_one_of(num_ranks: int = 8) -> Wrong:
    """All but the highest rank are killed at once: their records answer for them, and it goes on alone."""
    config = small(num_ranks)
    task = Rounds()
    victims = list(range(num_ranks - 1))
    with Ranks(num_ranks, config, task) as ranks:
        ranks.wait_ready()
        ranks.wait_begun(5, *victims)
        ranks.kill(*victims)
        for rank in victims:
            ranks.wait_gone(rank)
        gone = begun_of(ranks, victims)
        last = ranks.end_after(12)
        reports = ranks.reports(gone)
    return judge(reports, task.work(config, num_ranks), gone, last)
