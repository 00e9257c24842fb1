"""make prove: the full counts behind docs/measured.md. Seeded and resumable: what is in the record is not run again."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "prove.jsonl"
MEASURED = ROOT / "docs" / "measured.md"
BEGIN, END = "<!-- prove: begin -->", "<!-- prove: end -->"
DRILL_TIMEOUT_S = 180


@dataclass(frozen=True)
class Job:
    """``count`` runs of one claim; run ``i`` follows from the job's name and ``i`` alone."""

    name: str
    claim: str
    count: int
    run: Callable[[int], dict[str, Any]]


def drill(*options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "fault_a2a", "drill", "--json", *options]
    # The hooks core in the parent too, so that its list of phases is the one the ranks have.
    done = subprocess.run(command, capture_output=True, text=True, timeout=DRILL_TIMEOUT_S, cwd=ROOT, check=False)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        return {"ok": False, "problems": [f"exit {done.returncode}: {done.stderr[-500:]}"]}
    kept = ("ok", "problems", "detect_ms", "agree_ms", "first_good_step_ms", "corrupt_rows", "false_suspicions")
    back = [line for line in report["faults"] if line["back_ms"] is not None]
    joins = {key: line[key] for line in back for key in ("back_ms", "longest_step_ms")}
    joins["median_step_ms"] = report["step_ms"]["median"]
    last = {"survivors": report["survivors"], "steps": report["steps_completed"]}
    return {key: report[key] for key in kept} | last | joins


def scenario(wrong: list[str]) -> dict[str, Any]:
    return {"ok": not wrong, "problems": wrong[:5]}


def phases() -> list[str]:
    import fault_a2a

    return fault_a2a.phases()


def at_phase(seed: int) -> dict[str, Any]:
    names = phases()
    return drill(
        "--ranks", "8", "--steps", "40", "--seed", str(seed), "--kill", f"{seed % 8}@20:{names[seed % len(names)]}"
    )


def at_instant(seed: int) -> dict[str, Any]:
    # A step takes some 20 to 60 ms here; instants over the first 50 ms, in an order without pattern.
    offset_us = (seed * 7919) % 50_000
    return drill("--ranks", "8", "--steps", "40", "--seed", str(seed), "--kill", f"{seed % 8}@20+{offset_us}")


def evictions(seed: int) -> dict[str, Any]:
    from tests.scenarios import evictions as run

    wrong, num_evictions = run(seed, two_open=seed % 2 == 0)
    return scenario(wrong) | {"evictions": num_evictions}


def prefill(seed: int, *backends: str) -> dict[str, Any]:
    from tests.test_streams import prefill_death

    try:
        prefill_death(seed, backends or ("cpu",))
    except AssertionError as error:
        return scenario([str(error)[:500]])
    return scenario([])


def collective(seed: int) -> dict[str, Any]:
    from tests.collective_scenarios import deaths

    return scenario(deaths(seed))


def cascade(seed: int) -> dict[str, Any]:
    from tests.process_scenarios import no_cascade

    return scenario(no_cascade(1, seed, action="stop" if seed % 4 == 3 else "kill"))


def accuser(seed: int) -> dict[str, Any]:
    from tests.accuser_scenarios import accuses_everybody

    return scenario(accuses_everybody(seed))


def serial_accuser(seed: int) -> dict[str, Any]:
    from tests.accuser_scenarios import accuses_one_after_another

    return scenario(accuses_one_after_another(seed))


def zombie(seed: int) -> dict[str, Any]:
    from tests.join_scenarios import zombie as run

    return scenario(run(seed, num_spare_partitions=seed % 2))


def death_on_the_way(seed: int) -> dict[str, Any]:
    from tests.join_scenarios import dies_while_one_joins

    return scenario(dies_while_one_joins((4, 0, 3)[seed % 3], seed=seed))


