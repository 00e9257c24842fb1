"""Times the fault path: from a real fault to the first suspicion, the agreed view, and the first good step after it.

Groups of real processes (fault-a2a drill), one a run. `exit` is SIGKILL and `stop` SIGSTOP from outside, at an instant
that the seed draws; `cut` loses everything between two ranks; `slow` makes the experts of a rank late by more than
stall_ms while its process goes on beating. Every promise of the drill is checked in every run: one that does not hold
has no times, and the run is red. `python -m benchmarks.fault_path --runs 50 --out` is the whole table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    __package__ = "benchmarks"

from fault_a2a.cli.words import append_record, whole_number, whole_numbers, words

from .fault_path_report import PARTS, as_line, as_markdown, draw
from .machine import ROOT, where_and_when
from .options import add_output_options
from .spread import spread
from .teams import check_can_fork, in_a_fork, resolve_names_locally

RECORD = ROOT / "benchmarks" / "results" / "fault_path.jsonl"
KINDS = ("exit", "stop", "cut", "slow")
# Enough steps before the fault to be warm, enough after it for every rank's first whole one.
FAULT_STEP, NUM_STEPS = 8, 13
# Shorter than the defaults, which a run would only wait for: silence and stall are found when their timeout is over.
TIMEOUTS_MS = {"silence_ms": 500, "stall_ms": 1000, "link_ms": 1000, "settle_ms": 50}
_BEYOND_DOUBT = 2.2  # of its timeout lasts a stop, and is a slow rank late
_INSTANTS_US = 2500  # a rank, over which faults from outside are spread: more than a step of so many ranks takes
_RUNS_A_FORK = 25
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Cell:
    """One line of the table: what happens to how many of how many ranks."""

    kind: str
    num_victims: int
    num_ranks: int

    @property
    def impossible(self) -> str:
        """Why it cannot be measured; empty if it can."""
        survivors = self.num_ranks - self.num_victims
        if self.kind == "cut" and 2 * self.num_victims > self.num_ranks:
            return f"{self.num_victims} links without a common end need {2 * self.num_victims} ranks"
        if survivors < 1:
            return "nobody would be left"
        if self.kind == "stop" and 2 * survivors < self.num_ranks:
            return "those who are left are no quorum: a stopped rank is not proven dead, so they wait for it"
        if self.kind == "stop" and 2 * survivors == self.num_ranks:
            return "half of a group is a quorum only with rank 0 in it, and who is stopped is drawn"
        if self.kind == "slow" and 2 * survivors <= self.num_ranks:
            return "half of the group would accuse the other half, and no verdict can tell which of them is ill"
        return ""

    def faults(self, seed: int, run: int) -> dict[str, list[str]]:
        """In the words of the drill's options; the same for the same (cell, seed, run)."""
        chance = random.Random(f"{seed} {self.kind} {self.num_victims} {self.num_ranks} {run}")
        if self.kind == "cut":
            ends = chance.sample(range(self.num_ranks), 2 * self.num_victims)
            pairs = zip(ends[::2], ends[1::2], strict=True)
            return {"cut": [f"{one}-{other}@{FAULT_STEP}" for one, other in pairs]}
        victims = chance.sample(range(self.num_ranks), self.num_victims)
        after_us = chance.randrange(self.num_ranks * _INSTANTS_US)
        if self.kind == "exit":
            return {"kill": [f"{rank}@{FAULT_STEP}+{after_us}" for rank in victims]}
        if self.kind == "stop":
            stop_ms = int(_BEYOND_DOUBT * TIMEOUTS_MS["silence_ms"]) + 500
            return {"stop": [f"{rank}@{FAULT_STEP}+{after_us}:{stop_ms}" for rank in victims]}
        late_ms = int(_BEYOND_DOUBT * TIMEOUTS_MS["stall_ms"])
        return {"slow": [f"{rank}@{FAULT_STEP}:{late_ms}" for rank in victims]}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fault_path.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kinds", type=words(*KINDS), default=list(KINDS), help=f"comma-separated, of {', '.join(KINDS)}; default all"
    )
    parser.add_argument(
        "--victims", type=whole_numbers, default="1,2,3", help="how many at once, comma-separated (default 1,2,3)"
    )
    parser.add_argument(
        "--ranks", type=whole_numbers, default="4,8,16", help="sizes of the group, comma-separated (default 4,8,16)"
    )
    parser.add_argument("--runs", type=whole_number, default=50, help="of each line (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of victims and instants (default 0)")
    parser.add_argument("--markdown", metavar="FILE", help="write the lines as a table")
    parser.add_argument("--plot", metavar="FILE", help="draw the distributions (.svg, .png or .pdf; needs matplotlib)")
    parser.add_argument("--render", metavar="FILE", help="measure nothing: table and picture of what --out wrote there")
    add_output_options(parser, RECORD)
    arguments = parser.parse_args(argv)
    try:
        arguments.cells = _cells(arguments)
        if arguments.plot:
            from fault_a2a.cli.pictures import check_picture

            check_picture("--plot", arguments.plot)
        arguments.rendered = _read(arguments.render) if arguments.render else None
    except ValueError as error:
        parser.error(str(error))
    return arguments


