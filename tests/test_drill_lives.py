"""The drill's report on lives: whoever comes back, dies again or goes on is judged by what struck that life."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fault_a2a.cli.drill.options import Drill
from fault_a2a.cli.drill.report import Judged, report
from fault_a2a.cli.drill.story import DEAD, EvidenceTold, FaultStory, RankStory, Story
from tests.test_drill_report import (
    FAULT_STEP,
    KILLED_STATUS,
    MS,
    NUM_RANKS,
    NUM_STEPS,
    START_NS,
    at,
    end,
    killed,
    make_drill,
    red,
    seen,
    step_told,
    tell,
    view,
)

# -- a rank that comes back --------------------------------------------------------------------------------------------


def came_back(last_active=(0, 1, 2, 3), joined_at=7) -> tuple[Drill, Story]:
    """Rank 1 is killed in step 5; a new process takes its place from step 8 on."""
    drill, story = killed()
    drill = make_drill(kill=[f"1@{FAULT_STEP}"], rejoin=["1@7"])
    story.faults.append(FaultStory(drill.faults[-1], at_ns=at(joined_at)))
    story.former.append(story.ranks[1])
    story.ranks[1] = RankStory(1, joined=True)
    last = view(2, list(last_active), 9, at(8), incarnations=[11, 99, 13, 14])
    tell(story, 1, {"is": "ready", "at": at(8), "round": 9}, seen(views=[last]))
    for rank in (0, 2, 3):
        tell(story, rank, seen(views=[last]))
    tell(story, 1, *[step_told(step) for step in range(8, NUM_STEPS)])
    end(story, 1)
    return drill, story


def test_a_rank_that_comes_back_is_a_survivor_and_its_former_life_stays_in_the_account():
    answer = report(*came_back())
    assert answer["ok"], answer["problems"]
    assert answer["survivors"] == [0, 1, 2, 3] and answer["evicted"] == []
    assert answer["steps_completed"] == NUM_STEPS, "of those who never left"
    kill, rejoin = answer["faults"]
    assert kill["evicted"] == 1 and 0 < kill["agree_ms"] < 100, "the newcomer's first view is no answer to the kill"
    assert rejoin["back_ms"] == pytest.approx(10)


def test_a_rank_that_comes_back_and_is_not_in_the_last_view_is_a_problem():
    answer = report(*came_back(last_active=(0, 2, 3)))
    assert any("came back" in problem and "not in the last view" in problem for problem in answer["problems"])


def test_a_newcomer_that_never_comes_in_is_a_problem():
    drill, story = came_back()
    story.faults[-1].happened = False
    assert "rank 1 did not come back ('rejoin 1@7')" in report(drill, story)["problems"]


def test_a_corrupt_row_of_a_former_life_counts():
    drill, story = came_back()
    story.former[0].steps[2] = replace(story.former[0].steps[2], num_corrupt=1)
    assert report(drill, story)["corrupt_rows"] == 1


# -- a rank that dies again -------------------------------------------------------------------------------------------


def twice_killed() -> tuple[Drill, Story]:
    """Rank 1 is killed in step 2; its second life begins with step 5 and is killed in step 7."""
    drill = make_drill(kill=["1@2", "1@7"], rejoin=["1@4"])
    told = [FaultStory(fault, happened=True) for fault in drill.faults]
    told[1].at_ns = at(4)
    story = Story([RankStory(rank) for rank in range(NUM_RANKS)], told, began_ns=START_NS, ended_ns=at(NUM_STEPS))
    again = [11, 99, 13, 14]
    others = [0, 2, 3]
    for rank in range(NUM_RANKS):
        tell(story, rank, {"is": "ready", "at": START_NS, "round": 1}, seen(views=[view(0, [0, 1, 2, 3])]))
        tell(story, rank, *[step_told(step) for step in range(2)])
    for rank in others:
        tell_death(story, rank, 2, view(1, others, 4, at(2) + 6 * MS))
        tell(story, rank, *[step_told(step, unroutable=4) for step in (3, 4)])
    story.ranks[1].state, story.ranks[1].exit_status = DEAD, KILLED_STATUS
    story.former.append(story.ranks[1])
    story.ranks[1] = RankStory(1, joined=True)
    tell(story, 1, {"is": "ready", "at": at(5), "round": 6})
    for rank in range(NUM_RANKS):
        tell(story, rank, seen(views=[view(2, [0, 1, 2, 3], 6, at(5), incarnations=again)]))
        tell(story, rank, *[step_told(step) for step in (5, 6)])
    for rank in others:
        tell_death(story, rank, 7, view(3, others, 9, at(7) + 8 * MS, incarnations=again))
        tell(story, rank, *[step_told(step, unroutable=4) for step in (8, 9)])
        end(story, rank, fault_at_ns=(0, at(7), 0, 0))
    story.ranks[1].state, story.ranks[1].exit_status = DEAD, KILLED_STATUS
    return drill, story


def tell_death(story, rank, step, without):
    tell(story, rank, step_told(step, lost_on={"1": 3}))
    found = seen([(1, "exit", at(step) + (rank + 1) * MS)], [without])
    tell(story, rank, {**found, "fault_at_ns": {"1": at(step)}})


def test_each_death_of_a_rank_is_judged_by_its_own_life():
    answer = report(*twice_killed())
    assert answer["ok"], answer["problems"]
    assert answer["survivors"] == [0, 2, 3] and answer["evicted"] == [1] and answer["epochs"] == 3
    first, rejoin, second = answer["faults"]
    assert [first["evidence"], second["evidence"]] == [{"exit": 3}, {"exit": 3}]
    assert (first["suspect_ms"], first["detect_ms"], first["agree_ms"]) == (1.0, 4.0, 6.0)
    assert (second["suspect_ms"], second["detect_ms"], second["agree_ms"]) == (1.0, 4.0, 8.0)
    assert rejoin["back_ms"] == pytest.approx(10) and answer["steps_completed"] == NUM_STEPS


@pytest.mark.parametrize("kind", ["exit", "silence"])
def test_the_death_of_one_life_excuses_no_suspicion_of_the_next(kind):
    drill, story = twice_killed()
    tell(story, 0, seen([(1, kind, at(6))]))
    assert red(drill, story, f"rank 0 suspected rank 1 ({kind}), which was well")["false_suspicions"] == 1


def test_evidence_against_a_former_life_counts_for_it_for_as_long_as_nobody_else_is_in():
    drill, story = twice_killed()
    tell(story, 0, seen([(1, "exit", at(4.9))]))
    assert report(drill, story)["ok"]


def test_a_rank_that_is_out_meant_the_life_that_it_knew():
    """A stopped rank wakes, learns of its end from the newest view, and sees who died meanwhile."""
    drill, story = twice_killed()
    judged, told = Judged(drill, story), EvidenceTold(1, "exit", at(6))
    assert judged.accused(story.ranks[3], told) == (1, 1)
    without = replace(story.ranks[0].views[2], active=(0, 1, 2))
    assert judged.accused(RankStory(3, views=[story.ranks[0].views[0], without]), told) == (1, 0)


def test_rows_lost_on_the_life_that_nothing_has_struck():
    drill, story = came_back()
    story.ranks[0].steps[8] = replace(story.ranks[0].steps[8], lost_on={1: 2})
    assert red(drill, story, "2 choices were lost between ranks")["choices_lost_between_live_ranks"] == 2


def test_a_second_life_is_evicted_without_a_fault():
    drill, story = twice_killed()
    del story.faults[2]
    for one in story.ranks:
        one.evidence = [told for told in one.evidence if told.at_ns < at(7)]
        one.steps = [replace(step, lost_on={}) if step.step == 7 else step for step in one.steps]
    red(drill, story, "rank 1 was evicted, and no fault had struck it")


def test_a_stop_of_a_life_that_is_killed_later_needs_no_eviction_of_its_own():
    drill, story = killed()
    faults = make_drill(stop=["1@3:9"], kill=["1@5"]).faults
    story.faults.insert(0, FaultStory(faults[0], at_ns=at(3), happened=True, woken_ns=at(4)))
    assert report(replace(drill, faults=faults), story)["ok"]


# -- a group that goes on ---------------------------------------------------------------------------------------------


def test_an_episode_begins_with_what_the_one_before_left_and_carries_nothing_else():
    drill, story = came_back()
    for one in story.ranks:
        one.goes_on = True
    assert report(drill, story)["ok"], "nobody has ended, and nobody need to"
    more = story.next_episode([], NUM_STEPS)
    assert not more.former and not more.faults and more.began_ns == story.ended_ns
    for one in more.ranks:
        assert (one.steps, one.evidence, one.fault_at_ns, one.joined) == ([], [], {}, False)
        assert [told.epoch for told in one.views] == [2] and one.epoch == 2 and one.next_step == NUM_STEPS
        tell(more, one.rank, *[step_told(step) for step in range(NUM_STEPS, 2 * NUM_STEPS)])
        end(more, one.rank)
    longer = replace(make_drill(), first_step=NUM_STEPS, steps=2 * NUM_STEPS)
    answer = report(longer, more)
    assert answer["ok"], answer["problems"]
    assert answer["steps_completed"] == NUM_STEPS and answer["epochs"] == 2
    more.ranks[1].steps.pop()
    red(longer, more, "only 9 of 10 steps were completed")
