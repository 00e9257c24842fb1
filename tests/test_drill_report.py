"""The drill's report: each broken promise, planted in what the ranks tell, must turn ``ok`` red."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fault_a2a.cli.drill import screen
from fault_a2a.cli.drill.faults import parse_faults
from fault_a2a.cli.drill.options import Drill
from fault_a2a.cli.drill.report import WAKING_NS, report
from fault_a2a.cli.drill.story import DEAD, EVICTED, FAILED, FINISHED, RUNNING, SUSPENDED, FaultStory, RankStory, Story

KEYS = [
    *("ranks", "survivors", "evicted", "epochs", "steps_completed", "detect_ms", "agree_ms", "first_good_step_ms"),
    *("tokens_total", "choices_total", "choices_lost", "choices_unroutable", "choices_repaired", "corrupt_rows"),
    *("false_suspicions", "accounting_exact", "bit_exact_with_healthy_run", "views_agree", "ok", "faults"),
    "load_average",
]

NUM_RANKS, NUM_STEPS = 4, 10
MS = 1_000_000
START_NS = 1_000_000 * MS
FAULT_STEP, FAULT_ROUND = 5, 6  # construction runs round 0
KILLED_STATUS, WELL_STATUS = 9, 0


def at(step: float) -> int:
    """A step takes ten milliseconds."""
    return START_NS + int(step * 10 * MS)


def view(epoch, active, first_round=0, installed=START_NS, **other):
    fields = {"epoch": epoch, "active": active, "first_round": first_round, "incarnations": [11, 12, 13, 14]}
    return {**fields, "reason": f"reason {epoch}", "installed_at_ns": installed, **other}


def seen(evidence=(), views=()):
    return {"is": "seen", "suspects": sorted({rank for rank, _, _ in evidence}), "evidence": evidence, "views": views}


def step_told(step, **other):
    fields = {"step": step, "round": step + 1, "at": at(step + 1), "us": 9000, "lost_on": {}, "unroutable": 0}
    return {"is": "step", **fields, "corrupt": 0, "exact": True, "why": "", **other}


def make_drill(**faults) -> Drill:
    read = parse_faults(**faults, num_ranks=NUM_RANKS, num_steps=NUM_STEPS)
    return Drill(
        ranks=NUM_RANKS, steps=NUM_STEPS, tokens=8, hidden=64, experts=8, topk=2, faults=tuple(read), silence_ms=200
    )


def tell(story, rank, *messages):
    for message in messages:
        story.hear(rank, message, at(NUM_STEPS))


def end(story, rank, how=FINISHED, fault_at_ns=(0, 0, 0, 0)):
    tell(story, rank, {"is": "end", "how": how, "why": "" if how == FINISHED else "told so"})
    tell(story, rank, {"is": "final", "fault_at_ns": list(fault_at_ns), "suspects": [], "evicted": False})
    story.ranks[rank].exit_status = WELL_STATUS


def healthy() -> tuple[Drill, Story]:
    drill = make_drill()
    story = Story([RankStory(rank) for rank in range(NUM_RANKS)], [], began_ns=START_NS, ended_ns=at(NUM_STEPS))
    for rank in range(NUM_RANKS):
        tell(story, rank, {"is": "ready", "at": START_NS, "round": 1}, seen(views=[view(0, [0, 1, 2, 3])]))
        tell(story, rank, *[step_told(step) for step in range(NUM_STEPS)])
        end(story, rank)
    return drill, story


def struck(victim=1, evidence="exit", **faults) -> tuple[Drill, Story]:
    """A drill whose ``victim`` is gone after step 5; the others saw it a millisecond later."""
    drill = make_drill(**faults)
    told = [FaultStory(fault, happened=True) for fault in drill.faults]
    story = Story([RankStory(rank) for rank in range(NUM_RANKS)], told, began_ns=START_NS, ended_ns=at(NUM_STEPS))
    others = [rank for rank in range(NUM_RANKS) if rank != victim]
    words = [at(FAULT_STEP) if rank == victim else 0 for rank in range(NUM_RANKS)]
    for rank in range(NUM_RANKS):
        tell(story, rank, {"is": "ready", "at": START_NS, "round": 1}, seen(views=[view(0, [0, 1, 2, 3])]))
        tell(story, rank, *[step_told(step) for step in range(FAULT_STEP)])
    for rank in others:
        tell(story, rank, step_told(FAULT_STEP, lost_on={str(victim): 3}))
        found_ns = at(FAULT_STEP) + (rank + 1) * MS
        tell(story, rank, seen([(victim, evidence, found_ns)], [view(1, others, FAULT_ROUND + 1, found_ns + 2 * MS)]))
        tell(story, rank, *[step_told(step, unroutable=4) for step in range(FAULT_STEP + 1, NUM_STEPS)])
        end(story, rank, fault_at_ns=words)
    return drill, story


def killed() -> tuple[Drill, Story]:
    drill, story = struck(kill=[f"1@{FAULT_STEP}"])
    story.ranks[1].state, story.ranks[1].exit_status = DEAD, KILLED_STATUS
    return drill, story


def stopped(duration_ms=4000) -> tuple[Drill, Story]:
    drill, story = struck(evidence="silence", stop=[f"1@{FAULT_STEP}:{duration_ms}"])
    story.faults[0].woken_ns = at(FAULT_STEP) + duration_ms * MS
    tell(story, 1, {"is": "fault", "step": FAULT_STEP, "kind": "stop", "peer": None, "at": at(FAULT_STEP)})
    end(story, 1, EVICTED)
    return drill, story


def slow(duration_ms=50_000) -> tuple[Drill, Story]:
    drill, story = struck(evidence="stall", slow=[f"1@{FAULT_STEP}:{duration_ms}"])
    tell(story, 1, {"is": "fault", "step": FAULT_STEP, "kind": "slow", "peer": None, "at": at(FAULT_STEP)})
    end(story, 1, EVICTED)
    return drill, story


def cut() -> tuple[Drill, Story]:
    drill, story = struck(victim=2, evidence="silence", cut=[f"1-2@{FAULT_STEP}"])
    for rank in (0, 3):
        story.ranks[rank].evidence.clear()  # only the other end can see it
    for rank, peer in ((1, 2), (2, 1)):
        tell(story, rank, {"is": "fault", "step": FAULT_STEP, "kind": "cut", "peer": peer, "at": at(FAULT_STEP)})
    tell(story, 2, seen([(1, "silence", at(FAULT_STEP) + 4 * MS)]))
    end(story, 2, EVICTED)
    return drill, story


# ---- what is well ---------------------------------------------------------------------------------------------------
def test_healthy():
    answer = report(*healthy())
    assert answer["ok"] and answer["problems"] == [] and answer["faults"] == []
    assert set(KEYS) <= set(answer), "every key of the drill's JSON"
    assert answer["survivors"] == [0, 1, 2, 3] and answer["evicted"] == [] and answer["epochs"] == 0
    assert answer["detect_ms"] is None and answer["bit_exact_with_healthy_run"] is None
    assert answer["tokens_total"] == 4 * 10 * 8 and answer["choices_total"] == 2 * answer["tokens_total"]
    json.dumps(answer)


def test_a_kill():
    answer = report(*killed())
    assert answer["ok"], answer["problems"]
    assert answer["survivors"] == [0, 2, 3] and answer["evicted"] == [1] and answer["epochs"] == 1
    # Evidence one millisecond after rank 0, ..., four after rank 3; the view two later; the step after the next ends.
    assert (answer["detect_ms"], answer["agree_ms"], answer["first_good_step_ms"]) == (4.0, 6.0, 20.0)
    assert answer["suspect_ms"] == 1.0, "the first of them, where the others are the last"
    assert answer["choices_lost"] == 9 and answer["choices_unroutable"] == 3 * 4 * 4
    assert answer["choices_total"] == 2 * 8 * (3 * 10 + 5), "the victim's completed steps count"
    (line,) = answer["faults"]
    assert line["evidence"] == {"exit": 3} and line["evicted"] == 1 and line["phase"] == "dispatch.half_signalled"


def test_who_learnt_it_from_the_others_dropped_it_with_the_view():
    drill, story = killed()
    story.ranks[3].evidence.clear()
    assert report(drill, story)["detect_ms"] == 6.0


def test_times_are_of_the_worst_fault():
    drill, story = killed()
    drill = replace(drill, faults=make_drill(stop=["1@3:9"], kill=["1@5"]).faults)
    story.faults.insert(0, FaultStory(drill.faults[0], at_ns=at(FAULT_STEP) - 50 * MS, happened=True))
    answer = report(drill, story)
    assert answer["detect_ms"] == 54.0 and [line["detect_ms"] for line in answer["faults"]] == [54.0, 4.0]


def test_a_long_stop():
    answer = report(*stopped())
    assert answer["ok"], answer["problems"]
    assert answer["detect_ms"] == 4.0 and answer["faults"][0]["evidence"] == {"silence": 3}


def test_a_short_stop_costs_nobody():
    drill, story = healthy()
    drill = replace(drill, faults=make_drill(stop=["1@5:20"]).faults)
    story.faults = [FaultStory(drill.faults[0], at_ns=at(5), happened=True, woken_ns=at(7))]
    answer = report(drill, story)
    assert answer["ok"] and answer["detect_ms"] is None and answer["faults"][0]["evicted"] is None


def test_a_slow_rank():
    answer = report(*slow())
    assert answer["ok"], answer["problems"]
    assert answer["faults"][0]["evidence"] == {"stall": 3} and answer["agree_ms"] == 6.0


def test_a_cut_costs_one():
    answer = report(*cut())
    assert answer["ok"], answer["problems"]
    assert answer["evicted"] == [2] and answer["false_suspicions"] == 0 and answer["faults"][0]["evicted"] == 2


# ---- what is planted, and must turn it red --------------------------------------------------------------------------
def red(drill, story, why):
    answer = report(drill, story)
    assert not answer["ok"] and any(why in problem for problem in answer["problems"]), answer["problems"]
    assert why in screen.closing(drill, answer).replace("\n    ", " "), "and a person is told"
    return answer


@pytest.mark.parametrize("field", ["active", "first_round", "incarnations"])
def test_views_that_differ(field):
    drill, story = killed()
    other = {"active": (0, 2), "first_round": 8, "incarnations": (11, 12, 13, 99)}[field]
    story.ranks[3].views[-1] = replace(story.ranks[3].views[-1], **{field: other})
    assert red(drill, story, "different views for one epoch")["views_agree"] is False


def test_installing_at_another_time_is_no_difference():
    drill, story = killed()
    story.ranks[3].views[-1] = replace(story.ranks[3].views[-1], reason="in other words", installed_at_ns=at(6))
    assert report(drill, story)["ok"]


def test_a_rank_that_never_came_to_the_last_view():
    drill, story = killed()
    story.ranks[3].views.pop()
    story.ranks[3].epoch = 0
    red(drill, story, "rank 3 never came to epoch 1")


def test_corrupt_rows():
    drill, story = healthy()
    story.ranks[2].steps[4] = replace(story.ranks[2].steps[4], num_corrupt=2)
    assert red(drill, story, "2 received rows are corrupt")["corrupt_rows"] == 2


def test_inexact_accounts():
    drill, story = healthy()
    story.ranks[2].steps.pop()
    tell(story, 2, step_told(9, exact=False, why="the outputs of tokens [3] differ"))
    story.ranks[2].state = FINISHED
    assert red(drill, story, "rank 2, step 9: the outputs of tokens [3] differ")["accounting_exact"] is False


def test_nothing_was_accounted_for():
    drill, story = healthy()
    for one in story.ranks:
        one.steps.clear()
    assert red(drill, story, "no step was completed")["accounting_exact"] is False


@pytest.mark.parametrize("kind", ["exit", "silence", "stall", "link"])
def test_a_live_rank_is_suspected(kind):
    drill, story = killed()
    tell(story, 0, seen([(3, kind, at(FAULT_STEP) + MS)]))
    why = f"rank 0 suspected rank 3 ({kind}), which was well"
    assert red(drill, story, why)["false_suspicions"] == 1


def test_a_leave_is_no_suspicion():
    drill, story = healthy()
    tell(story, 0, seen([(3, "left", at(10))]))
    assert report(drill, story)["ok"]


def test_suspected_before_the_fault():
    drill, story = killed()
    tell(story, 0, seen([(1, "silence", at(FAULT_STEP) - MS)]))
    red(drill, story, "rank 0 suspected rank 1 (silence), which was well")


def test_suspected_long_after_it_woke():
    drill, story = stopped()
    woken_ns = story.faults[0].woken_ns
    tell(story, 0, seen([(1, "stall", woken_ns + WAKING_NS)]))
    assert report(drill, story)["ok"]
    tell(story, 0, seen([(1, "stall", woken_ns + WAKING_NS + 1)]))
    red(drill, story, "rank 0 suspected rank 1 (stall), which was well")


def test_a_cut_explains_only_its_own_ends():
    drill, story = cut()
    tell(story, 0, seen([(2, "silence", at(FAULT_STEP) + 4 * MS)]))
    red(drill, story, "rank 0 suspected rank 2 (silence), which was well")


def test_evicted_without_a_fault():
    drill, story = killed()
    story.faults.clear()
    drill = replace(drill, faults=())
    for one in story.ranks:
        one.evidence.clear()
    assert red(drill, story, "rank 1 was evicted, and no fault had struck it")["false_suspicions"] == 1


@pytest.mark.parametrize("rank", [2, 1])
def test_who_is_cut_off_from_all_who_decided_may_suspend_itself(rank):
    drill, story = cut()
    story.ranks[rank].state = SUSPENDED
    answer = report(drill, story)
    assert answer["ok"] is (rank == 2), answer["problems"]


def test_evicted_after_the_last_step():
    drill, story = cut()
    story.ranks[2].state = FINISHED
    red(drill, story, "rank 2 completed its steps although the last view is without it")
    tell(story, 2, {"is": "final", "fault_at_ns": [0] * 4, "suspects": [], "evicted": True})
    assert report(drill, story)["ok"]


def test_one_cut_costs_two():
    drill, story = cut()
    for rank in (0, 3):
        story.ranks[rank].views[-1] = replace(story.ranks[rank].views[-1], active=(0, 3))
    story.ranks[1].views.pop()
    story.ranks[1].state = EVICTED
    red(drill, story, "one cut link cost two ranks: 1 and 2")


def test_nobody_paid_for_a_kill():
    drill, story = killed()
    for rank in (0, 2, 3):
        story.ranks[rank].views.pop()
        story.ranks[rank].epoch = 0
    answer = red(drill, story, f"nobody was evicted for the fault 'kill 1@{FAULT_STEP}'")
    assert answer["survivors"] == [0, 1, 2, 3] and answer["detect_ms"] is None


@pytest.mark.parametrize(("victims", "must_go"), [([1], True), ([3, 2], True), ([0, 1], False), ([1, 2, 3], False)])
def test_a_minority_waits_for_the_stopped_to_wake(victims, must_go):
    """Half of a group may decide only with its lowest rank in it."""
    drill, story = healthy()
    drill = replace(drill, faults=make_drill(stop=[f"{rank}@5:4000" for rank in victims]).faults)
    story.faults = [FaultStory(fault, at_ns=at(5), happened=True, woken_ns=at(405)) for fault in drill.faults]
    assert report(drill, story)["ok"] is not must_go


@pytest.mark.parametrize(
    ("victims", "duration_ms", "must_go"),
    [([1], 790, False), ([1], 850, True), ([1, 2], 850, False), ([1, 2], 950, True)],
)
def test_who_is_stopped_beside_another_may_be_waited_for_after_it(victims, duration_ms, must_go):
    """With silence_ms 200: once and a half of it and 500 ms for one; for two, the one after the other."""
    drill, story = healthy()
    drill = replace(drill, faults=make_drill(stop=[f"{rank}@5:{duration_ms}" for rank in victims]).faults)
    story.faults = [FaultStory(fault, at_ns=at(5), happened=True, woken_ns=at(405)) for fault in drill.faults]
    assert report(drill, story)["ok"] is not must_go


def test_evicted_for_a_stop_far_too_short():
    drill, story = stopped(duration_ms=20)
    red(drill, story, "rank 1 was evicted for a stop of 20 ms")


def test_evicted_for_being_a_little_late():
    drill, story = slow(duration_ms=9000)
    red(drill, story, "rank 1 was evicted for being late by 9000 ms")


def test_nobody_paid_for_a_rank_that_was_late_for_ever():
    drill, story = healthy()
    drill = replace(drill, faults=make_drill(slow=["1@5:50000"]).faults)
    story.faults = [FaultStory(drill.faults[0], at_ns=at(5), happened=True, woken_ns=at(5005))]
    red(drill, story, "nobody was evicted for the fault 'slow 1@5:50000'")


def test_a_fault_that_did_not_happen():
    drill, story = healthy()
    drill = replace(drill, faults=make_drill(kill=["1@5"]).faults)
    story.faults = [FaultStory(drill.faults[0])]
    red(drill, story, "the fault 'kill 1@5' did not happen")


def test_woken_and_not_told():
    drill, story = stopped()
    story.ranks[1].state = RUNNING
    red(drill, story, "did not end with RankEvictedError")


def test_rows_lost_between_ranks_that_are_well():
    drill, story = killed()
    story.ranks[0].steps[7] = replace(story.ranks[0].steps[7], lost_on={3: 2})
    assert red(drill, story, "2 choices were lost between ranks")["choices_lost_between_live_ranks"] == 2


def test_a_rank_that_failed():
    drill, story = healthy()
    story.ranks[2].state, story.ranks[2].why, story.ranks[2].exit_status = FAILED, "Traceback\nValueError: no", 256
    red(drill, story, "rank 2 failed: ValueError: no")


def test_a_rank_that_is_stuck():
    drill, story = healthy()
    story.ranks[2].state, story.ranks[2].ended_by_drill, story.ranks[2].exit_status = RUNNING, True, KILLED_STATUS
    story.ranks[2].steps = story.ranks[2].steps[:4]
    story.stuck.append("rank 2 is running in step 4 and said nothing for 90 s")
    answer = red(drill, story, "only 4 of 10 steps were completed by all survivors")
    assert any("said nothing for 90 s" in problem for problem in answer["problems"])


def test_shared_memory_left_behind():
    drill, story = healthy()
    story.leftovers = ["fa2a-1-c0"]
    red(drill, story, "shared memory was left behind: fa2a-1-c0")


def test_no_group_at_all():
    drill, story = healthy()
    for one in story.ranks:
        one.views.clear()
        one.steps.clear()
        one.state = FAILED
    answer = red(drill, story, "the group was never built")
    assert answer["survivors"] == [] and answer["evicted"] == [] and answer["steps_completed"] == 0


# ---- what a person sees ---------------------------------------------------------------------------------------------
def test_the_last_screen_tells_what_happened():
    drill, story = killed()
    text = " ".join(screen.closing(drill, report(drill, story)).split())
    assert "In step 5, rank 1 was killed (SIGKILL) in the middle of an all-to-all" in text
    assert "The other 3 noticed within 4.0 ms (the operating system said that it was gone)" in text
    assert "Ranks 0 2 3 completed 10 steps" in text and "9 were lost in the step of a fault" in text
    assert "OK: every promise held" in text
    drill, story = healthy()
    assert "No fault was asked for" in screen.closing(drill, report(drill, story))
    drill, story = stopped()
    assert "Rank 1 itself was told so" in " ".join(screen.closing(drill, report(drill, story)).split())


def test_the_table_shows_whom_and_why():
    drill, story = killed()
    story.ranks[2].suspects = [1]
    lines = screen.table(drill, story, at(NUM_STEPS))
    assert len(lines) == 1 + NUM_RANKS and "1 (exit)" in lines[3] and "dead" in lines[2] and " 10/10" in lines[1]


def test_events_are_told_once():
    _, story = healthy()
    first = story.hear(0, seen([(1, "exit", at(5))], [view(1, [0, 2, 3], 7)]), at(5))
    assert first == ["rank 0 drops rank 1: its process is gone", "epoch 1 begins with ranks 0 2 3: reason 1"]
    assert story.hear(2, seen([(1, "exit", at(5))], [view(1, [0, 2, 3], 7)]), at(5)) == []
