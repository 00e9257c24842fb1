"""The picture of a drill: a lane a rank, what it did around the faults, and how the others found out and went on.

A rank tells of each step when its dispatch, its experts and its combine began and ended, and how long it waited for
peers in each call, not when: that is drawn at the call's end. What a call waited at the gate, for a new view, is drawn
where it was. Between steps a rank checks its answers, which is drawn as nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fault_a2a.cli.drill.report import Judged
from fault_a2a.cli.pictures import pyplot, save

if TYPE_CHECKING:
    from fault_a2a.cli.drill.options import Drill
    from fault_a2a.cli.drill.story import RankStory, Story

_COLORS = {"dispatch": "#3a6ea5", "compute": "#e9b44c", "combine": "#2a8c82", "wait": "#dde3ea"}
_SUSPECT, _AGREE, _RESUME, _GONE = "#c1272d", "#e8743b", "#4aa564", "#8a8f98"
_BAR, _STRIP = 0.46, 0.13  # heights, of a lane's 1
_NUM_STEPS_BEFORE, _NUM_STEPS_AFTER = 1.6, 0.8
_MANY_LANES = 32


@dataclass(frozen=True)
class Change:
    """How one rank came from a fault to its next whole step, in ns; ``None``: it did not come to that."""

    suspected_ns: int | None  # its own first evidence against somebody whom the view leaves out
    installed_ns: int
    resumed_ns: int | None


def changes(one: RankStory) -> Iterator[Change]:
    """Of every view after a rank's first one."""
    for before, view in zip(one.views, one.views[1:], strict=False):
        gone = set(before.active) - set(view.active)
        found = [told.at_ns for told in one.evidence if told.rank in gone and told.at_ns <= view.installed_at_ns]
        ends = [step.end_ns for step in one.steps if step.round_number >= view.first_round and not step.lost_on]
        yield Change(min(found, default=None), view.installed_at_ns, min(ends, default=None))


def held_until_ns(one: RankStory, begin_ns: int) -> int:
    """When a dispatch that began then could pass the gate: no round begins between a suspicion and the next view."""
    for change in changes(one):
        if change.suspected_ns is not None and change.suspected_ns <= begin_ns < change.installed_ns:
            return change.installed_ns
    return begin_ns


def draw(drill: Drill, story: Story, answer: dict[str, Any], file: str) -> None:
    """``answer``: the drill's report. Two pictures in one: all of it, and, larger, the agreement alone."""
    judged = Judged(drill, story)
    struck = [at_ns for told in judged.happened if (at_ns := judged.struck_at_ns(told))]
    zero_ns = min(struck) if struck else story.began_ns
    close_up = _close_up(story, zero_ns) if struck else None
    plot = pyplot()
    num_lanes = min(len(story.ranks), _MANY_LANES)
    height = 0.42 * num_lanes + 0.6
    ratios = [height, 0.7 * height] if close_up else [height]
    figure, axes = plot.subplots(
        len(ratios), 1, figsize=(11, sum(ratios) + 1.5), height_ratios=ratios, layout="constrained", squeeze=False
    )
    windows = [_window(story, zero_ns, bool(struck)), *([close_up] if close_up else [])]
    for axis, (first_ms, last_ms) in zip(axes[:, 0], windows, strict=True):
        for lane, one in enumerate(story.ranks[:num_lanes]):
            _draw_lane(axis, lane, one, zero_ns, (first_ms, last_ms))
        for told in judged.happened:
            _draw_fault(axis, judged, told, zero_ns, num_lanes, last_ms)
        axis.set_xlim(first_ms, last_ms)
        axis.set_ylim(num_lanes - 0.35, -0.75)
        axis.set_yticks(range(num_lanes), [f"rank {rank}" for rank in range(num_lanes)])
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.grid(axis="x", color="#e6e6e6", linewidth=0.6)
        axis.set_axisbelow(True)
    since = "milliseconds since the fault" if struck else "milliseconds since the drill began"
    axes[-1, 0].set_xlabel(f"{since} (between its steps, a rank checks its answers)")
    if close_up:
        axes[1, 0].set_title("The same, close up: from the fault to the agreed view", loc="left", fontsize=10)
        axes[0, 0].axvspan(*close_up, color="#f3f0e8", zorder=-2)
    axes[0, 0].set_title(_title(drill, answer), loc="left", fontsize=11)
    figure.legend(handles=_legend(bool(struck)), loc="outside lower center", ncols=8, frameon=False, fontsize=8.5)
    save(figure, file)


def _window(story: Story, zero_ns: int, has_fault: bool) -> tuple[float, float]:
    """In ms: from a step or two before the first fault until everybody has gone on."""
    steps = [step for one in story.lives for step in one.steps]
    step_ms = statistics.median([step.latency_us / 1e3 for step in steps]) if steps else 10.0
    resumed = [change.resumed_ns or change.installed_ns for one in story.ranks for change in changes(one)]
    # A view that a rank which came late began with is no answer to the fault.
    after_ms = max([(ns - zero_ns) / 1e6 for ns in resumed], default=4 * step_ms)
    if not has_fault:
        first_ms = min([(span.begin_ns - zero_ns) / 1e6 for step in steps for span in step.spans], default=0.0)
        return first_ms, first_ms + 5 * step_ms
    return -_NUM_STEPS_BEFORE * step_ms, after_ms + _NUM_STEPS_AFTER * step_ms


