"""How many instructions a round takes in each core, counted by valgrind's callgrind in a single process."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from .machine import IMPORT_ROOT, PACKAGE, ROOT
from .work import Shape

# What is on the stack of one of them is counted: no thread beside the kernels, and no Python.
_COUNTED = ("dispatch_send", "dispatch_receive", "combine_send", "combine_receive")
_TIMEOUT_S = 300


def module_file(name: str) -> Path | None:
    """The built module ``_C`` or ``_C_unchecked``; ``None`` if it is not built."""
    return next(iter(sorted((ROOT / "fault_a2a").glob(f"{name}.*so"))), None)


def missing() -> str:
    """What this machine lacks for counting, and what to do; empty if nothing."""
    if shutil.which("valgrind") and shutil.which("callgrind_control"):
        return ""
    return "instructions are counted by valgrind: install it (Debian: apt-get install valgrind)"


def count(shape: Shape, core: str, num_rounds: int) -> float:
    """Instructions of one round (dispatch and combine) of one rank that holds all experts, all its tokens its own.

    Such a rank waits for nobody, so the number is the same on every run; what waiting costs is not in it.

    Args:
        core: the value of FAULT_A2A_CORE: "" or "unchecked".

    Raises:
        RuntimeError: valgrind is missing, failed or counted nothing.
    """
    if missing():
        raise RuntimeError(missing())
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *("valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/callgrind.out", "--instr-atstart=no"),
            *(f"--toggle-collect=fa2a::{verb}(fa2a::Context&, *" for verb in _COUNTED),
            *(sys.executable, "-m", f"{PACKAGE}.one_rank"),
            *(json.dumps(asdict(replace(shape, ranks=1))), str(num_rounds)),
        ]
        environment = {**os.environ, "FAULT_A2A_CORE": core, "PYTHONPATH": str(IMPORT_ROOT)}
        with (
            tempfile.TemporaryFile("w+") as words,
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                text=True,
                env=environment,
                cwd=ROOT,
            ) as process,
        ):
            said = _begin(process)
            try:
                said += process.communicate("\n", timeout=_TIMEOUT_S)[0]
            except subprocess.TimeoutExpired:
                process.kill()
            words.seek(0)
            report = words.read()
    found = re.search(r"Collected\s*:\s*(\d+)", report)
    if said.split() != ["ready", "right"] or found is None or int(found[1]) == 0:
        raise RuntimeError(f"callgrind counted nothing; the process said {said.split()}, valgrind {report[-500:]}")
    return int(found[1]) / num_rounds


def _begin(process: subprocess.Popen[str]) -> str:
    """Waits until the process is ready and turns the counting on; returns what it said."""
    assert process.stdout is not None
    said = process.stdout.readline()
    if said:
        command = ["callgrind_control", "--instr=on", str(process.pid)]
        subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False)
    return said
