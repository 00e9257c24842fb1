"""What safety costs a healthy round: python benchmarks/price.py --help

Three groups of processes of one shape take turns under one parent: the core with its guards and its pulse threads
(checked), the core without either (unchecked), and the checked one once more (control). Two cores cannot live in one
process, so each group loads its own after the fork. While a group runs, the others are stopped (SIGSTOP), pulse
threads included: otherwise the pulse of the checked group would slow the unchecked one down and hide its own price.
A pair is one turn of each, a second or less apart; the order within it is drawn, and no group has two turns in a row,
which would leave its rows in the cache.

The groups are forked anew for every block of pairs, in a drawn order: where a group's pages lie, and which processor
woke it first, stays with it while it lives and makes two groups of one core differ by as much as the price that is
looked for. So the interval draws blocks first and pairs within them second; drawing pairs alone takes that luck for a
fact. The price is the median over pairs of the ratio of their times; the control shows what the same ratio is when
there is nothing to find. Red only if the interval's lower bound is above the limit.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    __package__ = "benchmarks"

from .contest import run_contest
from .instructions import count, module_file
from .machine import ROOT, where_and_when
from .options import add_output_options, add_shape_options, ask_library, run_benchmark, shape_of, whole_number
from .spread import bootstrap_median, spread
from .systems import FaultA2A
from .teams import SETTLE, WHOLE, Team, in_a_fork
from .work import Shape

CHECKED, UNCHECKED, CONTROL = "checked", "unchecked", "control"
CORES = {CHECKED: "", UNCHECKED: "unchecked", CONTROL: ""}
MODULES = {CHECKED: "_C", UNCHECKED: "_C_unchecked"}
LIMIT_PERCENT = 1.0
NUM_COUNTED_ROUNDS = 10
Blocks = Sequence[Sequence[float]]  # the turns of each block
RECORD = ROOT / "benchmarks" / "results" / "price.jsonl"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="price.py", description=__doc__.splitlines()[0])
    add_shape_options(parser)
    parser.add_argument(
        "--pairs", type=whole_number, default=200, help="counted pairs of turns, over all blocks (default 200)"
    )
    parser.add_argument("--blocks", type=whole_number, default=10, help="so often the groups are forked (default 10)")
    parser.add_argument("--rounds", type=whole_number, default=3, help="counted rounds of a turn (default 3)")
    parser.add_argument("--warm-up", type=whole_number, default=2, help="pairs of a block not counted (default 2)")
    parser.add_argument("--no-instructions", action="store_true", help="do not count instructions under callgrind")
    add_output_options(parser, RECORD)
    arguments = parser.parse_args(argv)
    if arguments.pairs % arguments.blocks:
        parser.error(f"--pairs {arguments.pairs} is not a multiple of --blocks {arguments.blocks}: choose one that is")
    for name in MODULES.values():
        if module_file(name) is None:
            parser.error(
                f"fault_a2a/{name} is not built: run `CMAKE_ARGS=-DFA2A_BENCH_UNCHECKED=ON make build`, which builds "
                "both cores from the same sources"
            )
    try:
        arguments.library = ask_library(shape_of(arguments), num_teams=len(CORES), num_ours=len(CORES))
    except ValueError as error:
        parser.error(str(error))
    return arguments


def measure(arguments: argparse.Namespace, watch: Callable[[int], None]) -> dict[str, Any]:
    """The whole record of one run."""
    shape, began = shape_of(arguments), where_and_when()
    blocks = [in_a_fork(partial(_run_block, arguments, shape, block, watch)) for block in range(arguments.blocks)]
    record = {
        "benchmark": "price",
        **began,
        "load_average_after": [round(load, 2) for load in os.getloadavg()],
        "shape": asdict(shape),
        "seed": arguments.seed,
        "num_pairs": arguments.pairs,
        "num_blocks": arguments.blocks,
        "rounds_per_turn": arguments.rounds,
        "limit_percent": LIMIT_PERCENT,
        "failures": {name: failure for block in blocks for name, failure in block["failures"].items()},
    }
    record["versions"] = {"fault_a2a": arguments.library.version, **began["versions"]}
    if not record["failures"]:
        record |= _prices([block["pair_us"] for block in blocks], arguments)
    if not arguments.no_instructions:
        record["instructions"] = _instructions(shape)
    return record | {"ok": not record["failures"] and is_within(record["price_percent"])}


def is_within(price_percent: dict[str, float]) -> bool:
    """Red only when the measurement shows that the price is above the limit: noise makes the interval wide, not red."""
    return price_percent["low"] <= LIMIT_PERCENT


def _run_block(
    arguments: argparse.Namespace, shape: Shape, block: int, watch: Callable[[int], None]
) -> dict[str, dict[str, Any]]:
    """One set of groups, forked, timed and ended. In a process of its own, since every block's teams must be forked
    from one that has not imported the package."""
    num_pairs = arguments.pairs // arguments.blocks
    seed = arguments.seed + block
    names = random.Random(seed).sample(list(CORES), len(CORES))
    scores = run_contest(
        [partial(Team, name, FaultA2A, shape, seed, {"FAULT_A2A_CORE": CORES[name]}) for name in names],
        arguments.warm_up,
        num_pairs,
        orders=(SETTLE, *[WHOLE] * arguments.rounds),
        watch=lambda pair: watch(block * num_pairs + max(pair, 0)),
        shuffle_seed=seed,
    )
    return {
        "failures": {score.name: score.failure for score in scores if score.failure},
        "pair_us": {score.name: score.pair for score in scores},
    }


def _prices(blocks: Sequence[dict[str, list[float]]], arguments: argparse.Namespace) -> dict[str, Any]:
    times = {name: [block[name] for block in blocks] for name in CORES}
    turns = {name: [per_turn(block, arguments.rounds) for block in times[name]] for name in CORES}
    return {
        "pair_us": {name: round(spread([us for block in times[name] for us in block]).median, 1) for name in CORES},
        "price_percent": percent_above(turns[CHECKED], turns[UNCHECKED], arguments.seed),
        "control_percent": percent_above(turns[CONTROL], turns[CHECKED], arguments.seed),
        "block_price_percent": [
            percent_above([ours], [others], arguments.seed)["median"]
            for ours, others in zip(turns[CHECKED], turns[UNCHECKED], strict=True)
        ],
    }


def per_turn(times_us: Sequence[float], num_rounds: int) -> list[float]:
    """The sum of each turn's rounds."""
    return [sum(times_us[first : first + num_rounds]) for first in range(0, len(times_us), num_rounds)]


