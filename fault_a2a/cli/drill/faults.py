"""The faults a drill is asked for: read from the command line, and checked before a process is started."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

KINDS = ("kill", "stop", "cut", "slow", "rejoin")
# In the middle of an all-to-all: half of the group can read the victim's rows, the other half waits for them in vain.
DEFAULT_PHASE = "dispatch.half_signalled"
_MAX_STOP_MS = 3600 * 1000  # an hour: a longer one is a typing mistake
_MAX_AFTER_US = 60 * 1000 * 1000

_FORM = {
    "kill": "R@S[:PHASE] or R@S+US",
    "stop": "R@S[+US]:MS",
    "cut": "A-B@S",
    "slow": "R@S:MS",
    "rejoin": "R@S",
}
_EXAMPLE = {"kill": "3@50", "stop": "3@50:4000", "cut": "2-5@50", "slow": "3@50:40000", "rejoin": "3@80"}
_MEANS = {
    "kill": f"SIGKILL rank R in step S, at a phase of its all-to-all ({DEFAULT_PHASE} unless named), or from outside, "
    "US microseconds after the step began",
    "stop": "SIGSTOP rank R in step S, at the same phase or US microseconds after the step began; SIGCONT after MS "
    "milliseconds",
    "cut": "from step S on, lose everything between ranks A and B",
    "slow": "in step S, the experts of rank R take MS milliseconds longer; its process goes on beating",
    "rejoin": "in step S, after another fault has cost rank R its place, a new process joins as rank R; a later fault "
    "strikes that one, in a step that begins once it is in",
}
_PATTERN = {
    "kill": re.compile(r"(?P<rank>\d+)@(?P<step>\d+)(\+(?P<after_us>\d+)|:(?P<phase>.+))?", re.ASCII),
    "stop": re.compile(r"(?P<rank>\d+)@(?P<step>\d+)(\+(?P<after_us>\d+))?:(?P<duration_ms>\d+)", re.ASCII),
    "cut": re.compile(r"(?P<rank>\d+)-(?P<peer>\d+)@(?P<step>\d+)", re.ASCII),
    "slow": re.compile(r"(?P<rank>\d+)@(?P<step>\d+):(?P<duration_ms>\d+)", re.ASCII),
    "rejoin": re.compile(r"(?P<rank>\d+)@(?P<step>\d+)", re.ASCII),
}


@dataclass(frozen=True)
class Fault:
    """One fault to inject.

    Attributes:
        kind: ``"kill"``, ``"stop"``, ``"cut"``, ``"slow"`` or ``"rejoin"``.
        rank: whom it hits; of a cut, the lower of the two.
        step: in which step, counted from 0.
        peer: of a cut, the other end.
        phase: of a kill, the named phase of the step's dispatch or combine at which it strikes; ``None``: see
            ``armed_phase``.
        after_us: of a kill or stop from outside, how long after the rank began the step; else ``None``.
        duration_ms: of a stop, until the rank is woken; of a slow rank, by how much it is late.
        life, peer_life: which life of each end it strikes, from 0; of a rejoin, the life that it begins.
    """

    kind: str
    rank: int
    step: int
    peer: int | None = None
    phase: str | None = None
    duration_ms: int | None = None
    after_us: int | None = None
    life: int = 0
    peer_life: int = 0

    @property
    def armed_phase(self) -> str | None:
        """At which phase the rank does it to itself; ``None`` for a cut, and for a fault that comes from outside."""
        if self.kind not in ("kill", "stop") or self.after_us is not None:
            return None
        return self.phase or DEFAULT_PHASE

    @property
    def needs_hooks(self) -> bool:
        """Whether the ranks must run the test build: only it can stop at a phase or cut a link."""
        return self.kind == "cut" or self.armed_phase is not None

    @property
    def ranks(self) -> tuple[int, ...]:
        """Whom it may cost their place: the rank, or both ends of a cut."""
        return tuple(rank for rank, _ in self.lives)

    @property
    def lives(self) -> tuple[tuple[int, int], ...]:
        """As ``ranks``, each with the life that is meant."""
        own = (self.rank, self.life)
        return (own,) if self.peer is None else (own, (self.peer, self.peer_life))

    def __str__(self) -> str:
        """As it is written on the command line, with its kind in front."""
        who = str(self.rank) if self.peer is None else f"{self.rank}-{self.peer}"
        after = "" if self.after_us is None else f"+{self.after_us}"
        detail = self.phase if self.duration_ms is None else self.duration_ms
        return f"{self.kind} {who}@{self.step}{after}" + ("" if detail is None else f":{detail}")


def add_fault_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--kill``, ``--stop``, ``--cut``, ``--slow`` and ``--rejoin``, which may all be repeated."""
    group = parser.add_argument_group("faults", "each may be given again; R is a rank, S a step, both from 0")
    for kind in KINDS:
        group.add_argument(f"--{kind}", action="append", default=[], metavar=_FORM[kind].split()[0], help=_MEANS[kind])


