"""Scenarios as data: a file with one line a membership, and lines for what else goes wrong, read into drill options.

::

    # rank 2 is killed in the second stage, and gone in the third
    steps 40
    [0, 1, 2, 3]
    [0, 1, -2, 3]
    [0, 1, 3]
    stop 1@20:300
    cut 0-3@90

- A line in brackets is a *membership*: who is in during one stage of ``steps`` steps (40 unless a line ``steps N`` says
  otherwise). ``-2`` is killed in the middle of that stage; from the next line on it is out, or, if it is named again,
  comes back at that stage's first step. Rank 0 has a minus as well: ``-0``. Several memberships may stand in one line,
  ``[[0,1,2,3],[0,1,-2,3],[0,1,3]]``.
- The first membership has all ranks, 0 to N - 1: that is the size of the group.
- ``kill``, ``stop``, ``cut``, ``slow`` and ``rejoin`` take what the drill's options of that name take; steps count from
  the first stage on.
- What follows a ``#`` is a comment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from fault_a2a.cli.drill.faults import KINDS

DEFAULT_STEPS = 40
_MEMBERSHIP = re.compile(r"\[([^\[\]]*)\]")
_WHERE = re.compile(r"(?P<rank>\d+)@(?P<step>\d+)", re.ASCII)
_RANK = re.compile(r"(?P<dies>-?)(?P<rank>\d+)", re.ASCII)


@dataclass
class Plan:
    """What a plan asks for, in the words of the drill's options.

    Attributes:
        ranks, steps: of the whole drill.
        texts: for each kind of fault, what would be given to the option of that name.
        members: who must be in the last view; ``None`` when stops, cuts or slow ranks leave that to the verdict.
    """

    ranks: int
    steps: int
    texts: dict[str, list[str]] = field(default_factory=dict)
    members: tuple[int, ...] | None = None


@dataclass
class _Stage:
    line: int
    alive: set[int]
    dying: set[int]


def read_plan(path: str) -> Plan:
    """The plan in a file.

    Raises:
        ValueError: the file cannot be read, or a line means nothing. The message names the line and shows a right one.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--plan {path}: {error}; name a text file with one membership a line.") from None
    return parse_plan(text, path)


def parse_plan(text: str, path: str = "plan") -> Plan:
    """As ``read_plan``, from the text itself; ``path`` is what messages call it."""
    stages: list[_Stage] = []
    texts: dict[str, list[str]] = {kind: [] for kind in KINDS}
    stage_steps = DEFAULT_STEPS
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split("#")[0].strip()
        where = f"--plan {path}, line {number}: {words!r}"
        if not words:
            continue
        first, _, rest = words.partition(" ")
        if words.startswith("["):
            stages += _read_memberships(words, number, where)
        elif first == "steps":
            if not rest.strip().isdecimal() or int(rest) < 2:
                raise ValueError(f"{where}: a stage has at least 2 steps; a right line is `steps {DEFAULT_STEPS}`.")
            stage_steps = int(rest)
        elif first in KINDS and rest.strip():
            texts[first].append(rest.strip())
        else:
            raise ValueError(
                f"{where}: expected a membership as [0, 1, -2, 3], `steps N`, or one of {', '.join(KINDS)} and what "
                "the drill's option of that name takes."
            )
    return _put_together(stages, texts, stage_steps, path)


def _read_memberships(words: str, number: int, where: str) -> list[_Stage]:
    is_list = words.startswith("[[") and words.endswith("]]")
    inside = words[1:-1] if is_list else words
    rest = _MEMBERSHIP.sub("", inside).replace(",", "").strip()
    found = _MEMBERSHIP.findall(inside)
    if rest or not found or (len(found) > 1 and not is_list):
        raise ValueError(f"{where}: brackets do not match; right ones are [0, 1, -2, 3] and [[0, 1], [0, -1], [0]].")
    return [_read_membership(one, number, where) for one in found]


def _read_membership(inside: str, number: int, where: str) -> _Stage:
    stage = _Stage(number, set(), set())
    for word in inside.split(","):
        match = _RANK.fullmatch(word.strip())
        if match is None:
            raise ValueError(f"{where}: {word.strip()!r} is no rank; write 2, or -2 for one that is killed here.")
        rank = int(match["rank"])
        if rank in stage.alive | stage.dying:
            raise ValueError(f"{where}: rank {rank} stands there twice; name it once.")
        (stage.dying if match["dies"] else stage.alive).add(rank)
    return stage


def _put_together(stages: list[_Stage], texts: dict[str, list[str]], stage_steps: int, path: str) -> Plan:
    if not stages:
        raise ValueError(f"--plan {path}: there is no membership in it; the first one has all ranks, as [0, 1, 2, 3].")
    everybody = stages[0].alive | stages[0].dying
    if everybody != set(range(len(everybody))):
        raise ValueError(
            f"--plan {path}, line {stages[0].line}: the first membership has ranks {sorted(everybody)}; give it all "
            "ranks from 0 on without a gap."
        )
    may_be_in = everybody
    for index, stage in enumerate(stages):
        named, first_step = stage.alive | stage.dying, index * stage_steps
        if strangers := sorted(named - everybody):
            raise ValueError(
                f"--plan {path}, line {stage.line}: rank {strangers[0]} is not in the first membership; a group "
                "begins with all its ranks."
            )
        if missing := sorted(may_be_in - named):
            raise ValueError(
                f"--plan {path}, line {stage.line}: rank {missing[0]} was in and did not die; write -{missing[0]} in "
                "the membership before to kill it there."
            )
        texts["rejoin"] += [f"{rank}@{first_step}" for rank in sorted(named - may_be_in)]
        texts["kill"] += [f"{rank}@{first_step + stage_steps // 2}" for rank in sorted(stage.dying)]
        may_be_in = stage.alive
    known = not texts["stop"] and not texts["cut"] and not texts["slow"]
    return Plan(len(everybody), len(stages) * stage_steps, texts, _last_members(may_be_in, texts) if known else None)


def _last_members(members: set[int], texts: dict[str, list[str]]) -> tuple[int, ...]:
    """Whoever further lines kill is out as well, who comes back by such a line is in, and the later line counts."""
    found = [(_WHERE.match(text), kind) for kind in ("kill", "rejoin") for text in texts[kind]]
    left = set(members)
    for _, kind, rank in sorted((int(match["step"]), kind, int(match["rank"])) for match, kind in found if match):
        if kind == "kill":
            left.discard(rank)
        else:
            left.add(rank)
    return tuple(sorted(left))


def missed(plan_members: tuple[int, ...] | None, survivors: list[int]) -> list[str]:
    """What to say when the last view is not the plan's last membership."""
    if plan_members is None or list(plan_members) == survivors:
        return []
    return [f"the plan ends with ranks {list(plan_members)}, and the last view has {survivors}"]