def _cells(arguments: argparse.Namespace) -> list[Cell]:
    if max(arguments.ranks) > 32:
        raise ValueError(f"--ranks {max(arguments.ranks)}: the drill's layer has 32 experts; give at most 32 ranks")
    cells = [Cell(*one) for one in itertools.product(arguments.kinds, arguments.victims, arguments.ranks)]
    if all(cell.impossible for cell in cells):
        raise ValueError(f"--victims, --ranks: {cells[0].impossible}; give more ranks or fewer victims")
    return cells


def _read(path: str) -> list[dict[str, Any]]:
    try:
        records = [json.loads(line) for line in Path(path).read_text().splitlines() if line]
    except (OSError, ValueError) as error:
        raise ValueError(f"--render {path}: {error}; name a file that --out wrote") from None
    if not records or any(record.get("benchmark") != "fault_path" for record in records):
        raise ValueError(f"--render {path}: it holds no records of this benchmark; name a file that --out wrote")
    newest = {(KINDS.index(one["kind"]), one["num_victims"], one["num_ranks"]): one for one in records}
    return [newest[key] for key in sorted(newest)]


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(cell: Cell, num_runs: int, seed: int) -> dict[str, Any]:
    """The record of one line: its spread, every sample, and what did not hold."""
    began = where_and_when()
    loads = [began["load_average"][0]]
    runs: list[dict[str, Any]] = []
    for first in range(0, num_runs, _RUNS_A_FORK):
        numbers = range(first, min(first + _RUNS_A_FORK, num_runs))
        # In a process of its own: which core the ranks run is settled when it is first imported.
        runs += in_a_fork(partial(_run, cell, seed, numbers))
        loads.append(round(os.getloadavg()[0], 2))
    held = [run for run in runs if not run["problems"]]
    samples = {part: [run[part] for run in held] for part in PARTS}
    evidence: dict[str, int] = {}
    for run in held:
        for kind, count in run["evidence"].items():
            evidence[kind] = evidence.get(kind, 0) + count
    return {
        "benchmark": "fault_path",
        "ok": len(held) == num_runs,
        **began,
        "load_average_least": min(loads),
        "load_average_most": max(loads),
        **asdict(cell),
        "core": "hooks" if cell.kind == "cut" else "production",
        "timeouts_ms": TIMEOUTS_MS,
        "seed": seed,
        "runs": num_runs,
        "held": len(held),
        "shape": runs[0]["shape"],
        "spread": {part: asdict(spread(values)) for part, values in samples.items() if values},
        "samples": samples,
        "evidence": evidence,
        "failures": [{"faults": run["faults"], "problems": run["problems"]} for run in runs if run["problems"]],
    }