def parse_faults(
    *,
    kill: Sequence[str] = (),
    stop: Sequence[str] = (),
    cut: Sequence[str] = (),
    slow: Sequence[str] = (),
    rejoin: Sequence[str] = (),
    num_ranks: int,
    num_steps: int,
    phases: Sequence[str] | None = None,
) -> list[Fault]:
    """The faults of a drill, by step.

    Args:
        kill, stop, cut, slow, rejoin: the texts given to each option.
        num_ranks, num_steps: of the drill; ranks and steps count from 0.
        phases: names that a kill may carry; ``None`` when they are not known yet: any name will do.

    Raises:
        ValueError: a text that does not read, a rank, step or phase that does not exist, or faults that do not fit
            each other. The message names the option and shows a right one.
    """
    texts = {"kill": kill, "stop": stop, "cut": cut, "slow": slow, "rejoin": rejoin}
    faults = [_parse(kind, text) for kind in KINDS for text in texts[kind]]
    for fault in faults:
        _check_exists(fault, num_ranks, num_steps, phases)
    faults.sort(key=lambda fault: fault.step)
    return _with_lives(faults, num_ranks)


def _parse(kind: str, text: str) -> Fault:
    match = _PATTERN[kind].fullmatch(text.strip())
    if match is None:
        raise _refusal(kind, text, f"expected {_FORM[kind]}")
    parts = match.groupdict()
    numbers = {name: int(value) for name, value in parts.items() if name != "phase" and value is not None}
    if kind == "cut" and numbers["rank"] > numbers["peer"]:
        numbers["rank"], numbers["peer"] = numbers["peer"], numbers["rank"]
    return Fault(kind=kind, phase=parts.get("phase"), **numbers)


def _check_exists(fault: Fault, num_ranks: int, num_steps: int, phases: Sequence[str] | None) -> None:
    kind, text = fault.kind, str(fault).split(" ", 1)[1]
    for rank in (fault.rank, fault.peer):
        if rank is not None and rank >= num_ranks:
            raise _refusal(kind, text, f"there is no rank {rank} among {num_ranks} (ranks 0 to {num_ranks - 1})")
    if fault.rank == fault.peer:
        raise _refusal(kind, text, "a rank has no link to itself")
    if fault.step >= num_steps:
        raise _refusal(kind, text, f"there is no step {fault.step} among {num_steps} (steps 0 to {num_steps - 1})")
    if fault.phase is not None and phases is not None and fault.phase not in phases:
        raise _refusal(kind, text, f'there is no phase "{fault.phase}"; the phases are {", ".join(phases)}')
    if fault.after_us is not None and fault.after_us > _MAX_AFTER_US:
        raise _refusal(kind, text, f"a step is over after {_MAX_AFTER_US} microseconds at the latest")
    if fault.duration_ms is not None and not 1 <= fault.duration_ms <= _MAX_STOP_MS:
        what = "a stop lasts" if kind == "stop" else "a slow rank is late by"
        raise _refusal(kind, text, f"{what} 1 to {_MAX_STOP_MS} ms")


def _with_lives(faults: Sequence[Fault], num_ranks: int) -> list[Fault]:
    """``faults`` by step, each with the lives that it strikes: nothing can happen to a dead rank, nobody comes back who
    has not lost its place, and a drill without survivors shows nothing.
    """
    lives = [0] * num_ranks
    killed: dict[int, Fault] = {}
    struck: dict[int, Fault] = {}  # of each rank, the newest fault of the life that it leads
    seen: dict[tuple[int, int], Fault] = {}
    links: dict[tuple[int, int | None], Fault] = {}
    out = []
    for fault in faults:
        kind, text = str(fault).split(" ", 1)
        if kind == "rejoin":
            if fault.rank not in struck or struck[fault.rank].step >= fault.step:
                raise _refusal(kind, text, f"rank {fault.rank} has not lost its place by then; --kill it before")
            lives[fault.rank] += 1
            del struck[fault.rank]
            killed.pop(fault.rank, None)
            out.append(replace(fault, life=lives[fault.rank]))
            continue
        for rank in fault.ranks:
            if rank in killed and killed[rank].step < fault.step:
                raise _refusal(kind, text, f"rank {rank} is dead by then (--{killed[rank]})")
        if kind == "cut":
            if (fault.rank, fault.peer) in links:
                raise _refusal(kind, text, f"this link is cut already (--{links[fault.rank, fault.peer]})")
            links[fault.rank, fault.peer] = fault
        elif (fault.rank, fault.step) in seen:
            earlier = seen[fault.rank, fault.step]
            raise _refusal(kind, text, f"rank {fault.rank} has a fault in that step already (--{earlier})")
        else:
            seen[fault.rank, fault.step] = fault
        struck.update(dict.fromkeys(fault.ranks, fault))
        if kind == "kill":
            killed[fault.rank] = fault
        peer_life = 0 if fault.peer is None else lives[fault.peer]
        out.append(replace(fault, life=lives[fault.rank], peer_life=peer_life))
    if len(killed) == num_ranks:
        raise ValueError(f"--kill: all {num_ranks} ranks would be dead; leave at least one of them alive.")
    return out


def _refusal(kind: str, text: str, why: str) -> ValueError:
    return ValueError(f"--{kind} {text}: {why}; a right one looks like --{kind} {_EXAMPLE[kind]}")
