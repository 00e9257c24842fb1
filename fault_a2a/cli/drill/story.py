"""What a drill's parent has learnt so far about its ranks and faults, message by message."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fault_a2a.cli.drill.faults import Fault

# What a rank's process is doing. The first four may still change.
STARTING, RUNNING, STOPPED, FINISHED = "starting", "running", "stopped", "finished"
EVICTED, SUSPENDED, FAILED, DEAD = "evicted", "suspended", "failed", "dead"
ENDED = (EVICTED, SUSPENDED, FAILED, DEAD)

Message = dict[str, Any]


@dataclass(frozen=True)
class Span:
    """What a rank did from one instant to another, CLOCK_MONOTONIC ns; ``waited_ns`` of it, for peers."""

    what: str  # dispatch, compute or combine
    begin_ns: int
    end_ns: int
    waited_ns: int


@dataclass(frozen=True)
class StepTold:
    """One step of one rank. Times are CLOCK_MONOTONIC ns."""

    step: int
    round_number: int
    end_ns: int
    latency_us: int
    lost_on: dict[int, int]
    num_unroutable: int
    num_corrupt: int
    exact: bool
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True)
class EvidenceTold:
    """What a rank found against a peer."""

    rank: int
    kind: str
    at_ns: int


@dataclass(frozen=True)
class ViewTold:
    """A view as one rank installed it."""

    epoch: int
    active: tuple[int, ...]
    first_round: int
    incarnations: tuple[int, ...]
    reason: str
    installed_at_ns: int

    @property
    def content(self) -> tuple[object, ...]:
        """What must be the same on every rank."""
        return self.active, self.first_round, self.incarnations


@dataclass(frozen=True)
class Holdings:
    """What a rank's process held of the system after an episode."""

    rss_kb: int = 0
    files: int = 0
    threads: int = 0
    mappings: int = 0


@dataclass
class RankStory:
    """One life of a rank: what it told, and what the operating system says of its process."""

    rank: int
    pid: int = 0
    child: int = 0  # which of the parent's children it is
    joined: bool = False  # it came in the place of a former life
    due: int = 0  # of one that joins: from which step on
    first_step: int = 0  # of the episode
    state: str = STARTING
    steps: list[StepTold] = field(default_factory=list)
    evidence: list[EvidenceTold] = field(default_factory=list)
    views: list[ViewTold] = field(default_factory=list)
    fault_at_ns: dict[int, set[int]] = field(default_factory=dict)  # of each rank, the words that its lives left behind
    suspects: list[int] = field(default_factory=list)
    epoch: int = 0
    round_number: int = 0
    why: str = ""  # the error it ended with, or what is wrong with a step
    settled: bool = False  # it has completed its steps, and nobody who is in is suspected by it
    told_all: bool = False  # its last message has come
    waits_at: int | None = None  # at which step start, for newcomers that are on their way
    goes_on: bool = False  # its process is needed for another episode
    holdings: Holdings | None = None
    exit_status: int | None = None  # as of waitpid
    ended_by_drill: bool = False  # the drill killed it to be rid of it
    last_words: str = ""  # what it wrote to stderr
    ready_ns: int = 0
    news_ns: int = 0

    @property
    def alive(self) -> bool:
        return self.exit_status is None

    @property
    def next_step(self) -> int:
        return self.steps[-1].step + 1 if self.steps else self.first_step

    @property
    def incarnation(self) -> int | None:
        """By which views name this life; ``None``: it never was in one."""
        return self.views[0].incarnations[self.rank] if self.views else None

    def is_left_out(self, view: ViewTold) -> bool:
        """This life had its place, and has it no more in ``view``."""
        if not self.views or view.epoch <= self.views[0].epoch:
            return False
        return self.rank not in view.active or view.incarnations[self.rank] != self.incarnation

    @property
    def ended_well(self) -> bool:
        if self.goes_on:
            return True
        return self.exit_status is not None and os.waitstatus_to_exitcode(self.exit_status) == 0


@dataclass
class FaultStory:
    """One fault: whether and when it struck. ``at_ns`` of an armed one is known only once a survivor has told it."""

    fault: Fault
    at_ns: int | None = None
    happened: bool = False
    woken_ns: int | None = None
    cut_ends: set[int] = field(default_factory=set)


