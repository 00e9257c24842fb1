"""How many instructions a round takes in each core module, counted by valgrind's callgrind in a single process."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.teams import in_a_fork
from benchmarks.work import Shape

# Counting goes on while one of them is on the stack, so threads beside the kernels, and Python, are not counted.
_COUNTED = ("dispatch_send", "dispatch_receive", "combine_send", "combine_receive")
_TIMEOUT_S = 300


def module_file(name: str) -> Path | None:
    """The built module ``_C`` or ``_C_unchecked``; ``None`` if it is not built."""
    return next(iter(sorted((ROOT / "fault_a2a").glob(f"{name}.*so"))), None)


def count(shape: Shape, module: Path, num_rounds: int) -> float:
    """Instructions of one round (dispatch and combine) of one rank that holds all experts, all its tokens its own.

    The same on every run with the same module but for the moment at which a futex is asked, which one rank never does.

    Raises:
        RuntimeError: valgrind is missing, failed or counted nothing.
    """
    if shutil.which("valgrind") is None:
        raise RuntimeError("instructions are counted by valgrind: install it (Debian: apt-get install valgrind)")
    fields = in_a_fork(lambda: _fields(replace(shape, ranks=1)))
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                *("valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/callgrind.out"),
                *(f"--toggle-collect=fa2a::{verb}(fa2a::Context&, *" for verb in _COUNTED),
                *(sys.executable, str(Path(__file__).with_name("one_rank.py"))),
                *(str(module), str(num_rounds), json.dumps(fields)),
            ],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    found = re.search(r"Collected\s*:\s*(\d+)", done.stderr)
    if done.returncode != 0 or found is None or int(found[1]) == 0:
        raise RuntimeError(f"callgrind counted nothing (exit code {done.returncode}): {done.stderr[-500:]}")
    return int(found[1]) / num_rounds


def _fields(shape: Shape) -> dict[str, Any]:
    from fault_a2a.core_fields import core_fields

    return core_fields(shape.config(), shape.ranks, 0)
