"""Native programs that walk through agreement and whole rounds, compiled for tests: with all guards or without one."""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "native_programs"
WENT_WRONG = 3  # the exit code when a guard is out and is missed, or a promise was broken


@dataclass(frozen=True)
class Program:
    """What is compiled: patterns of sources, and options beside those that all share."""

    sources: tuple[str, ...]
    options: tuple[str, ...] = ()


PROGRAMS = {
    "ballots": Program(("tests/native/ballots.cpp", "csrc/host/hooks.cpp")),
    "agreement_schedules": Program(
        ("tests/native/agreement_schedules.cpp", "csrc/host/*.cpp", "csrc/membership/*.cpp")
    ),
    "join_schedules": Program(("tests/native/join_schedules.cpp", "csrc/host/*.cpp", "csrc/membership/*.cpp")),
    **{
        name: Program(
            (
                *(f"tests/native/{name}.cpp", "csrc/host/hooks.cpp", "csrc/membership/agreement.cpp"),
                *(f"csrc/membership/{part}.cpp" for part in ("consensus", "verdict", "vertex_cover", "host_cut")),
            )
        )
        for name in ("agreement_growth", "followed")
    },
    "doors": Program(("tests/native/doors.cpp", "csrc/host/door.cpp", "csrc/host/clock.cpp")),
    "detector": Program(("tests/native/detector.cpp", "csrc/host/hooks.cpp", "csrc/membership/detector.cpp")),
    # The simulator is its own host; everything above the host is what runs in production, but for the sums of rows.
    "simulate": Program(
        (
            *("tests/simulator/*.cpp", "csrc/host/hooks.cpp", "csrc/membership/*.cpp", "csrc/bindings/endpoint*.cpp"),
            "csrc/host/door.cpp",
            *(f"csrc/transport/{name}.cpp" for name in ("faulty", "local", "partition", "shm")),
            "csrc/transport/cuda_*.cpp",
            *(f"kernels/cpu/{name}.cpp" for name in ("combine", "dispatch", "expand", "machine", "quantize", "reduce")),
            *("kernels/cpu/stream.cpp", "kernels/cpu/collect*.cpp"),
            *("kernels/cuda/host/*.cpp", "kernels/cuda/twin/*.cpp"),  # never run here: an endpoint can have either
        ),
        ("-DFA2A_SIMULATED=1", "-DFA2A_MAX_RANKS=64", "-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"),
    ),
}


def _sources(program: Program) -> list[Path]:
    return [path for pattern in program.sources for path in sorted(ROOT.glob(pattern))]


def _is_stale(made: Path) -> bool:
    """Any header may be in any program, so all of them count. Seconds of looking would cost more than they save."""
    if not made.exists():
        return True
    folders = ("csrc", "kernels", "tests")
    newest = max(
        path.stat().st_mtime for folder in folders for path in (ROOT / folder).rglob("*.[ch]pp") if path.is_file()
    )
    return max(newest, Path(__file__).stat().st_mtime) > made.stat().st_mtime


def _units(program: Program) -> list[tuple[Path, ...]]:
    """What is compiled in one go: the sources of a folder, which read the same headers. The largest come first."""
    by_folder: dict[Path, list[Path]] = {}
    for source in _sources(program):
        by_folder.setdefault(source.parent, []).append(source)
    return sorted(map(tuple, by_folder.values()), key=len, reverse=True)


def _compile(program: Program, sources: tuple[Path, ...]) -> Path:
    """The object of some sources of one folder, which programs with the same options share."""
    folder = BUILD / "objects" / hashlib.sha256(repr((program.options, sources)).encode()).hexdigest()[:8]
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{sources[0].parent.relative_to(ROOT).as_posix().replace('/', '_')}.o"
    if not _is_stale(made):
        return made
    launcher = shlex.split(os.environ.get("CMAKE_CXX_COMPILER_LAUNCHER", ""))
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    options = ["-std=c++17", "-O2", "-DFA2A_TEST_HOOKS=1", f"-I{ROOT}", f"-I{ROOT / 'csrc'}", *program.options]
    unit = made.with_suffix(".cpp")
    unit.write_text("".join(f'#include "{source}"\n' for source in sources))
    compiled = made.with_suffix(f".{os.getpid()}")  # another run of the tests may be compiling the same
    command = [*launcher, compiler, *options, "-c", str(unit), "-o", str(compiled)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    compiled.replace(made)
    return made


@functools.cache
def program(name: str) -> Path:
    """Where it is; compiled when anything that may be in it has changed."""
    folder = BUILD / name
    binary = folder / name
    if not _is_stale(binary):
        return binary
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max_workers=2) as workers:
        made = list(workers.map(lambda unit: _compile(PROGRAMS[name], unit), _units(PROGRAMS[name])))
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    linked = folder / f"{name}.new"
    subprocess.run([compiler, *map(str, made), "-pthread", "-o", str(linked)], check=True, timeout=300)
    linked.replace(binary)  # another run of the tests may be using the old one
    return binary


def run(name: str, *arguments: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program(name)), *arguments], capture_output=True, text=True, timeout=timeout_s)