def join_schedules(seed: int) -> dict[str, Any]:
    from tests.ballots import run

    walked = run("join_schedules", "1000", str(1 + 1000 * seed))
    return scenario([walked.stdout] if walked.returncode else [])


def story(seed: int) -> dict[str, Any]:
    """Two kills, a stop, a cut, and one who comes back."""
    faults = ("--kill", "0@50", "--kill", "5@50", "--stop", "2@120:6000", "--cut", "4-6@200", "--rejoin", "0@300")
    return drill("--ranks", "8", "--steps", "400", *faults, "--seed", str(seed))


NUM_E4M3_RUNS = 16


def e4m3(seed: int) -> dict[str, Any]:
    """The cast of one sixteenth of all float32 patterns."""
    from tests.test_fp8 import differing_casts

    num_patterns = (1 << 32) // NUM_E4M3_RUNS
    wrong = differing_casts(seed * num_patterns, num_patterns)
    return scenario(wrong) | {"patterns": num_patterns}


def jobs() -> list[Job]:
    main_job = ("--ranks", "8", "--steps", "200", "--kill", "3@50")
    stopped = ("--ranks", "8", "--steps", "200", "--stop", "3@50:4000", "--silence-ms", "500")
    return [
        Job(
            "drill", "`drill --ranks 8 --steps 200 --kill 3@50`", 50, lambda seed: drill(*main_job, "--seed", str(seed))
        ),
        Job("phase", "a kill at every phase, every rank in turn, 8 ranks", 32, at_phase),
        Job("instant", "a kill at a random instant from outside, 8 ranks", 200, at_instant),
        Job("rank0", "rank 0 is killed", 5, lambda seed: drill(*main_job[:-1], "0@50", "--seed", str(seed))),
        Job(
            "two",
            "two ranks killed in one step",
            5,
            lambda seed: drill(*main_job, "--kill", "5@50", "--seed", str(seed)),
        ),
        Job("stop", "`--stop 3@50:4000 --silence-ms 500`", 5, lambda seed: drill(*stopped, "--seed", str(seed))),
        Job("cut", "`--cut 2-5@20 --silence-ms 500`", 5, cut),
        Job("cascade", "no cascade: compute of 0 to several silence timeouts of 100 ms", 200, cascade),
        Job(
            "prefill", "a death at every chunk position of a stream of 8,192 tokens, every third time two", 48, prefill
        ),
        Job(
            "prefill_kinds",
            "the same, every other rank on the CUDA kernels' twin",
            48,
            lambda seed: prefill(seed, "cuda-host", "cpu"),
        ),
        Job(
            "collective",
            "one or two deaths anywhere in small collectives: one answer on all who go on",
            200,
            collective,
        ),
        Job("evictions", "free-running ranks, two open rounds, deaths until two are left (6 each)", 84, evictions),
        Job("accuser", "a rank of 8 that accuses all others: it goes, and nobody with it", 100, accuser),
        Job("serial_accuser", "one that accuses one after another: at most one goes with it", 100, serial_accuser),
        Job("zombie", "stopped in mid-row, replaced, woken while the new one sends, every row checked", 100, zombie),
        Job("joins", "six joins in a row, in each a member, the proposer or the newcomer dies", 30, death_on_the_way),
        Job("schedules", "lives begin and end on 1,000 seeded schedules of the agreement", 50, join_schedules),
        Job("story", "`--kill 0@50 --kill 5@50 --stop 2@120:6000 --cut 4-6@200 --rejoin 0@300`", 5, story),
        Job("e4m3", "the cast to e4m3 of all 2^32 float32 patterns is torch's (2^28 each)", NUM_E4M3_RUNS, e4m3),
    ]


def cut(seed: int) -> dict[str, Any]:
    return drill("--ranks", "8", "--steps", "60", "--cut", "2-5@20", "--silence-ms", "500", "--seed", str(seed))


def read_record(record: Path = RECORD) -> list[dict[str, Any]]:
    if not record.exists():
        return []
    return [json.loads(line) for line in record.read_text().splitlines() if line]


