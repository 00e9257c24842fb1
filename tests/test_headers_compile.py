"""Every header of csrc/protocol compiles under g++, clang++, nvcc and NVRTC, and each stands on its own."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fault_a2a import nvrtc

CSRC = Path(__file__).resolve().parent.parent / "csrc"
HEADERS = sorted(path.relative_to(CSRC).as_posix() for path in (CSRC / "protocol").glob("*.hpp"))
ARCH = "sm_90a"
HOST_OPTIONS = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", f"-I{CSRC}")

Compile = Callable[[str, Path], str]
"""Takes a program and an empty folder; gives back what the compiler complains of, nothing when all is well."""


def _program(headers: list[str]) -> str:
    return "".join(f'#include "{header}"\n' for header in headers)


def _find(*names: str) -> str:
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"{names[0]} is not installed")
    return found


def _run(source: Path, program: str, *command: str) -> str:
    source.write_text(program)
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, cwd=source.parent, timeout=120)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def gcc(program: str, folder: Path) -> str:
    # Inline functions that nobody calls are compiled all the same.
    return _run(folder / "program.cpp", program, _find("g++"), *HOST_OPTIONS, "-fkeep-inline-functions", "-c")


def clang(program: str, folder: Path) -> str:
    compiler = _find("clang++", *(f"clang++-{version}" for version in range(22, 13, -1)))
    return _run(folder / "program.cpp", program, compiler, *HOST_OPTIONS, "-femit-all-decls", "-c")


def nvcc(program: str, folder: Path) -> str:
    options = ("-std=c++17", f"-arch={ARCH}", f"-I{CSRC}", "-Werror", "all-warnings", "-cubin")
    return _run(folder / "program.cu", program, _find("nvcc"), *options)


def nvrtc_library(program: str, folder: Path) -> str:
    library = nvrtc.load()
    if library is None:
        pytest.skip("no libnvrtc: neither the package nvidia-cuda-nvrtc nor a CUDA toolkit with it is installed")
    try:
        return nvrtc.compile_program(library, program, [f"-I{CSRC}", "-std=c++17", f"-arch={ARCH}"]).log
    except nvrtc.CompileError as error:
        return str(error)


COMPILERS = pytest.mark.parametrize("compiler", [gcc, clang, nvcc, nvrtc_library], ids=lambda run: run.__name__)


@COMPILERS
def test_all_protocol_headers_compile(compiler: Compile, tmp_path: Path) -> None:
    assert HEADERS
    log = compiler(_program(HEADERS), tmp_path)
    assert not log, log


@COMPILERS
def test_a_broken_program_is_refused(compiler: Compile, tmp_path: Path) -> None:
    assert compiler(_program(HEADERS[:1]) + "int broken = absent_name;\n", tmp_path)


@pytest.mark.parametrize("header", HEADERS)
def test_header_stands_on_its_own(header: str, tmp_path: Path) -> None:
    log = gcc(_program([header, header]), tmp_path)
    assert not log, log
