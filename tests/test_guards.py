"""Every guard of csrc/protocol/guards.hpp has a scenario that is clean with it and red without it."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import partial

import pytest
import torch

from fault_a2a._core import core
from tests import (
    accuser_scenarios,
    collective_scenarios,
    join_scenarios,
    namespace_scenarios,
    scenarios,
    stall_scenarios,
    stream_scenarios,
    window_scenarios,
)
from tests.apart import exit_code
from tests.ballots import WENT_WRONG, run
from tests.rig import shown
from tests.scenarios import Wrong, without

torch.set_num_threads(1)

# guard -> (scenario, other guards that must be out because they cover the same accident).
TABLE: dict[str, tuple[Callable[[], Wrong], tuple[str, ...]]] = {
    "consent": (scenarios.overtaken, ("recheck",)),
    "recheck": (scenarios.overtaken, ("consent",)),
    "hold": (scenarios.running_ahead, ("promise",)),
    "evicted_is_suspect": (scenarios.voted_out_alive, ()),
    "promise": (scenarios.mixed_views, ("hold",)),
    "promise_fence": (scenarios.promise_race, ()),
    "all_promised": (scenarios.slow_promise, ()),
    "later_declined": (scenarios.overtaken_rank_catches_up, ("hold", "promise")),
    "round_compare": (scenarios.late_rank, ()),
    "epoch_compare": (scenarios.old_epoch, ()),
    "chunk_compare": (scenarios.late_chunks, ()),
    "chunk_consent": (scenarios.late_chunks, ()),
    "claims_met": (lambda: scenarios.lying("claims"), ()),
    "mutual_wait": (scenarios.crossed_orders, ()),
    "combine_count": (lambda: scenarios.lying("combine_count", from_round=0), ()),
    "one_answer": (lambda: scenarios.lying("expert", wait_ms=300, stall_ms=600), ()),
    "third_round": (scenarios.third_round, ()),
    "tick": (scenarios.waiting_longer_than_a_stall, ()),
    "beat": (scenarios.long_compute, ()),
    "gap_restart": (scenarios.everybody_slept, ()),
    "taken_back": (stall_scenarios.taken_back, ()),
    "waited_only": (scenarios.idle_group, ()),
    "incarnation": (scenarios.foreign_incarnation, ()),
    "view_once": (scenarios.death_between_dispatch_and_combine, ()),
    "release_word": (scenarios.evicted_while_waiting, ()),
    "copy_fence": (scenarios.streamed_rows, ()),
    "quiet_swap": (window_scenarios.swapped_under_kernels, ()),
    "all_say": (lambda: collective_scenarios.half_heard("collective.half_contributed"), ()),
    "frozen_set": (lambda: collective_scenarios.half_heard("collective.half_said"), ()),
    "say_epoch": (collective_scenarios.smaller_set_of_the_dead, ()),
    "fresh_words": (stream_scenarios.stream_after_an_age, ()),
    "quorum_ends": (collective_scenarios.quorum_lost, ()),
}
# Without these two views of one epoch can be decided. No group of threads would meet that schedule in a lifetime, so
# the test walks them all (tests/native/ballots.cpp; with the guards in, in tests/test_agreement.py).
EXPLORED = ("record_before_answer", "frozen_records", "records_at_accept")
# What only time brings about is met in simulation (tests/test_simulation.py; more guards than this one are, as well).
SIMULATED = (
    *("own_kernel", "old_rounds_first", "mapped_place", "newcomer_once", "decided_leave", "beaten_since"),
    *("silent_go", "looked_again", "stall_awake"),
)
# By one rank's agreement on made-up reports (tests/native/followed.cpp): one schedule in a hundred thousand meets it.
FOLLOWED = ("found_first",)
# Found by seeded schedules of lives that begin and end (tests/native/join_schedules.cpp, tests/test_joins.py).
SCHEDULED = ("visitor_kept",)
# Lives that end and begin, and experts that are late, take processes.
PROCESSES: dict[str, Callable[..., Wrong]] = {
    "fresh_partition": join_scenarios.zombie,
    "members_anew": join_scenarios.replaced_while_another_joins,
    "step_start": join_scenarios.one_late_rank,
    "hold_bound": join_scenarios.one_rank_marks_few_steps,
    "late_waiters": accuser_scenarios.first_to_miss,
    "same_namespace": namespace_scenarios.a_stranger_ends,
    "late_promise": partial(accuser_scenarios.first_to_miss, between_rounds=True),
}
# Its scenario is another's, with the lateness elsewhere.
IN_PROCESSES = [pytest.param(guard, marks=pytest.mark.slow if guard == "late_promise" else ()) for guard in PROCESSES]
# Without these a peer's number walks off the window, and red may be a dead process: each runs in one of its own.
# guard -> (lie, other guards that must be out).
DEADLY = {"clamp_count": ("count", ("check_index",)), "check_index": ("expert", ())}


def test_every_guard_is_listed() -> None:
    listed = [*TABLE, *DEADLY, *EXPLORED, *FOLLOWED, *PROCESSES, *SCHEDULED, *SIMULATED]
    assert sorted(listed) == sorted(core.guard_names())


@pytest.mark.parametrize("guard", TABLE)
def test_scenario_is_clean_with_the_guard(guard: str) -> None:
    scenario, others = TABLE[guard]
    with without(*others):
        assert shown(scenario) == []


@pytest.mark.parametrize("guard", TABLE)
def test_scenario_is_red_without_the_guard(guard: str) -> None:
    if guard == "copy_fence" and (platform.machine() != "x86_64" or len(os.sched_getaffinity(0)) < 2):
        pytest.skip("only x86-64 stores past the cache, and only two cores can watch each other")
    scenario, others = TABLE[guard]
    with without(guard, *others):
        # An accident of timing may need a second try to happen; that it can happen is what is shown.
        assert any(scenario() for _ in range(3))


@pytest.mark.parametrize("guard", EXPLORED)
def test_two_views_are_decided_without(guard: str) -> None:
    walked = run("ballots", "without", guard)
    assert walked.returncode == WENT_WRONG, walked.stdout + walked.stderr


@pytest.mark.parametrize("guard", FOLLOWED)
def test_an_accusation_is_followed_from_the_turn_after(guard: str) -> None:
    assert guard == "found_first" and "the accused goes" in run("followed").stdout
    without_it = run("followed", "without")
    assert without_it.returncode == WENT_WRONG and "the accuser goes" in without_it.stdout, without_it.stdout


@pytest.mark.parametrize("guard", IN_PROCESSES)
def test_processes_are_clean_with_the_guard(guard: str) -> None:
    assert PROCESSES[guard]() == []


@pytest.mark.parametrize("guard", IN_PROCESSES)
def test_processes_are_red_without_the_guard(guard: str) -> None:
    assert any(PROCESSES[guard](guards_off=[guard]) for _ in range(6))  # where a stop hits a row, is chance


def lie_without(lie: str, guards_out: tuple[str, ...]) -> Wrong:
    with without(*guards_out):
        return scenarios.lying(lie)


@pytest.mark.parametrize("guard", DEADLY)
def test_a_number_that_is_believed_does_harm(guard: str) -> None:
    lie, others = DEADLY[guard]
    assert exit_code(partial(lie_without, lie, others)) == 0
    assert exit_code(partial(lie_without, lie, (guard, *others))) != 0


@pytest.mark.parametrize(
    "lie",
    [
        "count",
        "expert",
        "choice",
        "num_choices",
        "twice",
        "combine_count",
        "old_round",
        "old_epoch",
        "future",
        "claims",
    ],
)
def test_a_liar_harms_nobody(lie: str) -> None:
    if lie in ("old_round",):
        # It never says that a round is there, and beats: the path from it is lost, and it goes.
        assert [text for text in scenarios.lying(lie, wait_ms=200) if "live rank" in text or "rows" in text] == []
    else:
        assert scenarios.lying(lie, from_round=0 if lie == "combine_count" else 4) == []
