"""tests/native/ballots.cpp as a program: every schedule of agreement, with all guards or without one of them."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("tests/native/ballots.cpp", "csrc/host/hooks.cpp")
TWO_VIEWS = 3  # the exit code


@functools.cache
def _program() -> tuple[tempfile.TemporaryDirectory, Path]:
    """Compiled once a session. The folder lives as long as the answer is kept."""
    folder = tempfile.TemporaryDirectory()
    program = Path(folder.name) / "ballots"
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    options = ["-std=c++17", "-O2", "-DFA2A_TEST_HOOKS=1", f"-I{ROOT}", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *options, *SOURCES, "-o", str(program)], cwd=ROOT, check=True, timeout=300)
    return folder, program


def explore(*arguments: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(_program()[1]), *arguments], capture_output=True, text=True, timeout=timeout_s)
