"""The picture of a drill: which instants it is drawn from, and that it is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fault_a2a.cli.drill import timeline
from fault_a2a.cli.drill.report import report
from fault_a2a.cli.drill.story import Span
from fault_a2a.cli.pictures import check_picture
from tests.drills import SMALL, run_drills
from tests.test_drill_report import FAULT_STEP, MS, at, healthy, killed, step_told, tell


def test_a_change_goes_from_a_suspicion_over_a_view_to_the_first_whole_step():
    _, story = killed()
    (change,) = timeline.changes(story.ranks[2])
    assert change == timeline.Change(
        suspected_ns=at(FAULT_STEP) + 3 * MS, installed_ns=at(FAULT_STEP) + 5 * MS, resumed_ns=at(FAULT_STEP + 2)
    )
    assert list(timeline.changes(story.ranks[1])) == [], "the dead rank saw none"


def test_who_learnt_it_from_the_others_suspected_nobody():
    _, story = killed()
    story.ranks[3].evidence.clear()
    (change,) = timeline.changes(story.ranks[3])
    assert change.suspected_ns is None and change.installed_ns == at(FAULT_STEP) + 6 * MS


def test_a_dispatch_is_held_from_a_suspicion_to_the_view():
    _, story = killed()
    one, suspected_ns = story.ranks[2], at(FAULT_STEP) + 3 * MS
    held = [timeline.held_until_ns(one, suspected_ns + ns) - suspected_ns for ns in (-1, 0, MS, 2 * MS)]
    assert held == [-1, 2 * MS, 2 * MS, 2 * MS]


def test_spans_come_with_the_step():
    _, story = healthy()
    tell(story, 0, step_told(9, spans=[["dispatch", 5, 9, 3], ["compute", 9, 12, 0]]))
    assert story.ranks[0].steps[-1].spans == (Span("dispatch", 5, 9, 3), Span("compute", 9, 12, 0))


@pytest.mark.parametrize("scene", [killed, healthy])
def test_it_is_drawn_with_and_without_a_fault(scene, tmp_path):
    pytest.importorskip("matplotlib")
    drill, story = scene()
    for one in story.ranks:
        for step in list(one.steps):
            begin = step.end_ns - 9 * MS
            spans = [["dispatch", begin, begin + 2 * MS, MS], ["combine", begin + 4 * MS, step.end_ns, 0]]
            one.steps.remove(step)
            told = step_told(step.step, at=step.end_ns, lost_on=dict(step.lost_on), spans=spans)
            tell(story, one.rank, told)
    files = [str(tmp_path / name) for name in ("one.svg", "two.svg")]
    for file in files:
        timeline.draw(drill, story, report(drill, story), file)
    text, again = (Path(file).read_text() for file in files)
    assert text == again, "the same figures give the same file"
    assert len(re.findall("<path", text)) > 40


def test_real_ranks_tell_their_spans_and_a_picture_comes_of_them(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "kill.png"
    (answer,) = run_drills([[*SMALL, "--kill", "1@10+500", "--timeline", str(picture)]])
    assert answer["ok"], answer["problems"]
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("file", "why"), [("kill.gif", "does not end with .svg"), ("no/such/folder/kill.svg", "there is no folder")]
)
def test_what_cannot_be_drawn_is_refused_and_the_option_named(file, why):
    with pytest.raises(ValueError, match=f"^--timeline: .*{why}"):
        check_picture("--timeline", file)


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^--plot: matplotlib is not installed: run `python -m pip"):
        check_picture("--plot", "rows.svg")