def _run(cell: Cell, seed: int, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Some runs of one line, one group after the other, from a process that may import the package."""
    os.environ.update(dict.fromkeys(_THREADS, "1"))  # before numpy: a process with a second thread may not fork
    os.environ["FAULT_A2A_CORE"] = "hooks" if cell.kind == "cut" else ""
    from fault_a2a.cli.drill.command import prepare
    from fault_a2a.cli.drill.faults import parse_faults
    from fault_a2a.cli.drill.options import Drill
    from fault_a2a.cli.drill.parent import conduct
    from fault_a2a.cli.drill.report import report
    from fault_a2a.cli.drill.screen import Silent

    # Every answer is judged behind the last step: an engine has no judge that takes its processors between two steps.
    drill = Drill(ranks=cell.num_ranks, steps=NUM_STEPS, judge_later=NUM_STEPS, seed=seed, **TIMEOUTS_MS)
    work, _ = prepare(drill)
    shape = {name: getattr(drill, name) for name in ("tokens", "hidden", "experts", "topk", "dtype", "steps")}
    results = []
    for number in numbers:
        texts = cell.faults(seed, number)
        faults = parse_faults(**texts, num_ranks=cell.num_ranks, num_steps=NUM_STEPS)
        struck = replace(work, drill=replace(drill, faults=tuple(faults)))
        answer = report(struck.drill, conduct(struck, Silent()))
        results.append({"shape": shape, "faults": [str(fault) for fault in faults], **_kept(answer, cell)})
    return results


def _kept(answer: dict[str, Any], cell: Cell) -> dict[str, Any]:
    """Of a drill's report: the times of its worst fault, and what is wrong with it."""
    kept: dict[str, Any] = {part: answer[part] for part in PARTS if part != "step_ms"}
    kept["step_ms"] = answer["step_ms"]["median"] if answer["step_ms"] else None
    problems = list(answer["problems"])
    if len(answer["evicted"]) != cell.num_victims:
        problems.append(f"{len(answer['evicted'])} ranks were evicted, not {cell.num_victims}")
    problems += [f"there is no {part}" for part in PARTS if kept[part] is None]
    kept["problems"] = problems
    kept["evidence"] = {}
    for line in answer["faults"]:
        for kind, count in line["evidence"].items():
            kept["evidence"][kind] = kept["evidence"].get(kind, 0) + count
    return kept


def run_all(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record after the other, written as soon as it is there: an interrupted run keeps what it has measured."""
    for cell in arguments.cells:
        if cell.impossible:
            continue
        record = measure(cell, arguments.runs, arguments.seed)
        record["command"] = " ".join(["python -m benchmarks.fault_path", *sys.argv[1:]])
        if arguments.out:
            append_record(arguments.out, record)
        yield record


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    not_run = [{**asdict(cell), "why": cell.impossible} for cell in arguments.cells if cell.impossible]
    if arguments.rendered is not None:
        records = arguments.rendered
    else:
        check_can_fork()
        resolve_names_locally()
        records = []
        for record in run_all(arguments):
            records.append(record)
            if not arguments.json:
                print(as_line(record), flush=True)
    answer = {"benchmark": "fault_path", "ok": all(one["ok"] for one in records), "rows": records, "not_run": not_run}
    if arguments.json:
        print(json.dumps(answer))
    else:
        for one in not_run:
            print(f"not run: {one['kind']}, {one['num_victims']} of {one['num_ranks']} ranks: {one['why']}")
        print("OK: every promise held in every run" if answer["ok"] else "RED: a promise did not hold, see above")
    if arguments.markdown:
        Path(arguments.markdown).write_text(as_markdown(records))
    if arguments.plot:
        draw(records, arguments.plot)
    return 0 if answer["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