def missing(job: Job, rows: list[dict[str, Any]]) -> Iterator[int]:
    done = {row["seed"] for row in rows if row["job"] == job.name}
    return (seed for seed in range(job.count) if seed not in done)


def run_job(job: Job, rows: list[dict[str, Any]], deadline: float) -> bool:
    """Runs what is missing; returns whether everything it ran held."""
    held = True
    for seed in missing(job, rows):
        if time.monotonic() > deadline:
            break
        started = time.monotonic()
        try:
            result = job.run(seed)
        except Exception as error:  # it is a result too, and the next seeds are not its fault
            result = {"ok": False, "problems": [str(error)[-500:]]}
        row = {"job": job.name, "seed": seed, **result, "seconds": round(time.monotonic() - started, 2)}
        row |= {"load": os.getloadavg()[0], "date": datetime.now(UTC).date().isoformat(), "commit": commit()}
        held &= bool(result["ok"])
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        with RECORD.open("a") as record:
            record.write(json.dumps(row) + "\n")
        rows.append(row)
        print(f"{job.name} {seed + 1}/{job.count}: {'ok' if result['ok'] else result['problems']}", flush=True)
    return held


def forget(chosen: list[Job], rows: list[dict[str, Any]], record: Path = RECORD) -> list[dict[str, Any]]:
    """The record without what other commits showed of these jobs: numbers of old code say nothing of new code."""
    names, this = {job.name for job in chosen}, commit()
    kept = [row for row in rows if row["job"] not in names or row["commit"] == this]
    record.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return kept


def commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return found.stdout.strip() or "unknown"


def spread(rows: list[dict[str, Any]], key: str) -> str:
    values = sorted(row[key] for row in rows if row.get(key) is not None)
    if not values:
        return "-"
    p90 = values[min(len(values) - 1, (9 * len(values)) // 10)]
    return f"{statistics.median(values):.2f} / {p90:.2f} / {values[-1]:.1f}"


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}. "
        "Times in ms: median / p90 / worst.",
        "",
        "| claim | runs | held | detect | agree | first good step | load average | dates | commits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for job in jobs():
        mine = [row for row in rows if row["job"] == job.name]
        if not mine:
            lines.append(f"| {job.claim} | 0 of {job.count} | not run yet | - | - | - | - | - | - |")
            continue
        loads = [row["load"] for row in mine]
        dates = sorted({row["date"] for row in mine})
        commits = ", ".join(sorted({row["commit"] for row in mine}))
        times = " | ".join(spread(mine, key) for key in ("detect_ms", "agree_ms", "first_good_step_ms"))
        lines.append(
            f"| {job.claim} | {len(mine)} of {job.count} | {sum(row['ok'] for row in mine)} | {times} "
            f"| {min(loads):.1f} to {max(loads):.1f} | {dates[0]} to {dates[-1]} | {commits} |"
        )
    return "\n".join(lines)


def write_measured(rows: list[dict[str, Any]]) -> None:
    text = MEASURED.read_text()
    before, rest = text.split(BEGIN)
    MEASURED.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.prove", description=__doc__)
    parser.add_argument("--only", action="append", help="a job's name; may be given again")
    parser.add_argument("--again", action="store_true", help="forget what other commits than this one showed")
    parser.add_argument(
        "--minutes", type=float, default=24 * 60, help="stop after about so long; the next call goes on"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("FAULT_A2A_CORE", "hooks")
    rows, deadline, held = read_record(), time.monotonic() + 60 * arguments.minutes, True
    chosen = [job for job in jobs() if not arguments.only or job.name in arguments.only]
    if not chosen:
        parser.error(f"--only: give one of {', '.join(job.name for job in jobs())}")
    if arguments.again:
        rows = forget(chosen, rows)
    for job in chosen:
        held &= run_job(job, rows, deadline)
    write_measured(rows)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
