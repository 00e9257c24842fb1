"""Runs several drills in one process: importing torch takes longer than a small drill. A line of JSON for each.

Used as a command, since a drill forks and so wants a process with one thread:
``python -m tests.drills '[["--ranks", "4", "--kill", "1@10"], ...]'``
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Four ranks, eight experts; about half a second.
SMALL = ["--ranks", "4", "--steps", "20", "--tokens", "8", "--hidden", "64", "--experts", "8", "--topk", "2"]


def run_drills(drills: list[list[str]], timeout_s: float = 120) -> list[dict[str, Any]]:
    """The answer of each drill, with its exit code as ``"exit_code"``. All run the test build."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.drills", json.dumps(drills)],
        cwd=ROOT,
        env={**os.environ, "FAULT_A2A_CORE": "hooks", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if len(lines) != 2 * len(drills):
        raise AssertionError(f"{len(lines)} lines for {len(drills)} drills, exit code {done.returncode}: {done.stderr}")
    answers = [json.loads(line) for line in lines[::2]]
    return [{**answer, "exit_code": int(code)} for answer, code in zip(answers, lines[1::2], strict=True)]


def main() -> None:
    from fault_a2a.cli.main import main as fault_a2a

    for drill in json.loads(sys.argv[1]):
        code = fault_a2a(["drill", "--json", *drill])
        print(code, flush=True)


if __name__ == "__main__":
    main()
