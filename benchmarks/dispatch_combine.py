"""Times dispatch, combine and the pair beside peers that do equal work: python benchmarks/dispatch_combine.py --help

Processes on this host, one a rank; every round's answer is checked against fault_a2a.reference outside the timed part,
and a system that gives a wrong one has no time. Shapes of record: the defaults (decode: 128 tokens a rank of 7168
bfloat16, top-8 of 64 experts, 8 ranks), and --tokens 1024 --hidden 2048.
"""

from __future__ import annotations

import argparse
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
from .floor import FORMULA, floor_us, traffic
from .machine import ROOT, where_and_when
from .mpi_team import team_of
from .options import (
    Library,
    add_backend_option,
    add_output_options,
    add_shape_options,
    ask_library,
    run_benchmark,
    shape_of,
    whole_number,
)
from .peers import PEERS, chosen_peers
from .report import as_text
from .spread import spread
from .systems import Copy, FaultA2A, System, copied_bytes_per_round, ours
from .work import TOLERANCE, Shape

COPY = "memcpy"
RECORD = ROOT / "benchmarks" / "results" / "dispatch_combine.jsonl"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dispatch_combine.py", description=__doc__.splitlines()[0])
    add_shape_options(parser)
    add_backend_option(parser)
    parser.add_argument("--peers", default="gloo", help=f"comma-separated, of {', '.join(PEERS)}; default gloo")
    parser.add_argument("--iterations", type=whole_number, default=30, help="counted turns of each system (default 30)")
    parser.add_argument("--warm-up", type=whole_number, default=3, help="turns that are not counted (default 3)")
    add_output_options(parser, RECORD)
    arguments = parser.parse_args(argv)
    try:
        arguments.peers = chosen_peers(arguments.peers)
        num_teams = 1 + len(arguments.backends) + len(arguments.peers)
        library = ask_library(shape_of(arguments), num_teams, backends=arguments.backends)
        arguments.library, arguments.backends = library, library.backends
    except ValueError as error:
        parser.error(str(error))
    return arguments


def systems_of(arguments: argparse.Namespace) -> dict[str, type[System]]:
    """By name and in turn: this library with each backend, the peers, and the copy."""
    return {**ours(arguments.backends), **{name: PEERS[name] for name in arguments.peers}, COPY: Copy}


def measure(arguments: argparse.Namespace, watch: Callable[[int], None]) -> dict[str, Any]:
    """The whole record of one run."""
    shape = shape_of(arguments)
    systems = systems_of(arguments)
    began = where_and_when()
    scores = run_contest(
        [team_of(name, system, shape, arguments.seed) for name, system in systems.items()],
        arguments.warm_up,
        arguments.iterations,
        watch=watch,
    )
    return as_record(arguments, began, scores, systems)


def as_record(
    arguments: argparse.Namespace, began: dict[str, Any], scores: list[Score], systems: dict[str, type[System]]
) -> dict[str, Any]:
    """Of a contest that ``began`` then, the last of whose systems is the copy."""
    shape, library = shape_of(arguments), arguments.library
    record = {
        "benchmark": "dispatch_combine",
        "ok": not any(score.failure for score in scores),
        **began,
        "load_average_after": [round(load, 2) for load in os.getloadavg()],
        "shape": asdict(shape),
        "seed": arguments.seed,
        "num_iterations": arguments.iterations,
        "num_warm_up": arguments.warm_up,
        "tolerance_of_peers": TOLERANCE,
    }
    record["versions"] = {"fault_a2a": library.version, "core": library.core, **began["versions"]}
    *scores, copy_score = scores
    floor = _floor(shape, library, arguments.seed, copy_score)
    moved_bytes = floor["traffic"]["total_bytes"]
    rows = [_row(score, systems[score.name], shape, moved_bytes, floor["floor_us"]) for score in scores]
    for row in rows:
        row["emulated"] = row["backend"] in library.emulated
    return {**record, **floor, "rows": rows, "fastest_peer": _fastest_peer(rows, len(arguments.backends))}


def _floor(shape: Shape, library: Library, seed: int, copy_score: Score) -> dict[str, Any]:
    moved = traffic(shape, library.expert_rank, seed)
    if copy_score.failure:
        return {
            "bytes_formula": FORMULA,
            "traffic": {**asdict(moved), "total_bytes": moved.total_bytes},
            "copy_failure": copy_score.failure,
            "floor_us": None,
        }
    copied = copied_bytes_per_round(shape)
    rates = spread([copied / us * 1e6 for us in copy_score.pair])
    return {
        "bytes_formula": FORMULA,
        "traffic": {**asdict(moved), "total_bytes": moved.total_bytes},
        "copied_bytes_per_s": {"median": round(rates.median), "least": round(rates.least), "most": round(rates.most)},
        "floor_us": round(floor_us(moved.total_bytes, rates.median), 1),
    }


def _row(score: Score, system: type[System], shape: Shape, moved_bytes: int, lowest_us: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "system": score.name,
        "backend": system.backend,
        "num_ranks": shape.ranks,
        "num_tokens": shape.tokens,
        "hidden": shape.hidden,
        "num_topk": shape.topk,
        "dtype": shape.dtype,
        "dispatch_us": None,
        "combine_us": None,
        "pair_us": None,
        "p95_us": None,
        "num_experts": shape.experts,
        "recv_format": shape.recv_format if issubclass(system, FaultA2A) else "packed",
        "reduce": shape.reduce,
        "correct": not score.failure,
        "failure": score.failure,
        "moved_bytes": moved_bytes,
    }
    if score.failure:
        return row
    parts = {name: spread(getattr(score, name)) for name in ("dispatch", "combine", "pair")}
    row |= {f"{name}_us": round(part.median, 1) for name, part in parts.items()}
    row["p95_us"] = round(parts["pair"].p95, 1)
    row["spread_us"] = {
        name: {key: round(value, 1) for key, value in asdict(part).items()} for name, part in parts.items()
    }
    row["moved_bytes_per_s"] = round(moved_bytes / parts["pair"].median * 1e6)
    row["share_of_floor"] = round(lowest_us / parts["pair"].median, 3) if lowest_us else None
    return row


def _fastest_peer(rows: list[dict[str, Any]], num_ours: int) -> dict[str, Any] | None:
    """Which peer was fastest at the median, and how many times as long as ours (the first backend's) its pair took."""
    first, peers = rows[0], rows[num_ours:]
    timed = [row for row in peers if row["pair_us"]]
    if not timed or not first["pair_us"]:
        return None
    fastest = min(timed, key=lambda row: row["pair_us"])
    return {"system": fastest["system"], "times_ours": round(fastest["pair_us"] / first["pair_us"], 2)}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    command = ["benchmarks/dispatch_combine.py", *(sys.argv[1:] if argv is None else argv)]
    return run_benchmark(measure, as_text, arguments, ("turn", arguments.iterations), command)


if __name__ == "__main__":
    sys.exit(main())
