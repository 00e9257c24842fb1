"""fault-a2a soak --one-group: one group for the whole time, in which the same ranks die, are replaced, and die again.

It is a drill in episodes: each is judged by itself, and the next one begins with the processes, buffers, epochs and
incarnations that the one before has left. Whoever loses its place in an episode is replaced in it by a new process.
"""

from __future__ import annotations

import os
import random
import sys
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from fault_a2a.cli.soak import Soak

if TYPE_CHECKING:
    from fault_a2a.cli.drill.faults import Fault
    from fault_a2a.cli.drill.options import Drill
    from fault_a2a.cli.drill.story import Holdings, Story

STEPS = 64  # of an episode
# The library's default, not the 500 ms of fresh groups: it runs for hours beside whatever else a machine does, and two
# cores under a load of 20 let some processes stand for half a second while others run on.
SILENCE_MS = 2000
SHORT_MS = (50, 200, 800)
LONG_MS = 2 * SILENCE_MS
# From a kill at an instant on, the newcomer is due only so many steps later: the signal itself may be steps late.
_AFTER_INSTANT = 15
_AFTER_PHASE = 12


def group_options(seed: int, num_ranks: int) -> list[str]:
    """The options of ``fault-a2a drill`` for the group: the same for the same seed and size."""
    rng = random.Random(f"{seed} one group {num_ranks}")
    options = ["--ranks", str(num_ranks), "--steps", str(STEPS), "--seed", str(rng.randrange(1 << 30))]
    options += ["--silence-ms", str(SILENCE_MS), "--tokens", str(rng.choice([16, 64])), "--hidden", "256"]
    return options + (["--chunk-tokens", "4"] if rng.random() < 0.5 else [])


def witness(seed: int, num_ranks: int) -> int:
    """The rank that loses its place in no episode: what its process holds tells whether a long life grows."""
    return random.Random(f"{seed} witness {num_ranks}").randrange(num_ranks)