def _close_up(story: Story, zero_ns: int) -> tuple[float, float] | None:
    """In ms: the time in which the ranks suspect and agree; ``None`` if no view changed."""
    all_changes = [change for one in story.ranks for change in changes(one)]
    instants = [ns for change in all_changes for ns in (change.suspected_ns, change.installed_ns) if ns is not None]
    if not instants:
        return None
    first, last = ((ns - zero_ns) / 1e6 for ns in (min(instants), max(instants)))
    first = 0.0 if first < last - first else first  # the fault itself, where it is near
    margin = 0.25 * (last - first) or 1.0
    return first - margin, last + margin


def _draw_lane(axis: Any, lane: int, one: RankStory, zero_ns: int, window: tuple[float, float]) -> None:
    def bar(begin_ns: float, end_ns: float, color: str, y: float, height: float, **style: Any) -> None:
        begin_ms, end_ms = max((begin_ns - zero_ns) / 1e6, window[0]), min((end_ns - zero_ns) / 1e6, window[1])
        if begin_ms < end_ms:
            axis.broken_barh([(begin_ms, end_ms - begin_ms)], (y, height), facecolor=color, linewidth=0, **style)

    for step in one.steps:
        for span in step.spans:
            gate_ns = min(held_until_ns(one, span.begin_ns), span.end_ns) if span.what == "dispatch" else span.begin_ns
            work_end_ns = max(span.end_ns - span.waited_ns, gate_ns)
            bar(span.begin_ns, gate_ns, _COLORS["wait"], lane - _BAR / 2, _BAR)
            bar(gate_ns, work_end_ns, _COLORS[span.what], lane - _BAR / 2, _BAR)
            bar(work_end_ns, span.end_ns, _COLORS["wait"], lane - _BAR / 2, _BAR)
    below = lane + _BAR / 2 + 0.03
    for change in changes(one):
        if change.suspected_ns is not None:
            bar(change.suspected_ns, change.installed_ns, _AGREE, below, _STRIP)
            at_ms = (change.suspected_ns - zero_ns) / 1e6
            if window[0] <= at_ms <= window[1]:
                axis.plot(at_ms, lane - _BAR / 2 - 0.1, marker="v", color=_SUSPECT, markersize=5, zorder=4)
        if change.resumed_ns is not None:
            bar(change.installed_ns, change.resumed_ns, _RESUME, below, _STRIP)


def _draw_fault(axis: Any, judged: Judged, told: Any, zero_ns: int, num_lanes: int, last_ms: float) -> None:
    at_ns = judged.struck_at_ns(told)
    if at_ns is None:
        return
    at_ms = (at_ns - zero_ns) / 1e6
    axis.axvline(at_ms, color=_SUSPECT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    for rank in told.fault.ranks:
        if rank < num_lanes:
            axis.plot(at_ms, rank, marker="X", color=_SUSPECT, markersize=9, markeredgecolor="white", zorder=5)
            if told.fault.kind != "cut":
                axis.plot([at_ms, last_ms], [rank, rank], color=_GONE, linewidth=1, linestyle=(0, (1, 3)))


def _title(drill: Drill, answer: dict[str, Any]) -> str:
    if not answer["faults"]:
        return f"{drill.ranks} ranks, no fault"
    what = {"kill": "killed", "stop": "stopped", "slow": "late", "cut": "cut off", "rejoin": "back"}
    ranks: dict[str, list[int]] = {}
    for line in answer["faults"]:
        ranks.setdefault(line["kind"], []).append(line["rank"] if line["evicted"] is None else line["evicted"])
    who = "; ".join(f"rank{'s' * (len(of) > 1)} {', '.join(map(str, of))} {what[kind]}" for kind, of in ranks.items())
    times = [
        f"{text} {answer[key]:,.1f} ms"
        for key, text in (
            ("suspect_ms", "first suspected after"),
            ("agree_ms", "the new view in on all after"),
            ("first_good_step_ms", "a whole step done by all after"),
        )
        if answer[key] is not None
    ]
    return f"{drill.ranks} ranks; {who}: " + ", ".join(times)


def _legend(has_fault: bool) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=color, label=what) for what, color in _COLORS.items()]
    if has_fault:
        handles += [
            Line2D([], [], marker="X", color=_SUSPECT, linestyle="", markeredgecolor="white", label="the fault"),
            Line2D([], [], marker="v", color=_SUSPECT, linestyle="", label="suspects"),
            Patch(color=_AGREE, label="agrees"),
            Patch(color=_RESUME, label="resumes: to its first whole step"),
        ]
    return handles
