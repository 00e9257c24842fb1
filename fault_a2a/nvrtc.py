"""NVRTC through ctypes: compiles a program to machine code without a GPU, a CUDA toolkit or a binding."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_SUCCESS = 0


class CompileError(Exception):
    """NVRTC refused the program; the text is its log."""


@dataclass(frozen=True)
class Compiled:
    """Machine code, and what the compiler said of it."""

    cubin: bytes
    log: str


def _candidates() -> Iterator[str]:
    """Where the library may lie: a wheel on Python's path, the toolkit that nvcc belongs to, the loader's own path."""
    for folder in dict.fromkeys(sys.path):
        yield from _newest_first(Path(folder or ".", "nvidia"), "*/lib")
    for home in (os.environ.get("CUDA_HOME"), _toolkit_of_nvcc()):
        if home:
            yield from _newest_first(Path(home), "lib*")
    yield from ("libnvrtc.so.13", "libnvrtc.so.12")


def _version_in(name: str) -> list[int]:
    return [int(part) for part in name.partition(".so.")[2].split(".")]


def _newest_first(folder: Path, places: str) -> list[str]:
    found = [str(path) for path in folder.glob(f"{places}/libnvrtc.so.*") if path.suffix[1:].isdigit()]
    return sorted(found, key=_version_in, reverse=True)


def _toolkit_of_nvcc() -> str | None:
    nvcc = shutil.which("nvcc")
    return str(Path(nvcc).resolve().parent.parent) if nvcc else None


def _driver_version() -> str:
    """The newest CUDA that this machine's driver runs, as "13.0"; "" where there is no driver."""
    found = ctypes.c_int()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(found))
    except (OSError, AttributeError):
        return ""
    return f"{found.value // 1000}.{found.value % 1000 // 10}" if status == 0 and found.value else ""


def _runs(driver: str, compiler: str) -> bool:
    """A driver loads machine code of its own major version, whatever the minor one, and of those before."""
    return not driver or int(compiler.partition(".")[0]) <= int(driver.partition(".")[0])


def _load_builtins(name: str) -> None:
    """NVRTC looks these up by name when it first compiles, so they are loaded before, from the same place."""
    for builtins in sorted(Path(name).parent.glob("libnvrtc-builtins.so.*")) if "/" in name else ():
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)


@cache
def _choice() -> tuple[ctypes.CDLL | None, str]:
    """The newest library whose code the driver here runs; or none, and why those that were found are none."""
    driver, too_new = _driver_version(), ""
    for name in _candidates():
        try:
            library = ctypes.CDLL(name)
            if _runs(driver, found := version(library)):
                _load_builtins(name)
                return library, ""
            too_new = too_new or found
        except OSError:
            continue
    if not too_new:
        return None, ""
    return None, (
        f"NVRTC {too_new} compiles for a newer CUDA than the driver here runs, {driver}; run "
        f"`pip install 'fault_a2a[cuda{driver.partition('.')[0]}]'`, or install a newer driver"
    )


def load() -> ctypes.CDLL | None:
    """The library, or ``None`` if this machine has none whose code its driver runs; without a driver, any does."""
    return _choice()[0]


def why_not() -> str:
    """Why ``load`` leaves out what it found, or "" if it found nothing."""
    return _choice()[1]


def version(library: ctypes.CDLL) -> str:
    """As "13.0"."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library, library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


def compile_program(library: ctypes.CDLL, text: str, options: Sequence[str]) -> Compiled:
    """Compiles to machine code; ``options`` name the chip, as ``-arch=sm_90a``.

    Raises:
        CompileError: the program has an error.
    """
    program = ctypes.c_void_p()
    _check(library, library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"program.cu", 0, None, None))
    try:
        as_bytes = [option.encode() for option in options]
        result = library.nvrtcCompileProgram(program, len(as_bytes), (ctypes.c_char_p * len(as_bytes))(*as_bytes))
        log = _text(library, "ProgramLog", program).rstrip(b"\0").decode()
        if result != _SUCCESS:
            raise CompileError(log)
        return Compiled(_text(library, "CUBIN", program), log)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(library: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    num_bytes = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(num_bytes)))
    text = ctypes.create_string_buffer(num_bytes.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, text))
    return text.raw


def _check(library: ctypes.CDLL, result: int) -> None:
    if result != _SUCCESS:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {library.nvrtcGetErrorString(result).decode()}")
