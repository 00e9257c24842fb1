"""Accusers among real processes: one whose watcher is sick goes for it, the first to miss late ranks do not."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from functools import partial

from fault_a2a.buffer import Buffer
from fault_a2a.errors import RankEvictedError
from tests.process_rounds import Rounds, Wrong, begun_of, judge, small
from tests.processes import Here, Ranks, Report

SILENCE_MS = 300
_LATE_S = 0.45  # whoever is waited for for so long must have beaten, and has
# In `first_to_miss`: the others come to wait later than FIRST by more than three settle times, less than stall_ms / 2.
STALL_MS, LATE, FIRST = 2000, (2, 4, 6), (1, 3)
_LATE_ROUND, _SPREAD_S = 4, 0.28
_EVERY = 3  # round, a new accusation


def accuses_everybody(seed: int, num_ranks: int = 8) -> Wrong:
    """From one round on a rank hears nobody's beat any more. It goes, and nobody with it."""
    dice = random.Random(f"everybody/{seed}")
    sick, from_round = dice.randrange(num_ranks), dice.randint(3, 8)
    config = small(num_ranks, silence_ms=SILENCE_MS)
    task = Rounds(seed=seed % 1000, before=partial(_hear_nobody, sick=sick, from_round=from_round))
    with Ranks(num_ranks, config, task) as ranks:
        ranks.wait_ready()
        ranks.wait_until(lambda: bool(ranks.board.ended[sick]), f"rank {sick} to be evicted")
        last = ranks.end_after(3)
        gone = begun_of(ranks, [sick])
        reports = ranks.reports(gone)
    wrong = judge(reports, task.work(config, num_ranks), gone, last, kinds=("silence",))
    accused = {one.rank for one in reports[sick].evidence}
    if len(accused) < num_ranks - 1:
        wrong.append(f"it accused {sorted(accused)} only")
    wrong += _is_out(reports, sick)
    return [f"accuses_everybody({seed}): rank {sick} from round {from_round}: {text}" for text in wrong]


def _hear_nobody(here: Here, buffer: Buffer, number: int, sick: int, from_round: int) -> None:
    if number < from_round:
        return
    if here.rank != sick:
        # More than once: a watcher that is late itself judges no silence.
        time.sleep(_LATE_S if buffer.view.active_mask[sick] else 0)
    elif number == from_round:
        buffer.core.set_faults({"unheard": [rank for rank in range(here.num_ranks) if rank != sick]})


def accuses_one_after_another(seed: int, num_ranks: int = 8) -> Wrong:
    """A rank takes another one for silent in each view, until it is out. That costs at most one of the others."""
    dice = random.Random(f"serial/{seed}")
    sick = dice.randrange(num_ranks)
    config = small(num_ranks, silence_ms=SILENCE_MS)
    task = Rounds(seed=seed % 1000, before=partial(_hear_all_but_one, sick=sick))
    with Ranks(num_ranks, config, task) as ranks:
        ranks.wait_ready()
        ranks.wait_until(lambda: bool(ranks.board.ended[sick]), f"rank {sick} to be evicted")
        last = ranks.end_after(3)
        out = [rank for rank in range(num_ranks) if ranks.board.ended[rank]]
        gone = begun_of(ranks, out)
        reports = ranks.reports(gone)
    wrong = judge(reports, task.work(config, num_ranks), gone, last, kinds=("silence",)) + _is_out(reports, sick)
    if len(out) > 2:
        wrong.append(f"ranks {out} are out")
    return [f"accuses_one_after_another({seed}): rank {sick}: {text}" for text in wrong]


def _hear_all_but_one(here: Here, buffer: Buffer, number: int, sick: int) -> None:
    if number < _EVERY or number % _EVERY:
        return
    accused = min(set(buffer.view.active_ranks) - {sick}, key=lambda rank: (rank - sick) % here.num_ranks)
    if here.rank == accused:
        time.sleep(_LATE_S)
    elif here.rank == sick:
        buffer.core.set_faults({"unheard": [accused]})


def _is_out(reports: dict[int, Report], sick: int) -> Wrong:
    error = reports[sick].tally.error
    return [] if isinstance(error, RankEvictedError) else [f"it ended with {error!r}"]


def first_to_miss(guards_off: Iterable[str] = (), between_rounds: bool = False) -> Wrong:
    """Three of eight are late in their experts, or in front of a round. Two miss them before the others do, and would
    be the smaller choice."""
    config = small(8, stall_ms=STALL_MS, silence_ms=SILENCE_MS)
    task = Rounds(before=_compute) if between_rounds else Rounds(between=_compute)
    gone = dict.fromkeys(LATE, _LATE_ROUND)
    with Ranks(8, config, task, guards_off) as ranks:
        ranks.wait_ready()
        ranks.wait_begun(_LATE_ROUND + 2, *FIRST)
        last = ranks.end_after(3)
        reports = ranks.reports(gone)
    return judge(reports, task.work(config, 8), gone, last, kinds=("stall",))


def _compute(here: Here, _: Buffer, number: int) -> None:
    if number == _LATE_ROUND:
        time.sleep(0.0 if here.rank in FIRST else 2.2 * STALL_MS / 1000 if here.rank in LATE else _SPREAD_S)
