"""What ranks of the process tests do, rounds until they are told to stop, and what must hold of their reports."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fault_a2a import reference
from fault_a2a.buffer import Buffer
from fault_a2a.config import Config
from fault_a2a.errors import FaultA2AError
from tests.processes import Here, Ranks, Report
from tests.rig import Checker, Work

Wrong = list[str]

FIRST_ROUND = 1  # round 0 is construction's warm-up


def small(num_ranks: int, **changes: Any) -> Config:
    fields: dict[str, Any] = {"num_experts": 2 * num_ranks + 1, "hidden": 32, "num_topk": 4}
    fields |= {"num_max_tokens_per_rank": 8, "construct_timeout_ms": 20000, **changes}
    return Config(**fields)


# -- what a rank does --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounds:
    """A rank's task: checked rounds until the board says stop, then the report.

    Attributes:
        seed: of the rows and of the compute times.
        compute_ms: how long experts take at most; each (rank, round) takes its own share of it.
        compute_rounds: in which rounds; ``None``: in all.
        armed: (rank, phase, round, action) of faults that ranks do to themselves.
        before: called in front of each round, ``between``: among the experts.
        at_first: called once the buffer stands.
    """

    seed: int = 0
    compute_ms: float = 0.0
    compute_rounds: tuple[int, ...] | None = None
    armed: tuple[tuple[int, str, int, str], ...] = ()
    at_first: Callable[[Here, Buffer], None] | None = None
    before: Callable[[Here, Buffer, int], None] | None = None
    between: Callable[[Here, Buffer, int], None] | None = None

    def __call__(self, here: Here) -> None:
        buffer = here.open()
        for rank, phase, round_number, action in self.armed:
            if rank == here.rank:
                buffer.arm(phase, round_number, action)
        if self.at_first is not None:
            self.at_first(here, buffer)
        checker = Checker(buffer, self.work(here.config, here.num_ranks))
        try:
            while (number := buffer.num_rounds) <= here.board.last_round[0]:
                self.one_round(here, checker, number)
        except FaultA2AError as error:
            checker.tally.error = error
        here.end_together(buffer, checker.tally)

    def work(self, config: Config, num_ranks: int) -> Work:
        return Work(config, num_ranks, self.seed)

    def one_round(self, here: Here, checker: Checker, number: int) -> None:
        here.board.begun[here.rank] = number
        if self.before is not None:
            self.before(here, checker.buffer, number)
        self.exchange(here, checker, number)

    def exchange(self, here: Here, checker: Checker, number: int) -> None:
        received, handle = checker.dispatch(number)
        if self.between is not None:
            self.between(here, checker.buffer, number)
        if self.compute_ms and (self.compute_rounds is None or number in self.compute_rounds):
            share = random.Random(f"{self.seed}/{here.rank}/{number}").random()
            time.sleep(share * self.compute_ms / 1000)
        checker.combine(received, handle, number)


# -- what must hold ----------------------------------------------------------------------------------------------------


def judge(
    reports: Mapping[int, Report],
    work: Work,
    gone: Mapping[int, int],
    last_round: int,
    kinds: Iterable[str] = ("exit",),
) -> Wrong:
    """Everything that must hold of every rank's report.

    Args:
        gone: the ranks that were killed, stopped or closed, each with the last round that it had begun.
        last_round: of those that remain.
        kinds: of evidence that may be held against ``gone``.
    """
    wrong = [f"rank {rank}: {text}" for rank, report in reports.items() for text in report.tally.corrupt]
    wrong += disagreements(reports) + suspicions_of_live(reports, set(gone))
    for rank, report in reports.items():
        if rank in gone:
            continue
        if report.tally.error is not None:
            wrong.append(f"rank {rank} ended with {report.tally.error!r}")
        elif report.tally.rounds != last_round - FIRST_ROUND + 1:
            wrong.append(f"rank {rank} finished {report.tally.rounds} rounds of {last_round - FIRST_ROUND + 1}")
        if set(gone) & set(report.views[-1][0].active_ranks):
            wrong.append(f"rank {rank}: {sorted(gone)} are gone, and its view is {report.views[-1][0].active_ranks}")
        found = {one.kind for one in report.evidence} - set(kinds)
        if found:
            wrong.append(f"rank {rank} has evidence of kind {found}; only {set(kinds)} happened")
        wrong += losses(report, work, gone)
    return wrong


def disagreements(reports: Mapping[int, Report]) -> Wrong:
    """Two views of one epoch."""
    seen: dict[int, tuple] = {}
    wrong = []
    for rank, report in reports.items():
        for view, _ in report.views:
            content = (view.active_mask, view.first_round, view.incarnations)
            if seen.setdefault(view.epoch, content) != content:
                wrong.append(f"epoch {view.epoch}: rank {rank} has {content}, others {seen[view.epoch]}")
    return wrong


def suspicions_of_live(reports: Mapping[int, Report], gone: set[int]) -> Wrong:
    """Evidence against a rank that did nothing, held by another that did nothing."""
    return [
        f"rank {rank} suspected live rank {one.rank}: {one.kind}"
        for rank, report in reports.items()
        for one in report.evidence
        if rank not in gone and one.rank not in gone
    ]


def losses(report: Report, work: Work, gone: Mapping[int, int]) -> Wrong:
    """Choices of one rank whose outcome is not what the views and the deaths say.

    One is unroutable exactly when the round's view leaves its rank out. One is lost only when its rank was in the view
    and had begun that round as its last, or was about to begin it; then all choices on that rank are lost.
    """
    wrong = []
    expert_rank = torch.tensor(work.config.placement_for(work.num_ranks).expert_rank)
    views = [view for view, _ in report.views]
    for number, codes in report.tally.outcomes.items():
        idx = work.tokens(report.rank, number)[1]
        dst = expert_rank[idx.clamp(min=0)].masked_fill(idx < 0, -1)
        active = [view for view in views if view.first_round <= number][-1].active_mask
        for rank in range(work.num_ranks):
            found = codes[dst == rank].unique().tolist()
            may_be_lost = rank in gone and gone[rank] <= number <= gone[rank] + 1
            allowed = [[reference.DELIVERED], [reference.LOST]] if may_be_lost else [[reference.DELIVERED]]
            if not active[rank]:
                allowed = [[reference.UNROUTABLE]]
            if found and found not in allowed:
                wrong.append(f"round {number}: outcomes of rank {report.rank}'s choices on rank {rank} are {found}")
    return wrong


def no_view_change(reports: Mapping[int, Report]) -> Wrong:
    """Views and evidence where there was no reason for either."""
    return [
        f"rank {rank} installed {report.views[-1][0]} although nobody died"
        for rank, report in reports.items()
        if len(report.views) > 1
    ] + [f"rank {rank} holds {report.evidence}" for rank, report in reports.items() if report.evidence]


def begun_of(ranks: Ranks, victims: Iterable[int]) -> dict[int, int]:
    return {rank: ranks.board.begun[rank] for rank in victims}