def episode_faults(seed: int, episode: int, num_ranks: int, phases: list[str]) -> dict[str, list[str]]:
    """What would be given to the drill's options in one episode, which begins with all ranks and shall end with all."""
    rng = random.Random(f"{seed} one group {num_ranks} {episode}")
    texts: dict[str, list[str]] = {"kill": [], "stop": [], "slow": [], "rejoin": []}
    others = [rank for rank in range(num_ranks) if rank != witness(seed, num_ranks)]
    victims = rng.sample(others, len(others))
    # Whoever is stopped proves nobody dead: the others must stay more than half of any view that may come.
    num_unproven = rng.randint(0, min((num_ranks - 1) // 4, 1))
    num_killed = rng.randint(0 if num_unproven else 1, max(num_ranks // 3, 1))
    for rank in victims[:num_killed]:
        step = episode * STEPS + rng.randrange(2, 20)
        step = _kill_and_replace(rng, texts, rank, step, phases)
        if rng.random() < 0.4:
            _kill_and_replace(rng, texts, rank, step + rng.randrange(1, 10), phases)
    for rank in victims[num_killed : num_killed + num_unproven]:
        _delay(rng, texts, rank, episode * STEPS + rng.randrange(2, 40))
    return texts


def _kill_and_replace(rng: random.Random, texts: dict[str, list[str]], rank: int, step: int, phases: list[str]) -> int:
    """Returns the step from which on the rank's next life is due."""
    if rng.random() < 0.7:
        where, due = f":{rng.choice(phases)}", step + rng.randrange(1, _AFTER_PHASE)
    else:
        where, due = f"+{rng.randrange(20_000)}", step + _AFTER_INSTANT
    texts["kill"].append(f"{rank}@{step}{where}")
    texts["rejoin"].append(f"{rank}@{due}")
    return due


def _delay(rng: random.Random, texts: dict[str, list[str]], rank: int, step: int) -> None:
    """A rank that stands still or is late, and keeps its place or not."""
    kind = rng.choice(["slow", "short", "long"])
    if kind == "slow":
        texts["slow"].append(f"{rank}@{step}:{rng.choice(SHORT_MS)}")
    else:
        texts["stop"].append(f"{rank}@{step}:{LONG_MS if kind == 'long' else rng.choice(SHORT_MS)}")
    if kind == "long":
        texts["rejoin"].append(f"{rank}@{step + rng.randrange(1, _AFTER_PHASE)}")


def run_group(seed: int, num_ranks: int, minutes: float, quiet: bool) -> dict[str, Any]:
    """The JSON of ``fault-a2a soak --one-group``. ``quiet``: nothing on stdout meanwhile."""
    from fault_a2a.cli.drill.command import ask_for_one_thread, prepare, terminated_like_interrupted
    from fault_a2a.cli.drill.options import CORE_VARIABLE, LateHelpParser, add_arguments, read_drill

    ask_for_one_thread()
    os.environ[CORE_VARIABLE] = "hooks"  # which core there is has to be known before the faults are
    parser = LateHelpParser()
    add_arguments(parser)
    soak = OneGroup(seed, num_ranks, 60 * minutes, read_drill(parser.parse_args(group_options(seed, num_ranks))), quiet)
    work, _ = prepare(soak.drill)

    from fault_a2a.cli.drill.parent import conduct
    from fault_a2a.cli.drill.screen import Silent

    try:
        with terminated_like_interrupted():
            story = conduct(work, Silent(), soak.next_episode)
        soak.take_last(story)
    except KeyboardInterrupt:
        pass
    return soak.report()


class OneGroup(Soak):
    """What was done to the group so far, and what came of it."""

    def __init__(self, seed: int, num_ranks: int, seconds: float, drill: Drill, quiet: bool) -> None:
        super().__init__(seed, num_ranks)
        self.deadline = self.began + seconds
        self.quiet = quiet
        self.witness = witness(seed, num_ranks)
        self.lives, self.last_epoch = num_ranks, 0
        self.held: list[Holdings] = []  # by the witness, after the first episode and after the newest
        self.drill = replace(drill, faults=tuple(self._faults(0)))

    def next_episode(self, story: Story) -> Drill | None:
        """Judges the one that is over. ``None``: it was the last one, and is judged when its processes have ended."""
        answer = self._judge(story)
        if not answer["ok"] or time.monotonic() >= self.deadline:
            return None
        self._take(answer, story)
        number = len(self.reports)
        faults = tuple(self._faults(number))
        self.drill = replace(self.drill, first_step=number * STEPS, steps=(number + 1) * STEPS, faults=faults)
        return self.drill

    def take_last(self, story: Story) -> None:
        """Of the group that has closed."""
        answer = self._judge(story)
        if not answer["ok"]:
            _tell_course(story)
        self._take(answer, story)
        self.problems += growth_problems(self.held, self.num_ranks, self.lives - self.num_ranks)

    def report(self) -> dict[str, Any]:
        """As of groups, and what only a long life has."""
        first, last = (asdict(self.held[at]) for at in (0, -1)) if self.held else (None, None)
        return super().report() | {
            "lives": self.lives,
            "last_epoch": self.last_epoch,
            "held": {"rank": self.witness, "first": first, "last": last},
        }

    def _faults(self, number: int) -> list[Fault]:
        from fault_a2a.cli.drill.faults import parse_faults
        from fault_a2a.core_fields import phases

        names = phases()
        texts = episode_faults(self.seed, number, self.num_ranks, list(names))
        return parse_faults(**texts, num_ranks=self.num_ranks, num_steps=(number + 1) * STEPS, phases=names)

    def _judge(self, story: Story) -> dict[str, Any]:
        from fault_a2a.cli.drill.report import report

        answer = report(self.drill, story)
        if missing := [rank for rank in range(self.num_ranks) if rank not in answer["survivors"]]:
            answer["problems"].append(f"ranks {missing} should be in, and are not")
        answer["ok"] = not answer["problems"]
        return answer

    def _take(self, answer: dict[str, Any], story: Story) -> None:
        self.lives += sum(line["happened"] for line in answer["faults"] if line["kind"] == "rejoin")
        epochs, self.last_epoch = answer["epochs"] - self.last_epoch, answer["epochs"]
        if (holdings := story.ranks[self.witness].holdings) is not None:
            self.held = [*self.held[:1], holdings]
        replay = f"fault-a2a soak --one-group --ranks {self.num_ranks} --seed {self.seed}"
        sentence = self.take(answer | {"epochs": epochs}, replay)
        if not self.quiet:
            print(f"{sentence} (epoch {self.last_epoch})", flush=True)


def _tell_course(story: Story) -> None:
    """On stderr, what each life saw of the episode in which something broke: no second run has the same course."""
    for one in sorted(story.lives, key=lambda one: (one.rank, one.ready_ns)):
        print(f"--- rank {one.rank}, in since {one.ready_ns}, {one.state} in step {one.next_step}", file=sys.stderr)
        seen = [(told.at_ns, f"{told.kind} of rank {told.rank}") for told in one.evidence]
        seen += [(view.installed_at_ns, f"epoch {view.epoch} with {view.active}: {view.reason}") for view in one.views]
        for at_ns, what in sorted(seen):
            print(f"    {at_ns} {what}", file=sys.stderr)
        if one.last_words.strip():
            print(one.last_words.strip()[-4000:], file=sys.stderr)
    for told in story.faults:
        print(f"--- '{told.fault}' at {told.at_ns}, woken {told.woken_ns}", file=sys.stderr)


def growth_problems(held: list[Holdings], num_ranks: int, num_replaced: int) -> list[str]:
    """What a process holds at the end and did not after its first episode, when lives had come and gone already."""
    if len(held) < 2:
        return []
    first, last = asdict(held[0]), asdict(held[-1])
    allowed = {name: slack + num_replaced * each for name, (slack, each) in _MAY_GROW.items()}
    allowed["files"] += num_ranks  # a partition that was made anew has its file open: its newcomer must find it
    return [
        f"the oldest process held {first[name]} {_WORDS[name]} after the first episode and {last[name]} in the end: "
        f"more than {allowed[name]:.0f} more after {num_replaced} replacements"
        for name in _MAY_GROW
        if last[name] > first[name] + allowed[name]
    ]


_WORDS = {"rss_kb": "kB of memory", "files": "open files", "threads": "threads", "mappings": "mappings"}
# (what may come and go, for each replacement): a leak is at least one for each of them, so a quarter tells it from
# chance.
_MAY_GROW = {"rss_kb": (16_384, 8.0), "files": (4, 0.25), "threads": (2, 0.25), "mappings": (32, 0.25)}
