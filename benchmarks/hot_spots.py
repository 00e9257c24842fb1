"""Where the processors' time goes in a round: python -m benchmarks.hot_spots --help

Samples every rank's processor clock (Linux `perf record -e cpu-clock`) while a group of this library runs healthy
rounds of one shape. Its answers are checked before; while it samples nothing is checked, since that would be most of
it. A rank that sleeps is not sampled, so shares are of the time in which some rank ran. Symbols are sorted into what
they do; what the benchmark's own barrier needs is among Python's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    __package__ = "benchmarks"

import torch

from .machine import ROOT, where_and_when
from .options import add_output_options, add_shape_options, ask_library, run_benchmark, shape_of, whole_number
from .systems import FaultA2A
from .teams import WHOLE, Team, check_can_fork, resolve_names_locally
from .work import NUM_BATCHES, Shape

RECORD = ROOT / "benchmarks" / "results" / "hot_spots.jsonl"
_SAMPLES_PER_S = 999  # not 1000: what wakes every millisecond would be met always or never
_ATTACH_S = 1.0  # perf says nothing when it has begun
_NUM_SYMBOLS = 3  # of a part, listed
_SYMBOL_WIDTH = 50  # of what is printed; the record has the whole
# What a symbol does: the module it is in, and what its name has in it. The first line that fits counts.
PARTS = (
    ("rows moved past the caches: sent, expanded, returned", "_C", ("stream_lines",)),
    ("weighted sum at the owner", "_C", ("weighted_sum",)),
    ("bytes copied by the C library", "libc", ("memmove", "memcpy")),
    ("watching", "_C", ("Pulse::", "Detector::", "Agreement::", "Consensus::")),
    ("the rest of the native core", "_C", ("",)),
    ("the operating system", "[kernel", ("",)),
    ("Python, torch and the C library", "", ("",)),
)


class JudgedAtFirst(FaultA2A):
    """This library. Only the rounds in which the team checks it have answers, so that no other is compared."""

    num_judged = 0

    def trouble(self) -> str:
        self.num_judged += 1
        self.computes = self.num_judged <= NUM_BATCHES
        return super().trouble()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hot_spots.py", description=__doc__.splitlines()[0])
    add_shape_options(parser)
    parser.add_argument("--rounds", type=whole_number, default=300, help="sampled (default 300)")
    add_output_options(parser, RECORD)
    arguments = parser.parse_args(argv)
    if shutil.which("perf") is None:
        parser.error("there is no `perf` here: install it (Debian: apt-get install linux-perf)")
    try:
        arguments.library = ask_library(shape_of(arguments), num_teams=1)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def measure(arguments: argparse.Namespace, watch: Callable[[int], None]) -> dict[str, Any]:
    """The whole record of one run."""
    shape = shape_of(arguments)
    began = where_and_when()
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples"
        times = _sampled_rounds(shape, arguments.seed, arguments.rounds, samples)
        symbols = read_symbols(samples)
    return {
        "benchmark": "hot_spots",
        "ok": bool(symbols),
        **began,
        "load_average_after": [round(load, 2) for load in os.getloadavg()],
        "core": arguments.library.core,
        "shape": asdict(shape),
        "seed": arguments.seed,
        "num_rounds": len(times),
        "pair_us": round(sorted(times)[len(times) // 2], 1),
        "parts": sorted_into_parts(symbols),
    }


def _sampled_rounds(shape: Shape, seed: int, num_rounds: int, samples: Path) -> list[float]:
    """Their times in us; what perf met lies in ``samples`` then."""
    check_can_fork()
    resolve_names_locally()
    team = Team("fault_a2a", JudgedAtFirst, shape, seed)
    try:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        team.build(store.port, NUM_BATCHES)
        pids = ",".join(map(str, team.pids.values()))
        command = ["perf", "record", "-q", "-e", "cpu-clock", "-F", str(_SAMPLES_PER_S), "-p", pids, "-o", str(samples)]
        perf = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        time.sleep(_ATTACH_S)
        times = team.turn([WHOLE] * num_rounds)["pair"]
        perf.send_signal(signal.SIGINT)
        _, words = perf.communicate(timeout=60)
        if not samples.exists():
            raise RuntimeError(f"perf sampled nothing: {words.strip() or 'it said nothing'}")
        team.end()
        return times
    finally:
        team.kill()


def read_symbols(samples: Path) -> list[tuple[float, str, str]]:
    """(percent of the samples, module, symbol), as ``perf report`` has them."""
    fields = ["-F", "overhead,dso,symbol", "-t", "\t", "-g", "none", "--stdio"]
    done = subprocess.run(["perf", "report", "-i", str(samples), *fields], capture_output=True, text=True, check=True)
    symbols = []
    for line in done.stdout.splitlines():
        percent, *rest = (field.strip() for field in line.split("\t", 2))
        if line.startswith("#") or len(rest) < 2:
            continue
        module, symbol = rest
        symbols.append((float(percent.rstrip("%")), module, symbol.removeprefix("[.] ").removeprefix("[k] ")))
    return symbols


def sorted_into_parts(symbols: Sequence[tuple[float, str, str]]) -> list[dict[str, Any]]:
    """Every symbol in the first of ``PARTS`` that it fits; each part with its largest symbols, in percent."""
    parts: list[dict[str, Any]] = [{"part": name, "percent": 0.0, "symbols": {}} for name, _, _ in PARTS]
    for percent, module, symbol in sorted(symbols, reverse=True):
        where = next(
            at
            for at, (_, of, words) in enumerate(PARTS)
            if module.startswith(of) and any(word in symbol for word in words)
        )
        part = parts[where]
        part["percent"] += percent
        if len(part["symbols"]) < _NUM_SYMBOLS:
            part["symbols"][symbol] = percent
    for part in parts:
        part["percent"] = round(part["percent"], 1)
    return sorted(parts, key=lambda part: -part["percent"])


def as_text(record: dict[str, Any]) -> str:
    """The record as people read it."""
    shape = record["shape"]
    lines = [
        f"{shape['ranks']} ranks, {shape['tokens']} tokens a rank x {shape['hidden']} {shape['dtype']}, top-"
        f"{shape['topk']} of {shape['experts']} experts; {record['num_rounds']} rounds, median {record['pair_us']:.0f} "
        f"us; commit {record['commit']}, {record['date']}, load average {record['load_average'][0]} before, "
        f"{record['load_average_after'][0]} after",
    ]
    for part in record["parts"]:
        largest = ", ".join(f"{symbol[:_SYMBOL_WIDTH]} {percent:.1f}" for symbol, percent in part["symbols"].items())
        lines.append(f"{part['percent']:>6.1f} %  {part['part']}: {largest}")
    lines.append("OK" if record["ok"] else "RED: perf met no rank; may this process be sampled (perf_event_paranoid)?")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    command = ["benchmarks/hot_spots.py", *(sys.argv[1:] if argv is None else argv)]
    return run_benchmark(measure, as_text, arguments, ("round", arguments.rounds), command)


if __name__ == "__main__":
    sys.exit(main())