def percent_above(ours: Blocks, others: Blocks, seed: int) -> dict[str, float]:
    """By how many percent ``ours`` take longer, pair by pair: the median and its 95 % bootstrap interval."""
    ratios = [
        [one / other for one, other in zip(mine, theirs, strict=True)]
        for mine, theirs in zip(ours, others, strict=True)
    ]
    found = bootstrap_median(ratios, seed)
    return {key: round(100 * (value - 1), 3) for key, value in asdict(found).items()}


def _instructions(shape: Shape) -> dict[str, Any]:
    try:
        found = {name: round(count(shape, CORES[name], NUM_COUNTED_ROUNDS)) for name in MODULES}
    except RuntimeError as error:
        return {"failure": str(error)}
    return {**found, "percent_above": round(100 * (found[CHECKED] / found[UNCHECKED] - 1), 3)}


def as_text(record: dict[str, Any]) -> str:
    shape = record["shape"]
    lines = [
        f"{shape['ranks']} ranks, {shape['tokens']} tokens a rank x {shape['hidden']} {shape['dtype']}, top-"
        f"{shape['topk']} of {shape['experts']} experts; {record['num_pairs']} pairs of {record['rounds_per_turn']} "
        f"rounds in {record['num_blocks']} blocks; commit {record['commit']}, {record['date']}, load average "
        f"{record['load_average'][0]} before, "
        f"{record['load_average_after'][0]} after"
    ]
    lines += [f"{name} failed: {failure}" for name, failure in record["failures"].items()]
    if "pair_us" in record:
        times = ", ".join(f"{name} {us:.0f}" for name, us in record["pair_us"].items())
        lines.append(f"a round (dispatch and combine), median in us: {times}")
        for key, what in (("price_percent", "checks and pulse threads"), ("control_percent", "control, same core")):
            one = record[key]
            lines.append(f"{what}: {one['median']:+.2f} %, 95 % interval {one['low']:+.2f} to {one['high']:+.2f} %")
    counted = record.get("instructions", {})
    if "failure" in counted:
        lines.append(f"instructions were not counted: {counted['failure']}")
    elif counted:
        lines.append(
            f"instructions of a round in a single process (callgrind): checked {counted[CHECKED]}, unchecked "
            f"{counted[UNCHECKED]}: {counted['percent_above']:+.2f} %"
        )
    lines.append("OK" if record["ok"] else f"RED: failed, or the lower bound is above {record['limit_percent']:g} %")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    command = ["benchmarks/price.py", *(sys.argv[1:] if argv is None else argv)]
    return run_benchmark(measure, as_text, arguments, ("pair", arguments.pairs), command)


if __name__ == "__main__":
    sys.exit(main())
