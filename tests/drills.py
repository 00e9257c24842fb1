"""Runs several drills in a process of their own, which wants to be one with one thread, since a drill forks."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from tests.apart import completed

ROOT = Path(__file__).resolve().parents[1]
# Four ranks, eight experts; about half a second.
SMALL = ["--ranks", "4", "--steps", "20", "--tokens", "8", "--hidden", "64", "--experts", "8", "--topk", "2"]


def run_drills(drills: list[list[str]], timeout_s: float = 120) -> list[dict[str, Any]]:
    """The answer of each drill, with its exit code as ``"exit_code"``. All run the test build."""
    done = completed(partial(_run, drills), timeout_s)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if len(lines) != 2 * len(drills):
        words = f"{len(lines)} lines for {len(drills)} drills, exit code {done.returncode}"
        raise AssertionError(f"{words}: {done.stderr}")
    answers = [json.loads(line) for line in lines[::2]]
    return [{**answer, "exit_code": int(code)} for answer, code in zip(answers, lines[1::2], strict=True)]


def _run(drills: list[list[str]]) -> None:
    from fault_a2a.cli.main import main as fault_a2a

    for drill in drills:
        code = fault_a2a(["drill", "--json", *drill])
        print(code, flush=True)
