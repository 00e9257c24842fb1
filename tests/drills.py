"""Runs several drills in a process of their own, which wants to be one with one thread, since a drill forks.

Forked from the server of tests/processes.py: importing torch takes longer than a small drill.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.processes import SERVER

ROOT = Path(__file__).resolve().parents[1]
# Four ranks, eight experts; about half a second.
SMALL = ["--ranks", "4", "--steps", "20", "--tokens", "8", "--hidden", "64", "--experts", "8", "--topk", "2"]


def run_drills(drills: list[list[str]], timeout_s: float = 120) -> list[dict[str, Any]]:
    """The answer of each drill, with its exit code as ``"exit_code"``. All run the test build."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        # The server has the environment that it was started with; a test may have changed this one since.
        process = SERVER.Process(target=_run, args=(drills, dict(os.environ), str(out), str(err)))
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"the drills did not end within {timeout_s} s: {err.read_text()}")
        lines = [line for line in out.read_text().splitlines() if line.strip()]
        if len(lines) != 2 * len(drills):
            words = f"{len(lines)} lines for {len(drills)} drills, exit code {process.exitcode}"
            raise AssertionError(f"{words}: {err.read_text()}")
    answers = [json.loads(line) for line in lines[::2]]
    return [{**answer, "exit_code": int(code)} for answer, code in zip(answers, lines[1::2], strict=True)]


def _run(drills: list[list[str]], environment: dict[str, str], out: str, err: str) -> None:
    import torch

    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
    from fault_a2a.cli.main import main as fault_a2a

    for drill in drills:
        code = fault_a2a(["drill", "--json", *drill])
        print(code, flush=True)
    sys.stderr.flush()
    os._exit(0)
