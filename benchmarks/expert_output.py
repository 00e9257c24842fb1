"""What the memory that experts write into costs a round: python -m benchmarks.expert_output --help

Three groups of this library take turns, whose experts copy each row they received: into a new tensor
(`torch.empty_like(recv.x)`), into memory that the buffer lends (`buffer.empty_expert_output()`), and not at all, which
is what the other benchmarks time. The copy is the same in the first two; a round's time has the experts in it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    __package__ = "benchmarks"

from .contest import run_contest
from .machine import ROOT, where_and_when
from .mpi_team import team_of
from .options import add_output_options, add_shape_options, ask_library, run_benchmark, shape_of, whole_number
from .spread import bootstrap_median, spread
from .systems import FaultA2A, System
from .teams import SETTLE, WHOLE

RECORD = ROOT / "benchmarks" / "results" / "expert_output.jsonl"


class NewTensor(FaultA2A):
    """What is written first."""

    def combine(self, received: Any, handle: Any) -> torch.Tensor:
        y = self.output_for(received)
        ends = received.offsets.tolist()
        for expert, (first, last) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
            rows = slice(first, last) if self.shape.recv_format == "packed" else (expert, slice(last - first))
            y[rows] = received.x[rows]
        out, self.outcome = self.buffer.combine(y, handle)
        return out

    def output_for(self, received: Any) -> torch.Tensor:
        return torch.empty_like(received.x)


class LentOutput(NewTensor):
    """Into pages that earlier rounds have touched."""

    def output_for(self, received: Any) -> torch.Tensor:
        return self.buffer.empty_expert_output()


SYSTEMS: dict[str, type[System]] = {"new tensor": NewTensor, "lent output": LentOutput, "none": FaultA2A}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="expert_output.py", description=__doc__.splitlines()[0])
    add_shape_options(parser)
    parser.add_argument("--iterations", type=whole_number, default=100, help="counted turns of each (default 100)")
    add_output_options(parser, RECORD)
    arguments = parser.parse_args(argv)
    try:
        arguments.library = ask_library(shape_of(arguments), num_teams=len(SYSTEMS), num_ours=len(SYSTEMS))
    except ValueError as error:
        parser.error(str(error))
    return arguments


def measure(arguments: argparse.Namespace, watch: Callable[[int], None]) -> dict[str, Any]:
    """The whole record of one run; ``ratio``: of a round with a lent output to the same turn's with a new tensor."""
    shape = shape_of(arguments)
    began = where_and_when()
    scores = run_contest(
        [team_of(name.replace(" ", "-"), system, shape, arguments.seed) for name, system in SYSTEMS.items()],
        num_warm_up=3,
        num_iterations=arguments.iterations,
        orders=(SETTLE, WHOLE),
        watch=watch,
        shuffle_seed=arguments.seed,
    )
    rows = []
    for name, score in zip(SYSTEMS, scores, strict=True):
        times = {} if score.failure else {key: round(us, 1) for key, us in asdict(spread(score.pair)).items()}
        rows.append({"system": name, "correct": not score.failure, "failure": score.failure, "pair_us": times})
    new, lent = scores[0].pair, scores[1].pair
    ratio = (
        asdict(bootstrap_median([[b / a for a, b in zip(new, lent, strict=True)]], seed=0)) if new and lent else None
    )
    return {
        "benchmark": "expert_output",
        "ok": all(row["correct"] for row in rows),
        **began,
        "load_average_after": [round(load, 2) for load in os.getloadavg()],
        "shape": asdict(shape),
        "seed": arguments.seed,
        "num_iterations": arguments.iterations,
        "rows": rows,
        "ratio": ratio,
    }


def as_text(record: dict[str, Any]) -> str:
    shape, machine = record["shape"], record["machine"]
    lines = [
        f"{shape['ranks']} ranks, {shape['tokens']} tokens a rank x {shape['hidden']} {shape['dtype']}, "
        f"top-{shape['topk']} of {shape['experts']} experts, {shape['recv_format']}; {machine['num_cores']} cores of "
        f"{machine['cpu']}, commit {record['commit']}, {record['date']}; load average {record['load_average'][0]} "
        f"before, {record['load_average_after'][0]} after",
        "",
        f"{'experts write, pair in us':<26}{'median':>10}{'p25':>10}{'p75':>10}{'p95':>10}",
    ]
    for row in record["rows"]:
        times = "".join(f"{row['pair_us'][key]:>10.0f}" for key in ("median", "p25", "p75", "p95") if row["pair_us"])
        lines.append(f"{row['system']:<26}{times or 'no time: ' + row['failure']}")
    if record["ratio"]:
        low, median, high = (record["ratio"][key] for key in ("low", "median", "high"))
        lines += ["", f"lent output / new tensor, same turn: {median:.3f} (95 % interval {low:.3f} to {high:.3f})"]
    lines.append("OK: every answer was right" if record["ok"] else "RED: a system failed, see above")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    command = ["-m benchmarks.expert_output", *(sys.argv[1:] if argv is None else argv)]
    return run_benchmark(measure, as_text, arguments, ("turn", arguments.iterations), command)


if __name__ == "__main__":
    sys.exit(main())
