"""Native programs that walk through agreement, compiled for the tests: with all guards, or without one of them."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What each needs beside itself.
_MEMBERSHIP = ("csrc/host/*.cpp", "csrc/membership/*.cpp")
PROGRAMS = {
    "ballots": ("csrc/host/hooks.cpp",),
    "agreement_schedules": _MEMBERSHIP,
    "join_schedules": _MEMBERSHIP,
}
WENT_WRONG = 3  # the exit code when a guard is out and is missed


@functools.cache
def _program(name: str) -> tuple[tempfile.TemporaryDirectory, Path]:
    """Compiled once a session. The folder lives as long as the answer is kept."""
    folder = tempfile.TemporaryDirectory()
    program = Path(folder.name) / name
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    options = ["-std=c++17", "-O2", "-DFA2A_TEST_HOOKS=1", f"-I{ROOT}", f"-I{ROOT / 'csrc'}"]
    sources = [
        f"tests/native/{name}.cpp",
        *(str(path) for where in PROGRAMS[name] for path in sorted(ROOT.glob(where))),
    ]
    subprocess.run([compiler, *options, *sources, "-pthread", "-o", str(program)], cwd=ROOT, check=True, timeout=300)
    return folder, program


def run(name: str, *arguments: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(_program(name)[1]), *arguments], capture_output=True, text=True, timeout=timeout_s)