@dataclass
class Story:
    """The whole drill."""

    ranks: list[RankStory]
    faults: list[FaultStory]
    former: list[RankStory] = field(default_factory=list)  # lives whose rank another process has taken
    began_ns: int = 0
    ended_ns: int = 0
    stuck: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    _views_seen: set[int] = field(default_factory=set)
    _suspected: set[tuple[int, str]] = field(default_factory=set)

    @property
    def lives(self) -> list[RankStory]:
        """All processes that were ranks, those that are first."""
        return [*self.ranks, *self.former]

    def lives_of(self, rank: int) -> list[RankStory]:
        """Of one rank, in order."""
        return [*(one for one in self.former if one.rank == rank), self.ranks[rank]]

    def life_of(self, fault: Fault) -> RankStory | None:
        """Whom it strikes, or who comes by it; ``None``: that life has not begun."""
        lives = self.lives_of(fault.rank)
        return lives[fault.life] if fault.life < len(lives) else None

    def next_episode(self, faults: list[FaultStory], first_step: int) -> Story:
        """Of the processes that go on, with nothing behind them but the view they are in: a story does not grow for as
        long as its group lives.
        """
        ranks = [
            RankStory(
                one.rank,
                pid=one.pid,
                child=one.child,
                state=RUNNING,
                views=one.views[-1:],
                epoch=one.epoch,
                round_number=one.round_number,
                ready_ns=one.ready_ns,
                news_ns=one.news_ns,
                first_step=first_step,
            )
            for one in self.ranks
        ]
        return Story(ranks, faults, began_ns=self.ended_ns)

    def hear(self, rank: int, message: Message, now_ns: int) -> list[str]:
        """Takes a rank's message; returns what is worth telling a person, in sentences."""
        return self.hear_of(self.ranks[rank], message, now_ns)

    def hear_of(self, story: RankStory, message: Message, now_ns: int) -> list[str]:
        """As ``hear``, of a certain life."""
        story.news_ns = now_ns
        told = getattr(self, f"_hear_{message['is']}")(story, message)
        return list(told or [])

    def _hear_ready(self, story: RankStory, message: Message) -> list[str]:
        story.state, story.ready_ns, story.round_number = RUNNING, message["at"], message["round"]
        if not story.joined:
            return []
        for one in self.faults:
            if one.fault.kind == "rejoin" and self.life_of(one.fault) is story:
                one.happened = True
        return [f"rank {story.rank} is back, as a new process, from round {story.round_number} on"]

    def _hear_begin(self, story: RankStory, message: Message) -> None:
        pass  # the parent aims by it

    def _hear_waits(self, story: RankStory, message: Message) -> None:
        story.waits_at = message["step"]

    def _hear_step(self, story: RankStory, message: Message) -> list[str]:
        lost_on = {int(rank): count for rank, count in message["lost_on"].items()}
        step = StepTold(
            step=message["step"],
            round_number=message["round"],
            end_ns=message["at"],
            latency_us=message["us"],
            lost_on=lost_on,
            num_unroutable=message["unroutable"],
            num_corrupt=message["corrupt"],
            exact=message["exact"],
            spans=tuple(Span(*span) for span in message.get("spans", ())),
        )
        story.steps.append(step)
        story.state, story.round_number = RUNNING, step.round_number + 1
        if step.exact and not step.num_corrupt:
            return []
        story.why = f"step {step.step}: {message['why'] or f'{step.num_corrupt} corrupt rows'}"
        return [f"rank {story.rank}, {story.why}"]

    def _hear_seen(self, story: RankStory, message: Message) -> list[str]:
        sentences = []
        story.suspects = message["suspects"]
        # Told with the evidence: once another life has taken the rank, its page knows nothing of this one's fault.
        self._hear_words(story, message.get("fault_at_ns", {}).items())
        for rank, kind, at_ns in message["evidence"]:
            story.evidence.append(EvidenceTold(rank, kind, at_ns))
            if (rank, kind) not in self._suspected and kind != "left":
                self._suspected.add((rank, kind))
                sentences.append(f"rank {story.rank} drops rank {rank}: {EVIDENCE_MEANS.get(kind, kind)}")
        for view in message["views"]:
            told = ViewTold(**{**view, "active": tuple(view["active"]), "incarnations": tuple(view["incarnations"])})
            story.views.append(told)
            story.epoch = max(story.epoch, told.epoch)
            if told.epoch not in self._views_seen:
                self._views_seen.add(told.epoch)
                if told.epoch:
                    active = " ".join(map(str, told.active))
                    sentences.append(f"epoch {told.epoch} begins with ranks {active}: {told.reason}")
        return sentences

    def _hear_fault(self, story: RankStory, message: Message) -> list[str]:
        """Of a cut end, of a rank that is about to be late, or of one that lived through its own fault."""
        for one in self.faults:
            fault = one.fault
            if fault.step != message["step"] or story.rank not in fault.ranks or fault.kind != message["kind"]:
                continue
            if fault.kind == "cut" and fault.peer is not None:
                if message["peer"] not in fault.ranks:
                    continue
                one.cut_ends.add(story.rank)
                one.happened = len(one.cut_ends) == 2
            if message["at"]:
                one.at_ns = min(one.at_ns or message["at"], message["at"])
            if fault.kind == "slow":
                one.happened, one.woken_ns = True, message["at"] + (fault.duration_ms or 0) * 1_000_000
                return [f"rank {fault.rank} is {fault.duration_ms} ms late in step {fault.step}"]
            if one.happened and fault.kind == "cut":
                return [f"the link between ranks {fault.rank} and {fault.peer} is cut in step {fault.step}"]
        return []

    def _hear_end(self, story: RankStory, message: Message) -> list[str]:
        story.state, story.why = message["how"], message["why"] or story.why
        if story.state == FINISHED:
            return []
        return [f"rank {story.rank} ends as {story.state}: {story.why.strip().splitlines()[-1]}"]

    def _hear_settled(self, story: RankStory, message: Message) -> None:
        story.settled, story.epoch = True, message["epoch"]

    def _hear_final(self, story: RankStory, message: Message) -> None:
        if message["evicted"] and story.state == FINISHED:
            story.state, story.why = EVICTED, "evicted after its last step"  # it made no call that could have told it
        self._hear_words(story, enumerate(message["fault_at_ns"]))
        story.suspects, story.told_all = message["suspects"], True
        story.holdings = Holdings(**message["holdings"]) if "holdings" in message else None

    def _hear_words(self, story: RankStory, words: Iterable[tuple[int | str, int]]) -> None:
        for rank, at_ns in words:
            if at_ns:
                story.fault_at_ns.setdefault(int(rank), set()).add(at_ns)


EVIDENCE_MEANS = {
    "exit": "its process is gone",
    "silence": "it has not shown that it lives for too long",
    "stall": "it lives and does not move on",
    "link": "what it sent never came",
    "left": "it said goodbye",
}
