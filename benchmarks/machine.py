"""On what, with what and when something was measured."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = __package__  # benchmarks in a checkout, fault_a2a.benchmarks where it is installed
# What must be on the path for another Python to find that package.
IMPORT_ROOT = Path(str(sys.modules[PACKAGE.split(".")[0]].__file__)).resolve().parents[1]


def where_and_when() -> dict[str, Any]:
    """For the record of a measurement; take ``load_average`` again at its end."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "linux": platform.release()},
        "machine": {"cpu": cpu_name(), "num_cores": os.cpu_count(), "architecture": platform.machine()},
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def commit() -> str:
    """Short, with a plus if the tree holds what was never committed; "unknown" without git."""
    named = _git("rev-parse", "--short", "HEAD")
    if not named:
        return "unknown"
    return named + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def available_bytes() -> int:
    """Memory that can be had without swapping, as the kernel estimates it."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def shared_memory_bytes() -> int:
    """Room left in /dev/shm."""
    room = os.statvfs("/dev/shm")
    return room.f_bavail * room.f_frsize
