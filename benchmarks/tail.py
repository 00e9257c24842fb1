"""The tail of a healthy step: p99, p99.9 and the worst of many, beside peers: python -m benchmarks.tail --help

A step is a dispatch and its combine without a barrier between them, timed and checked as in dispatch_combine.py.
Systems take turns of several hundred steps; the first one after waking is not counted. The default shape is small, so
that 100,000 steps of each system end within minutes, and has two ranks, so that a machine of two cores has one for
each: with more, the tail is that of the scheduler's queue.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    __package__ = "benchmarks"

from .contest import Score, run_contest
from .machine import ROOT, where_and_when
from .mpi_team import team_of
from .options import add_output_options, add_shape_options, ask_library, run_benchmark, shape_of, whole_number
from .peers import PEERS, chosen_peers
from .spread import percentile
from .systems import FaultA2A, System
from .teams import SETTLE, WHOLE

OURS = "fault_a2a"
RECORD = ROOT / "benchmarks" / "results" / "tail.jsonl"
PERCENTS = (50, 90, 99, 99.9, 99.99, 100)
_STEPS_A_TURN = 500
_BUCKETS_A_DOUBLING = 8  # of the histogram: two times in one bucket differ by less than 9 %


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tail.py", description=__doc__.splitlines()[0])
    add_shape_options(parser)
    parser.set_defaults(ranks=2, tokens=8, hidden=1024, topk=2, experts=8)
    for option in ("ranks", "tokens", "hidden", "topk", "experts"):
        action = next(action for action in parser._actions if action.dest == option)
        action.help = f"{str(action.help).split(' (default')[0]} (default {parser.get_default(option)})"
    parser.add_argument("--peers", default="gloo", help=f"comma-separated, of {', '.join(PEERS)}; default gloo")
    parser.add_argument("--steps", type=whole_number, default=100_000, help="counted, of each system (default 100000)")
    parser.add_argument("--plot", metavar="FILE", help="draw how many steps took longer than what (.svg, .png, .pdf)")
    add_output_options(parser, RECORD)
    arguments = parser.parse_args(argv)
    try:
        if arguments.plot:
            from fault_a2a.cli.pictures import check_picture

            check_picture("--plot", arguments.plot)
        arguments.peers = chosen_peers(arguments.peers)
        arguments.library = ask_library(shape_of(arguments), num_teams=1 + len(arguments.peers))
    except ValueError as error:
        parser.error(str(error))
    arguments.num_turns = math.ceil(arguments.steps / _STEPS_A_TURN)
    return arguments


def measure(arguments: argparse.Namespace, watch: Callable[[int], None]) -> dict[str, Any]:
    """The whole record of one run."""
    shape = shape_of(arguments)
    systems: dict[str, type[System]] = {OURS: FaultA2A, **{name: PEERS[name] for name in arguments.peers}}
    began = where_and_when()
    scores = run_contest(
        [team_of(name, system, shape, arguments.seed) for name, system in systems.items()],
        num_warm_up=1,
        num_iterations=arguments.num_turns,
        orders=(SETTLE, *[WHOLE] * min(_STEPS_A_TURN, arguments.steps)),
        watch=watch,
    )
    record = {
        "benchmark": "tail",
        "ok": not any(score.failure for score in scores),
        **began,
        "load_average_after": [round(load, 2) for load in os.getloadavg()],
        "shape": asdict(shape),
        "seed": arguments.seed,
        "steps_a_turn": min(_STEPS_A_TURN, arguments.steps),
        "rows": [_row(score, systems[score.name]) for score in scores],
    }
    if arguments.plot:
        draw(record, arguments.plot)
    return record


def _row(score: Score, system: type[System]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "system": score.name,
        "backend": system.backend,
        "correct": not score.failure,
        "failure": score.failure,
        "steps": len(score.pair),
    }
    times = {f"p{percent:g}_us": None for percent in PERCENTS}
    if score.failure:
        return row | times | {"histogram": []}
    times = {f"p{percent:g}_us": round(percentile(score.pair, percent), 1) for percent in PERCENTS}
    return row | times | {"histogram": histogram(score.pair)}


def histogram(times_us: Sequence[float]) -> list[tuple[float, int]]:
    """(upper end of a bucket in us, how many times are in it), by rising time; empty buckets are left out."""
    counts: dict[int, int] = {}
    for time_us in times_us:
        bucket = math.ceil(_BUCKETS_A_DOUBLING * math.log2(max(time_us, 1.0)))
        counts[bucket] = counts.get(bucket, 0) + 1
    return [(round(2 ** (bucket / _BUCKETS_A_DOUBLING), 1), counts[bucket]) for bucket in sorted(counts)]


def as_text(record: dict[str, Any]) -> str:
    """The percentiles of each system, under what they were measured on."""
    shape, machine = record["shape"], record["machine"]
    lines = [
        f"{shape['ranks']} ranks, {shape['tokens']} tokens a rank x {shape['hidden']} {shape['dtype']}, "
        f"top-{shape['topk']} of {shape['experts']} experts; {machine['num_cores']} cores of {machine['cpu']}, commit "
        f"{record['commit']}, {record['date']}; load average {record['load_average'][0]} before, "
        f"{record['load_average_after'][0]} after",
        "",
        f"{'a step, in us':<18}{'steps':>9}" + "".join(f"{_name_of(percent):>11}" for percent in PERCENTS),
    ]
    for row in record["rows"]:
        if row["failure"]:
            lines.append(f"{row['system']:<18}no time: {row['failure']}")
            continue
        times = "".join(f"{row[f'p{percent:g}_us']:>11.0f}" for percent in PERCENTS)
        lines.append(f"{row['system']:<18}{row['steps']:>9}{times}")
    lines.append("OK: every answer was right" if record["ok"] else "RED: a system failed, see above")
    return "\n".join(lines)


def _name_of(percent: float) -> str:
    return {50: "median", 100: "worst"}.get(percent, f"p{percent:g}")


def draw(record: dict[str, Any], file: str) -> None:
    """For each system the share of its steps that took longer than a time; both logarithmic."""
    from fault_a2a.cli import pictures

    figure, axis = pictures.pyplot().subplots(figsize=(8, 4.4), layout="constrained")
    for row in record["rows"]:
        longer, ends, shares = row["steps"], [], []
        for end_us, count in row["histogram"]:
            longer -= count
            ends.append(end_us)
            shares.append(longer / row["steps"])
        if ends:
            axis.step(ends[:-1], shares[:-1], where="post", linewidth=1.8, label=row["system"])
    axis.set_xscale("log")
    axis.set_yscale("log")
    for share, text in ((0.5, "median"), (0.01, "p99"), (0.001, "p99.9")):
        axis.axhline(share, color="#c9c9c9", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        axis.annotate(text, (1, share), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    shape = record["shape"]
    axis.set_xlabel("a step (dispatch and combine) took longer than, microseconds")
    axis.set_ylabel("share of the steps")
    axis.set_title(
        f"{record['rows'][0]['steps']:,} steps; {shape['ranks']} ranks, {shape['tokens']} x {shape['hidden']} "
        f"{shape['dtype']}, top-{shape['topk']}; load average {record['load_average'][0]} to "
        f"{record['load_average_after'][0]}",
        loc="left",
        fontsize=9.5,
    )
    axis.legend(frameon=False, loc="lower left")
    pictures.save(figure, file)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    command = ["-m benchmarks.tail", *(sys.argv[1:] if argv is None else argv)]
    return run_benchmark(measure, as_text, arguments, ("turn", arguments.num_turns), command)


if __name__ == "__main__":
    sys.exit(main())
