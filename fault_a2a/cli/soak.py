"""The command fault-a2a soak: random real faults on real processes, group after group, until the time is over.

Every episode is a drill of its own, with a group that begins whole: what one episode breaks, the next does not inherit.
What an episode does follows from the seed and its number alone, and the command that repeats it is in the report when
it breaks a promise. With --one-group all episodes are of one group (fault_a2a/cli/one_group.py).
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from types import FrameType
from typing import Any

EXIT_OK, EXIT_BROKEN = 0, 1
STEPS = 60
SILENCE_MS = 500
_PATIENCE_S = 300.0  # for one episode; a drill is bounded by itself
# From the report of an episode: how the soak's value follows from all of them.
_SUMS = (
    *("epochs", "steps_completed", "tokens_total", "choices_total", "choices_lost", "choices_unroutable"),
    *("choices_repaired", "corrupt_rows", "false_suspicions", "choices_lost_between_live_ranks"),
)
_WORST = ("detect_ms", "agree_ms", "first_good_step_ms")
_ALL = ("accounting_exact", "views_agree")
_KEPT = (*_SUMS, *_WORST, *_ALL, "survivors", "evicted")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fault-a2a soak``."""
    parser.epilog = (
        "Each episode is a drill with a fresh group of --ranks processes and random faults in it: SIGKILL at a phase "
        "or at an instant, a new process in the place of a killed one, SIGSTOP shorter or longer than the silence "
        "timeout, a cut link. With --one-group all happens to one group, in which whoever goes comes back as a new "
        "process and may go again. Ctrl-C ends it with a verdict on what was run. Exit 0 only when every promise held "
        "in every episode."
    )
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="how long (%(default)s)")
    parser.add_argument(
        "--ranks", type=int, default=8, metavar="N", help="processes of a group, 2 or more (%(default)s)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="of all faults (a new one, which is printed)")
    parser.add_argument(
        "--one-group", action="store_true", help="one group for the whole time, that replaces whoever dies"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, and nothing else")


def episode_options(seed: int, episode: int, num_ranks: int, phases: list[str]) -> list[str]:
    """The options of ``fault-a2a drill`` for one episode: the same for the same seed, number and size."""
    rng = random.Random(f"{seed} {episode} {num_ranks}")
    options = ["--ranks", str(num_ranks), "--steps", str(STEPS), "--seed", str(rng.randrange(1 << 30))]
    num_tokens = rng.choice([0, 3, 16, 64])
    options += ["--silence-ms", str(SILENCE_MS), "--tokens", str(num_tokens), "--hidden", "256"]
    if num_tokens > 4 and rng.random() < 0.5:
        options += ["--chunk-tokens", "4"]
    victims = rng.sample(range(num_ranks), num_ranks)
    # Stopped ranks and cut links prove nobody dead: the others must stay more than half of any view that may come.
    num_unproven = rng.randint(0, max((num_ranks - 1) // 4, 0))
    num_killed = rng.randint(0 if num_unproven else 1, max(num_ranks // 4, 1))
    for rank in victims[:num_killed]:
        step = rng.randrange(5, STEPS - 10)
        # With next to no tokens a rank may have no row to be killed at.
        where = f":{rng.choice(phases)}" if num_tokens > 4 and rng.random() < 0.7 else f"+{rng.randrange(20_000)}"
        options += ["--kill", f"{rank}@{step}{where}"]
        if step + 25 < STEPS and rng.random() < 0.5:
            options += ["--rejoin", f"{rank}@{step + 15}"]
    rest = victims[num_killed:]
    for index in range(num_unproven):
        step = rng.randrange(5, STEPS - 10)
        if rng.random() < 0.5 or len(rest) < 2 * (index + 1):
            duration_ms = rng.choice([50, 200, 3 * SILENCE_MS])
            options += ["--stop", f"{rest[index]}@{step}:{duration_ms}"]
        else:
            options += ["--cut", f"{rest[index]}-{rest[-1 - index]}@{step}"]
    return options


class _Ended(Exception):
    """Somebody has had enough."""


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Runs the soak of ``args``; returns the exit code."""
    if args.ranks < 2:
        parser.error(f"--ranks {args.ranks}: a group in which somebody fails has at least 2; pass 2 or more.")
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes}: pass how long it may last, for example 20.")
    seed = random.SystemRandom().randrange(1 << 31) if args.seed is None else args.seed
    if not args.json:
        groups = "one group" if args.one_group else "groups"
        print(f"soak of {groups} of {args.ranks} for {args.minutes:g} minutes, seed {seed}", flush=True)
    answer = _run_one_group(args, seed) if args.one_group else _run_groups(args, seed)
    print(json.dumps(answer) if args.json else closing(answer))
    return EXIT_OK if answer["ok"] else EXIT_BROKEN


def _run_one_group(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    from fault_a2a.cli.one_group import run_group

    return run_group(seed, args.ranks, args.minutes, quiet=args.json)


def _run_groups(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    from fault_a2a.core_fields import phases

    soak = Soak(seed, args.ranks)
    before = signal.signal(signal.SIGTERM, _end)
    try:
        deadline = time.monotonic() + 60 * args.minutes
        while time.monotonic() < deadline and not soak.problems:
            sentence = soak.run_episode(list(phases()))
            if not args.json:
                print(sentence, flush=True)
    except (KeyboardInterrupt, _Ended):
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
    return soak.report()


def _end(number: int, frame: FrameType | None) -> None:
    raise _Ended


class Soak:
    """What was run so far, and what came of it."""

    def __init__(self, seed: int, num_ranks: int) -> None:
        self.seed, self.num_ranks = seed, num_ranks
        self.reports: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.began = time.monotonic()

    def run_episode(self, phases: list[str]) -> str:
        """Runs the next episode; returns a line about it."""
        number = len(self.reports)
        options = episode_options(self.seed, number, self.num_ranks, phases)
        command = [sys.executable, "-m", "fault_a2a", "drill", "--json", *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                out, err = process.communicate(timeout=_PATIENCE_S)
            except BaseException:
                # The drill ends its own processes when it is told to end.
                process.terminate()
                process.communicate()
                raise
        replay = f"fault-a2a drill {' '.join(options)}"
        try:
            report = json.loads(out)
        except ValueError:
            self.problems.append(f"episode {number} ended with {process.returncode}: {err.strip()[-500:]} ({replay})")
            return self.problems[-1]
        return self.take(report, replay)

    def take(self, report: dict[str, Any], replay: str) -> str:
        """Adds the report of the next episode, which ``replay`` repeats; returns a line about it."""
        number = len(self.reports)
        # Not all of it: a soak may last for days.
        faults = [{key: fault[key] for key in ("kind", "happened")} for fault in report["faults"]]
        self.reports.append({key: report[key] for key in _KEPT} | {"faults": faults})
        if not report["ok"]:
            self.problems += [f"episode {number}: {problem} ({replay})" for problem in report["problems"]]
        what = ", ".join(fault["fault"] for fault in report["faults"]) or "nothing"
        return f"episode {number}: {what}: ranks {report['survivors']} are left, {'ok' if report['ok'] else 'BROKEN'}"

    def report(self) -> dict[str, Any]:
        """The JSON of ``fault-a2a soak``: the keys of a drill, over all episodes, and its own."""
        last = self.reports[-1] if self.reports else {"survivors": [], "evicted": []}
        happened = [fault for report in self.reports for fault in report["faults"] if fault["happened"]]
        if not self.reports and not self.problems:
            self.problems.append("no episode was finished; give it more minutes")
        answer: dict[str, Any] = {"ranks": self.num_ranks, "survivors": last["survivors"], "evicted": last["evicted"]}
        answer |= {key: sum(report[key] for report in self.reports) for key in _SUMS}
        for key in _WORST:
            answer[key] = max((report[key] for report in self.reports if report[key] is not None), default=None)
        answer |= {key: bool(self.reports) and all(report[key] for report in self.reports) for key in _ALL}
        return answer | {
            "bit_exact_with_healthy_run": None,
            "seed": self.seed,
            "episodes": len(self.reports),
            "faults_by_kind": dict(sorted(Counter(fault["kind"] for fault in happened).items())),
            "ok": not self.problems,
            "problems": self.problems,
            "seconds": round(time.monotonic() - self.began, 3),
        }


def closing(answer: dict[str, Any]) -> str:
    """The verdict as people read it."""
    faults = ", ".join(f"{number} of {kind}" for kind, number in answer["faults_by_kind"].items()) or "none"
    text = (
        f"{answer['episodes']} episodes in {answer['seconds']:.0f} s; faults: {faults}; corrupt rows "
        f"{answer['corrupt_rows']}, false suspicions {answer['false_suspicions']}."
    )
    if "lives" in answer:
        text += f" {answer['lives']} lives of {answer['ranks']} ranks, the last view in epoch {answer['last_epoch']}."
    if answer["ok"]:
        return f"{text}\nOK: every promise held (seed {answer['seed']})."
    return "\n".join([text, f"BROKEN (seed {answer['seed']}):", *answer["problems"]])
