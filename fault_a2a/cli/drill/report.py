"""From what the ranks told to the drill's answer: how long everything took, and whether every promise held."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fault_a2a.cli.drill.faults import KINDS
from fault_a2a.cli.drill.options import Drill
from fault_a2a.cli.drill.story import (
    EVICTED,
    FAILED,
    FINISHED,
    SUSPENDED,
    EvidenceTold,
    FaultStory,
    RankStory,
    StepTold,
    Story,
    ViewTold,
)

# Between the signal that wakes a rank and its first beat; what is found in this time is still about the stop.
WAKING_NS = 250_000_000
# A stop far shorter than the timeout must cost nobody, one far longer must cost the rank; between, either may.
CERTAIN_STAY, CERTAIN_GO, GO_MARGIN_MS = 0.5, 1.5, 500
STRIKES = tuple(kind for kind in KINDS if kind != "rejoin")


Life = tuple[int, int]  # a rank, and which of its processes, from 0


@dataclass(frozen=True)
class Times:
    """What one fault cost, in milliseconds since it struck; ``None``: it did not come to that."""

    suspect_ms: float | None = None  # by the first survivor
    detect_ms: float | None = None  # by the last one; so the two below
    agree_ms: float | None = None
    first_good_step_ms: float | None = None


def report(drill: Drill, story: Story, notes: Iterable[str] = ()) -> dict[str, Any]:
    """The JSON of ``fault-a2a drill``. ``notes``: further problems, found outside of the ranks."""
    judged = Judged(drill, story)
    faults = [judged.fault_line(one) for one in story.faults]
    steps = [step for one in story.lives for step in one.steps]
    problems = [*notes, *judged.problems()]
    return {
        "ranks": drill.ranks,
        "survivors": list(judged.survivors),
        "evicted": list(judged.evicted),
        "epochs": judged.last_view.epoch if judged.last_view else 0,
        "steps_completed": judged.steps_completed,
        "suspect_ms": _worst(faults, "suspect_ms"),
        "detect_ms": _worst(faults, "detect_ms"),
        "agree_ms": _worst(faults, "agree_ms"),
        "first_good_step_ms": _worst(faults, "first_good_step_ms"),
        "tokens_total": len(steps) * drill.tokens,
        "choices_total": len(steps) * drill.tokens * drill.topk,
        "choices_lost": sum(sum(step.lost_on.values()) for step in steps),
        "choices_unroutable": sum(step.num_unroutable for step in steps),
        "choices_repaired": 0,
        "choices_lost_between_live_ranks": judged.lost_between_live_ranks,
        "corrupt_rows": judged.corrupt_rows,
        "false_suspicions": len(judged.false_suspicions),
        "accounting_exact": judged.accounting_exact,
        "bit_exact_with_healthy_run": None,
        "views_agree": judged.views_agree,
        "ok": not problems,
        "problems": problems,
        "faults": faults,
        "views": judged.view_lines(),
        "step_ms": _step_ms(steps),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "seed": drill.seed,
        "seconds": round((story.ended_ns - story.began_ns) / 1e9, 3),
    }


def _worst(faults: list[dict[str, Any]], key: str) -> float | None:
    return max((line[key] for line in faults if line[key] is not None), default=None)


def _step_ms(steps: list[StepTold]) -> dict[str, float] | None:
    if not steps:
        return None
    latencies = sorted(step.latency_us / 1000 for step in steps)
    return {
        "median": round(statistics.median(latencies), 3),
        "p95": round(latencies[int(0.95 * (len(latencies) - 1))], 3),
        "worst": round(latencies[-1], 3),
    }


class Judged:
    """A story with everything that follows from it."""

    def __init__(self, drill: Drill, story: Story) -> None:
        self.drill, self.story = drill, story
        views = [view for one in story.lives for view in one.views]
        self.last_view: ViewTold | None = max(views, key=lambda view: view.epoch, default=None)
        self.survivors = self.last_view.active if self.last_view else ()
        self.evicted = tuple(one.rank for one in story.ranks if one.rank not in self.survivors) if views else ()
        # One process of a rank that died and came back is not another: each is judged by what struck it.
        self.life_number = {id(one): number for rank in story.ranks for number, one in self._numbered(rank.rank)}
        self.left_out = {self._name(one) for one in story.lives if any(map(one.is_left_out, views))}
        self.living = [story.ranks[rank] for rank in self.survivors if story.ranks[rank].told_all]
        self.happened = [one for one in story.faults if one.happened]
        self.hit = {life for one in self.happened if one.fault.kind in STRIKES for life in one.fault.lives}
        self.steps_completed = min((self._num_completed(story.ranks[rank]) for rank in self.survivors), default=0)
        self.corrupt_rows = sum(step.num_corrupt for one in story.lives for step in one.steps)
        steps = [step for one in story.lives for step in one.steps]
        self.accounting_exact = bool(steps) and all(step.exact for step in steps)
        self.views_agree = self._views_agree(views)
        self.false_suspicions = list(self._false_suspicions())
        self.lost_between_live_ranks = self._lost_between_live_ranks()

    # -- lives -------------------------------------------------------------------------------------------------------

    def _numbered(self, rank: int) -> Iterator[tuple[int, RankStory]]:
        return enumerate(self.story.lives_of(rank))

    def _name(self, one: RankStory) -> Life:
        return one.rank, self.life_number[id(one)]

    def _named(self, life: Life) -> RankStory | None:
        lives = self.story.lives_of(life[0])
        return lives[life[1]] if life[1] < len(lives) else None

    def _life_in(self, view: ViewTold, rank: int) -> Life | None:
        """Which life of a rank a view speaks of."""
        found = (one for one in self.story.lives_of(rank) if one.incarnation == view.incarnations[rank])
        return next((self._name(one) for one in found), None)

    def accused(self, accuser: RankStory, evidence: EvidenceTold) -> Life:
        """Whom evidence is about: the life that the accuser knew at that instant.

        A view without the accuser tells it of its end, and of nobody to watch.
        """
        views = [view for view in accuser.views if not accuser.is_left_out(view)]
        views = [view for view in views if view.installed_at_ns <= evidence.at_ns] or views[:1]
        known = self._life_in(views[-1], evidence.rank) if views else None
        if known is not None:
            return known
        # It died before it told anybody in which view it was.
        begun = [self._name(one) for one in self.story.lives_of(evidence.rank) if one.ready_ns <= evidence.at_ns]
        return begun[-1] if begun else (evidence.rank, 0)

    def _num_completed(self, one: RankStory) -> int:
        return one.next_step - self.drill.first_step if one.joined else len(one.steps)

    # -- views -------------------------------------------------------------------------------------------------------

    def _views_agree(self, views: list[ViewTold]) -> bool:
        contents: dict[int, set[object]] = {}
        for view in views:
            contents.setdefault(view.epoch, set()).add(view.content)
        return bool(views) and all(len(found) == 1 for found in contents.values())

    def view_lines(self) -> list[dict[str, Any]]:
        """Each view once, as the lowest rank that told it."""
        first: dict[int, ViewTold] = {}
        for one in self.story.lives:
            for view in one.views:
                first.setdefault(view.epoch, view)
        return [
            {"epoch": epoch, "active": list(view.active), "first_round": view.first_round, "reason": view.reason}
            for epoch, view in sorted(first.items())
        ]

    # -- times -------------------------------------------------------------------------------------------------------

    def struck_at_ns(self, told: FaultStory) -> int | None:
        """The instant of a fault: of a kill at a phase, the word that the victim wrote right before it."""
        if told.at_ns is not None:
            return told.at_ns
        victim = self.story.life_of(told.fault)
        if victim is None:
            return None
        after = [one.ready_ns for one in self.story.lives_of(victim.rank) if one.ready_ns > victim.ready_ns]
        words = {at_ns for one in self.living for at_ns in one.fault_at_ns.get(victim.rank, ())}
        own = [at_ns for at_ns in words if victim.ready_ns <= at_ns < min(after, default=at_ns + 1)]
        return max(own, default=None)

    def lost_life(self, told: FaultStory) -> Life | None:
        """Whom the fault cost its place in the group."""
        gone = [life for life in told.fault.lives if life in self.left_out]
        return gone[0] if gone and told.fault.kind in STRIKES else None

    def times(self, told: FaultStory) -> Times:
        at_ns, life = self.struck_at_ns(told), self.lost_life(told)
        victim = self._named(life) if life is not None else None
        if at_ns is None or victim is None:
            return Times()
        suspected, detected, agreed, good = [], [], [], []
        for one in self.living:
            if one.ready_ns > at_ns:  # it came later, in somebody's place
                continue
            view = next(filter(victim.is_left_out, one.views), None)
            if view is None:
                continue
            against = self._evidence_against(one, life)
            found = [evidence.at_ns for evidence in against if evidence.at_ns >= at_ns]
            # A view is dated by the turn that installs it, evidence by its own instant, later in that turn perhaps.
            suspected += [min(*found, view.installed_at_ns)] if found else []
            agreed.append(view.installed_at_ns)
            # Who learnt it from the others has no evidence of its own: it dropped the rank with the view.
            detected.append(min([*found, view.installed_at_ns]))
            in_view = (step.end_ns for step in one.steps if step.round_number >= view.first_round and not step.lost_on)
            good += [min(in_view, default=0)]
        last = (_since_ms(at_ns, [end for end in ends if end]) for ends in (detected, agreed, good))
        return Times(_since_ms(at_ns, [min(suspected)] if suspected else []), *last)

    def _evidence_against(self, one: RankStory, life: Life | None) -> list[EvidenceTold]:
        return [told for told in one.evidence if told.kind != "left" and self.accused(one, told) == life]

    def fault_line(self, told: FaultStory) -> dict[str, Any]:
        victim, times = self.lost_life(told), self.times(told)
        kinds: dict[str, int] = {}
        for one in self.living:
            for evidence in self._evidence_against(one, victim):
                kinds[evidence.kind] = kinds.get(evidence.kind, 0) + 1
        return {
            "fault": str(told.fault),
            "kind": told.fault.kind,
            "rank": told.fault.rank,
            "peer": told.fault.peer,
            "step": told.fault.step,
            "phase": told.fault.armed_phase,
            "happened": told.happened,
            "evicted": None if victim is None else victim[0],
            "evidence": kinds,
            "suspect_ms": times.suspect_ms,
            "detect_ms": times.detect_ms,
            "agree_ms": times.agree_ms,
            "first_good_step_ms": times.first_good_step_ms,
            "back_ms": self._back_ms(told),
            "longest_step_ms": self._longest_step_ms(told),
        }

    def _back_ms(self, told: FaultStory) -> float | None:
        """From the start of a newcomer's way in to its first step."""
        newcomer = self.story.life_of(told.fault)
        if told.fault.kind != "rejoin" or told.at_ns is None or newcomer is None or not newcomer.ready_ns:
            return None
        return _since_ms(told.at_ns, [newcomer.ready_ns])

    def _longest_step_ms(self, told: FaultStory) -> float | None:
        """What a newcomer cost: the longest step of those who were in, from its knocking to the first one with it."""
        newcomer = self.story.life_of(told.fault)
        if self._back_ms(told) is None or newcomer is None or not newcomer.views:
            return None
        members = [one for one in self.living if not one.joined]
        steps = [step for one in members for step in one.steps if step.round_number <= newcomer.views[0].first_round]
        took = [step.latency_us / 1000 for step in steps if step.end_ns >= (told.at_ns or 0)]
        return max(took, default=None)

    # -- promises ----------------------------------------------------------------------------------------------------

    def _false_suspicions(self) -> Iterator[str]:
        accused = set()
        for one in self.story.lives:
            for evidence in one.evidence:
                if evidence.kind != "left" and not self._justified(one, evidence):
                    accused.add(self.accused(one, evidence))
                    yield f"rank {one.rank} suspected rank {evidence.rank} ({evidence.kind}), which was well"
        gone = {self._name(one) for one in self.story.ranks if one.rank in self.evicted and one.views}
        for life in sorted((gone | self.left_out) - self.hit - accused):
            evicted = self._named(life)
            if evicted is not None and evicted.state != FAILED:
                yield f"rank {evicted.rank} was evicted, and no fault had struck it"

    def _justified(self, accuser: RankStory, evidence: EvidenceTold) -> bool:
        life = self.accused(accuser, evidence)
        one = self._named(life)
        if evidence.kind == "exit" and one and one.state in (FAILED, EVICTED, SUSPENDED) and not one.ended_by_drill:
            return True  # it did end, for a reason that is judged elsewhere
        return any(self._explains(told, accuser.rank, life, evidence.at_ns) for told in self.happened)

    def _explains(self, told: FaultStory, accuser: int, accused: Life, found_at_ns: int) -> bool:
        at_ns, fault = self.struck_at_ns(told), told.fault
        if at_ns is None or found_at_ns < at_ns:
            return False
        if fault.kind == "cut":  # the link stays cut, whoever comes back at an end of it
            return {accuser, accused[0]} == set(fault.ranks)
        if fault.kind not in STRIKES or accused not in fault.lives:
            return False
        return fault.kind == "kill" or told.woken_ns is None or found_at_ns <= told.woken_ns + WAKING_NS

    def _lost_between_live_ranks(self) -> int:
        """Choices that one rank lost on another although neither was struck: a fault costs nobody else's rows."""
        well = {self._name(one) for one in self.story.lives if self._name(one) not in self.hit and one.state != FAILED}
        return sum(
            count
            for one in self.story.lives
            for step in one.steps
            for rank, count in step.lost_on.items()
            if self._name(one) in well and self._life_at(one, step.round_number, rank) in well
        )

    def _life_at(self, one: RankStory, round_number: int, rank: int) -> Life | None:
        """Which life of ``rank`` stood in the view in which ``one`` ran that round."""
        views = [view for view in one.views if view.first_round <= round_number] or one.views[:1]
        return self._life_in(max(views, key=lambda view: view.epoch), rank) if views else None

    def problems(self) -> list[str]:
        """Every promise that did not hold, in sentences."""
        return [
            *self._rank_problems(),
            *self._fault_problems(),
            *self.false_suspicions,
            *self._total_problems(),
        ]

    def _rank_problems(self) -> Iterator[str]:
        yield from self.story.stuck
        for one in self.story.ranks:
            if one.state == FAILED:
                yield f"rank {one.rank} failed: {_last_line(one.why) or 'no reason told'}"
            elif one.state == SUSPENDED and not (self._name(one) in self.hit and one.rank in self.evicted):
                # A rank that is cut off from all who decided cannot learn that they did: it may only stop by itself.
                yield f"rank {one.rank} could not go on: {one.why}"
            elif one.rank in self.survivors and (one.state != FINISHED or not one.ended_well):
                yield f"rank {one.rank} is in the last view and ended as {one.state} in step {one.next_step}"
            elif one.state == FINISHED and one.rank not in self.survivors and not self._cut_at_the_end(one.rank):
                yield f"rank {one.rank} completed its steps although the last view is without it"
            elif one.state == EVICTED and not one.ended_well:
                yield f"rank {one.rank} was evicted and did not end by itself"
            if self.last_view and one in self.living and one.epoch != self.last_view.epoch:
                yield f"rank {one.rank} never came to epoch {self.last_view.epoch}"

        for one in self.story.former:
            if one.state == FAILED or (one.state == EVICTED and not one.ended_well):
                yield f"a former rank {one.rank} ended as {one.state}: {_last_line(one.why) or 'no reason told'}"

    def _cut_at_the_end(self, rank: int) -> bool:
        """Cut off in the last step: it may never hear that the others decided, and has nothing left to do."""
        cuts = [one.fault for one in self.happened if one.fault.kind == "cut" and rank in one.fault.ranks]
        return any(fault.step == self.drill.steps - 1 for fault in cuts)

    def _fault_problems(self) -> Iterator[str]:
        for told in self.story.faults:
            fault = told.fault
            gone = [life for life in fault.lives if life in self.left_out]
            if fault.kind == "rejoin":
                yield from self._rejoin_problems(told)
            elif not told.happened:
                yield f"the fault '{fault}' did not happen"
            elif not gone and self._must_go(told):
                yield f"nobody was evicted for the fault '{fault}'"
            elif gone and self._must_stay(told):
                what = "a stop of" if fault.kind == "stop" else "being late by"
                yield f"rank {fault.rank} was evicted for {what} {fault.duration_ms} ms"
            elif len(gone) > 1 and not any(self._explained_otherwise(told, life) for life in gone):
                yield f"one cut link cost two ranks: {fault.rank} and {fault.peer}"
            elif fault.kind in ("stop", "slow") and gone and not self._was_told_so(told):
                yield f"rank {fault.rank} was evicted and woken, and did not end with RankEvictedError"

    def _was_told_so(self, told: FaultStory) -> bool:
        """Or killed before it could be."""
        one = self.story.life_of(told.fault)
        was_killed = self._explained_otherwise(told, told.fault.lives[0], ("kill",))
        return one is not None and (one.state == EVICTED or was_killed)

    def _rejoin_problems(self, told: FaultStory) -> Iterator[str]:
        fault = told.fault
        if not told.happened:
            yield f"rank {fault.rank} did not come back ('{fault}')"
        elif fault.rank not in self.survivors and fault.lives[0] not in self.hit:
            yield f"rank {fault.rank} came back ('{fault}') and is not in the last view"

    def _explained_otherwise(self, told: FaultStory, life: Life, kinds: Sequence[str] = STRIKES) -> bool:
        others = (other.fault for other in self.happened if other is not told)
        return any(life in fault.lives and fault.kind in kinds for fault in others)

    def _must_go(self, told: FaultStory) -> bool:
        duration_ms = told.fault.duration_ms
        if duration_ms is None:
            return True
        victim = self.story.life_of(told.fault)
        # A stop from outside may fall behind the rank's last signal, and then nobody waits for it.
        ended = [step.step for step in victim.steps if step.end_ns < (told.at_ns or 0)] if victim else []
        done = max(ended, default=-1) + 1
        needed = told.fault.kind == "slow" or told.fault.armed_phase is not None or done < self.drill.steps - 1
        # Silence counts from when somebody waits, and who waits for one of several may come to the next only once the
        # first is given up: each may take the whole time anew (membership.md).
        num_together = sum(one.fault.kind == told.fault.kind for one in self.happened)
        patience_ms = max(CERTAIN_GO, num_together) * self._patience_ms(told)
        return needed and self._others_are_a_quorum() and duration_ms > patience_ms + GO_MARGIN_MS

    def _patience_ms(self, told: FaultStory) -> int:
        """How long the others bear with it: a slow rank beats all the while."""
        return self.drill.stall_ms if told.fault.kind == "slow" else self.drill.silence_ms

    def _others_are_a_quorum(self) -> bool:
        """Whether those whom no fault hit may decide alone: otherwise they wait for the stopped ones to wake."""
        killed = {one.fault.rank for one in self.happened if one.fault.kind == "kill"}
        members = set(range(self.drill.ranks)) - killed
        well = members - {rank for rank, _ in self.hit}
        return 2 * len(well) > len(members) or (2 * len(well) == len(members) and min(members) in well)

    def _must_stay(self, told: FaultStory) -> bool:
        duration_ms = told.fault.duration_ms
        short = duration_ms is not None and duration_ms <= CERTAIN_STAY * self._patience_ms(told)
        return short and not self._explained_otherwise(told, told.fault.lives[0])

    def _total_problems(self) -> Iterator[str]:
        if self.last_view is None:
            yield "no rank told of a view: the group was never built"
        elif not self.views_agree:
            yield "ranks installed different views for one epoch"
        if self.corrupt_rows:
            yield f"{self.corrupt_rows} received rows are corrupt"
        if not self.accounting_exact:
            yield from self._inexact()
        if self.lost_between_live_ranks:
            yield f"{self.lost_between_live_ranks} choices were lost between ranks that no fault struck"
        num_steps = self.drill.steps - self.drill.first_step
        if self.steps_completed < num_steps:
            yield f"only {self.steps_completed} of {num_steps} steps were completed by all survivors"
        if self.story.leftovers:
            yield f"shared memory was left behind: {', '.join(self.story.leftovers[:4])}"

    def _inexact(self) -> Iterator[str]:
        wrong = [one for one in self.story.lives if not all(step.exact for step in one.steps)]
        yield from (f"rank {one.rank}, {one.why}" for one in wrong)
        if not wrong:
            yield "no step was completed, so nothing was accounted for"


def _since_ms(at_ns: int, ends_ns: list[int]) -> float | None:
    return round((max(ends_ns) - at_ns) / 1e6, 3) if ends_ns else None


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else ""
