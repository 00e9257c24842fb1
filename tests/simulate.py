"""make simulate: simulated schedules by the hundred thousand. Resumable: every mix goes on where its record ends.

The program is ``tests/simulator``; a schedule is a mix and a seed, and
``simulate --mix MIX --seed SEED`` runs it again.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
from datetime import UTC, datetime
from typing import Any

from tests.ballots import ROOT, WENT_WRONG, program, run
from tests.prove import commit, read_record

RECORD = ROOT / "benchmarks" / "results" / "simulation.jsonl"
MEASURED = ROOT / "docs" / "measured.md"
BEGIN, END = "<!-- simulate: begin -->", "<!-- simulate: end -->"
CHUNK_S = 20.0
SUMS = (
    *("schedules", "steps", "stores", "views", "faults", "delivered", "lost", "joined", "retired"),
    *("simulated_s", "ms"),
)


def mixes() -> list[str]:
    listed = run("simulate", "--list").stdout.splitlines()
    return [line.removeprefix("mix ") for line in listed if line.startswith("mix ")]


def next_seed(rows: list[dict[str, Any]], mix: str, first: int) -> int:
    return max((row["first_seed"] + row["schedules"] for row in rows if row["mix"] == mix), default=first)


def run_chunk(mix: str, seed: int, seconds: float) -> dict[str, Any] | None:
    """What was run; None after a violation, which is printed with what replays it."""
    options = ("--mix", mix, "--seed", str(seed), "--count", "1000000", "--seconds", f"{seconds:.1f}")
    done = run("simulate", *options, timeout_s=seconds + 120)
    if done.returncode == 0:
        return json.loads(done.stdout)
    print(done.stdout + done.stderr, flush=True)
    if done.returncode != WENT_WRONG:
        print(f"simulate {' '.join(options)} ended with {done.returncode}", flush=True)
    return None


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| mix | schedules | ms each | simulated s | stores landed | faults | views | lives begun | planned leaves "
        "| delivered | lost | commits |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for mix in [*mixes(), "all"]:
        mine = [row for row in rows if mix in ("all", row["mix"])]
        total = {key: sum(row.get(key, 0) for row in mine) for key in SUMS}
        each = total["ms"] / total["schedules"] if total["schedules"] else 0.0
        commits = ", ".join(dict.fromkeys(row["commit"] for row in mine))
        cells = [f"{total['schedules']:,}", f"{each:.2f}", f"{total['simulated_s']:,.0f}"]
        cells += [f"{total[key]:,}" for key in ("stores", "faults", "views", "joined", "retired", "delivered", "lost")]
        lines.append(f"| {mix} | {' | '.join(cells)} | {commits} |")
    return "\n".join(lines)


def write_measured(rows: list[dict[str, Any]]) -> None:
    before, rest = MEASURED.read_text().split(BEGIN)
    MEASURED.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.simulate", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0, help="stop after about so long")
    parser.add_argument("--mix", action="append", help="only this one; may be given again")
    parser.add_argument("--fresh", action="store_true", help="seeds that nobody has run, and no record")
    arguments = parser.parse_args()
    chosen = arguments.mix or mixes()
    if unknown := [mix for mix in chosen if mix not in mixes()]:
        parser.error(f"--mix: there is no {unknown[0]}; give one of {', '.join(mixes())}")
    rows = [] if arguments.fresh else read_record(RECORD)
    first = 1 + secrets.randbelow(1 << 40) if arguments.fresh else 1
    deadline, held, num_run, turn = time.monotonic() + 60 * arguments.minutes, True, 0, 0
    program("simulate")
    built_from = commit()  # what is committed meanwhile is not what runs
    if arguments.fresh:
        print(f"fresh seeds, from {first} on in every mix", flush=True)
    while time.monotonic() < deadline:
        # No mix is left out, however short the time is.
        mix = chosen[turn % len(chosen)]
        seconds = min(CHUNK_S, max(60 * arguments.minutes / len(chosen), 1.0), deadline - time.monotonic())
        turn += 1
        done = run_chunk(mix, next_seed(rows, mix, first), max(seconds, 0.5))
        if done is None:
            held = False
            break
        rows.append(done | {"date": datetime.now(UTC).date().isoformat(), "commit": built_from})
        num_run += done["schedules"]
        if not arguments.fresh:
            with RECORD.open("a") as record:
                record.write(json.dumps(rows[-1]) + "\n")
    print(f"{num_run:,} schedules of {len(chosen)} mixes, {'every promise held' if held else 'a promise was broken'}")
    if not arguments.fresh:
        write_measured(rows)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
