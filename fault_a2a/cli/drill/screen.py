"""What a person sees of a drill: a live table on a terminal, plain lines in a pipe, and at the end a story."""

from __future__ import annotations

import shutil
import statistics
import textwrap
from typing import Any, TextIO

from fault_a2a.cli.drill.options import Drill
from fault_a2a.cli.drill.story import RUNNING, STARTING, RankStory, Story

REFRESH_NS = 100_000_000
MAX_ROWS = 32  # more ranks than that do not fit on a screen
MAX_EVENTS = 8
MAX_WIDTH = 100
_NUM_PLAIN_LINES = 10  # of progress, in a whole drill
_SLOW_NS = 300_000_000  # a rank that was silent for so long is shown as waiting


class Silent:
    """For --json."""

    live = False

    def say(self, sentence: str, now_ns: int) -> None:
        """Nothing."""

    def refresh(self, story: Story, now_ns: int) -> None:
        """Nothing."""


class Plain:
    """Lines, for a pipe or a log: each event, and the progress now and then."""

    live = False

    def __init__(self, drill: Drill, out: TextIO, began_ns: int) -> None:
        self.drill, self.out, self.began_ns = drill, out, began_ns
        self._said_step = -1

    def say(self, sentence: str, now_ns: int) -> None:
        print(f"{(now_ns - self.began_ns) / 1e9:7.3f} s  {sentence}", file=self.out, flush=True)

    def refresh(self, story: Story, now_ns: int) -> None:
        running = [one for one in story.ranks if one.state == RUNNING]
        step = min((one.next_step for one in running), default=-1)
        every = max(self.drill.steps // _NUM_PLAIN_LINES, 1)
        if step <= self._said_step or (step // every == self._said_step // every and self._said_step >= 0):
            return
        self._said_step = step
        self.say(f"step {step} of {self.drill.steps}: {progress(running)}", now_ns)


class Live:
    """A table that is drawn again and again, with the newest events below it."""

    live = True

    def __init__(self, drill: Drill, out: TextIO, began_ns: int) -> None:
        self.drill, self.out, self.began_ns = drill, out, began_ns
        self._events: list[str] = []
        self._drawn_ns = 0
        self._num_drawn = 0

    def say(self, sentence: str, now_ns: int) -> None:
        self._events.append(f"{(now_ns - self.began_ns) / 1e9:7.3f} s  {sentence}")
        self._drawn_ns = 0

    def refresh(self, story: Story, now_ns: int) -> None:
        if now_ns - self._drawn_ns < REFRESH_NS:
            return
        self._drawn_ns = now_ns
        width = max(shutil.get_terminal_size().columns - 1, 20)
        events = [line for event in self._events for line in textwrap.wrap(event, width, subsequent_indent=" " * 11)]
        lines = [*table(self.drill, story, now_ns), "", *events[-MAX_EVENTS:]]
        up = f"\x1b[{self._num_drawn}F" if self._num_drawn else ""
        self.out.write(up + "".join(f"{line[:width]}\x1b[K\n" for line in lines) + "\x1b[J")
        self.out.flush()
        self._num_drawn = len(lines)


def progress(running: list[RankStory]) -> str:
    """The state of the ranks that are still at work, in one phrase."""
    latencies = [one.steps[-1].latency_us / 1000 for one in running if one.steps]
    took = f", a step takes {statistics.median(latencies):.1f} ms" if latencies else ""
    epochs = sorted({one.epoch for one in running})
    return f"{len(running)} ranks, epoch {'/'.join(map(str, epochs))}{took}"


def table(drill: Drill, story: Story, now_ns: int) -> list[str]:
    """One line a rank: step, latency, state, whom it suspects and why, epoch."""
    lines = [f"{'rank':>4}  {'step':>9}  {'latency':>9}  {'state':<12}  {'epoch':>5}  suspects"]
    for one in story.ranks[:MAX_ROWS]:
        took = f"{one.steps[-1].latency_us / 1000:.1f} ms" if one.steps else "-"
        at = f"{one.next_step}/{drill.steps}"
        lines.append(f"{one.rank:>4}  {at:>9}  {took:>9}  {_state(one, now_ns):<12}  {one.epoch:>5}  {_suspects(one)}")
    if len(story.ranks) > MAX_ROWS:
        lines.append(f"      and {len(story.ranks) - MAX_ROWS} more")
    return lines


def _state(one: RankStory, now_ns: int) -> str:
    silent_ns = now_ns - one.news_ns
    if one.state == RUNNING and one.news_ns and silent_ns > _SLOW_NS:
        return f"waits {silent_ns / 1e9:.1f} s"
    return one.state if one.state != STARTING else "starts"


def _suspects(one: RankStory) -> str:
    kinds = {evidence.rank: evidence.kind for evidence in one.evidence}
    return ", ".join(f"{rank} ({kinds.get(rank, 'told by others')})" for rank in one.suspects)


# -- the last screen -------------------------------------------------------------------------------------------------


def opening(drill: Drill, text_name: str) -> str:
    """What is about to happen."""
    faults = ", ".join(map(str, drill.faults)) or "none (try --kill 3@50)"
    return (
        f"{drill.ranks} processes run a mixture-of-experts layer over {text_name}: {drill.steps} steps, "
        f"{drill.tokens} tokens a rank and step, {drill.topk} of {drill.experts} experts a token. Faults: {faults}."
    )


def closing(drill: Drill, answer: dict[str, Any]) -> str:
    """What happened, for somebody who has never seen one of these, from the drill's JSON."""
    paragraphs = [_fault_text(drill, line, answer) for line in answer["faults"]]
    if not paragraphs:
        paragraphs = ["No fault was asked for, and none was injected."]
    paragraphs += [_steps_text(answer), _choices_text(answer), _truth_text(answer)]
    if answer["problems"]:
        listed = "".join(f"\n  - {problem}" for problem in answer["problems"])
        paragraphs.append(f"NOT OK, a promise did not hold:{listed}")
    else:
        paragraphs.append(f"OK: every promise held ({answer['seconds']:.1f} s).")
    width = min(shutil.get_terminal_size((MAX_WIDTH, 24)).columns, MAX_WIDTH)
    return "\n".join(_wrapped(line, width) for paragraph in paragraphs for line in paragraph.splitlines())


def _wrapped(line: str, width: int) -> str:
    return textwrap.fill(line, width, subsequent_indent="    " if line.startswith("  - ") else "")


def _fault_text(drill: Drill, line: dict[str, Any], answer: dict[str, Any]) -> str:
    rank, step = line["rank"], line["step"]
    if not line["happened"]:
        return f"The fault '{line['fault']}' did not happen."
    if line["kind"] == "rejoin":
        return (
            f"In step {step}, a new process asked to be rank {rank}; it came in at a step start, "
            f"{_ms(line['back_ms'])} later, and no other rank stopped for it."
        )
    where = _WHERE.get(line["phase"] or "", f"at {line['phase']}" if line["phase"] else "at some instant of the step")
    struck = {
        "kill": f"In step {step}, rank {rank} was killed (SIGKILL) {where}.",
        "stop": f"In step {step}, rank {rank} was stopped (SIGSTOP) {where}, and woken later.",
        "slow": f"In step {step}, the experts of rank {rank} were late.",
        "cut": f"From step {step} on, everything between ranks {rank} and {line['peer']} was lost.",
    }[line["kind"]]
    if line["evicted"] is None:
        return f"{struck} Nobody lost its place in the group for that."
    how = ", ".join(_NOTICED.get(kind, kind) for kind in line["evidence"]) or "the others told it"
    others = len(answer["survivors"])
    text = f"{struck} The other {others} noticed within {_ms(line['detect_ms'])} ({how})"
    text += f", agreed to go on without rank {line['evicted']} after {_ms(line['agree_ms'])}"
    if line["first_good_step_ms"] is not None:
        text += f", and all had finished a step without it after {_ms(line['first_good_step_ms'])}"
    woken = line["kind"] != "kill" and line["evicted"] is not None
    after = (
        f" Rank {line['evicted']} itself was told so (RankEvictedError), and changed nothing any more." if woken else ""
    )
    return text + "." + after


_WHERE = {
    "dispatch.half_signalled": "in the middle of an all-to-all, when half of the group could already read its rows",
}
_NOTICED = {
    "exit": "the operating system said that it was gone",
    "silence": "it had not shown for too long that it lives",
    "stall": "it lived and did not move on",
    "link": "its rows never came",
}


def _ms(value: float | None) -> str:
    return "an unknown time" if value is None else f"{value:,.1f} ms" if value < 10000 else f"{value / 1000:,.1f} s"


def _steps_text(answer: dict[str, Any]) -> str:
    survivors = " ".join(map(str, answer["survivors"]))
    took = answer["step_ms"]
    median = f", typically {took['median']:.1f} ms each" if took else ""
    return f"Ranks {survivors} completed {answer['steps_completed']} steps{median}."


def _choices_text(answer: dict[str, Any]) -> str:
    total, lost, unroutable = answer["choices_total"], answer["choices_lost"], answer["choices_unroutable"]
    if not lost and not unroutable:
        return f"All {total:,} choices of an expert were delivered."
    return (
        f"Of {total:,} choices of an expert, {total - lost - unroutable:,} were delivered; {lost:,} were lost in the "
        f"step of a fault, and {unroutable:,} could not be sent later because their expert was gone. "
        "The outcome of each step names every one of them."
    )


def _truth_text(answer: dict[str, Any]) -> str:
    exact = "every one is the same to the last bit" if answer["accounting_exact"] else "some are NOT the same"
    corrupt = (
        "no received row was corrupt" if not answer["corrupt_rows"] else f"{answer['corrupt_rows']:,} rows were CORRUPT"
    )
    wrong = answer["false_suspicions"]
    suspected = (
        "nobody who was well was suspected" if not wrong else f"{wrong} times somebody who was well was SUSPECTED"
    )
    agree = "all agreed on who is in" if answer["views_agree"] else "they did NOT agree on who is in"
    return f"Each output was computed again from what it said it had: {exact}; {corrupt}; {suspected}; {agree}."
