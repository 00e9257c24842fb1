"""NVRTC through ctypes: just enough to compile one program without a GPU, a CUDA toolkit or a binding."""

import ctypes
import os
import shutil
import site
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

_SUCCESS = 0


class CompileError(Exception):
    """NVRTC refused the program; the text is its log."""


def _candidates() -> Iterator[str]:
    """Where the library may lie: a wheel beside torch, the toolkit that nvcc belongs to, the loader's own path."""
    packages = {sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *site.getsitepackages()}
    for folder in sorted(packages):
        yield from map(str, sorted(Path(folder, "nvidia").glob("*/lib/libnvrtc.so.*[0-9]")))
    for home in (os.environ.get("CUDA_HOME"), _toolkit_of_nvcc()):
        if home:
            yield from map(str, sorted(Path(home).glob("lib*/libnvrtc.so.*[0-9]")))
    yield from ("libnvrtc.so.13", "libnvrtc.so.12")


def _toolkit_of_nvcc() -> str | None:
    nvcc = shutil.which("nvcc")
    return str(Path(nvcc).resolve().parent.parent) if nvcc else None


def load() -> ctypes.CDLL | None:
    for name in _candidates():
        try:
            # It looks its built-ins up by name, so they are loaded first, from the same place.
            for builtins in sorted(Path(name).parent.glob("libnvrtc-builtins.so.*")) if "/" in name else ():
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def compile_program(library: ctypes.CDLL, text: str, options: Sequence[str]) -> str:
    """Compiles to machine code and gives back the log."""
    program = ctypes.c_void_p()
    _check(library, library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"program.cu", 0, None, None))
    try:
        as_bytes = [option.encode() for option in options]
        result = library.nvrtcCompileProgram(program, len(as_bytes), (ctypes.c_char_p * len(as_bytes))(*as_bytes))
        log = _log(library, program)
        if result != _SUCCESS:
            raise CompileError(log)
        return log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _log(library: ctypes.CDLL, program: ctypes.c_void_p) -> str:
    num_bytes = ctypes.c_size_t()
    _check(library, library.nvrtcGetProgramLogSize(program, ctypes.byref(num_bytes)))
    log = ctypes.create_string_buffer(num_bytes.value)
    _check(library, library.nvrtcGetProgramLog(program, log))
    return log.value.decode()


def _check(library: ctypes.CDLL, result: int) -> None:
    if result != _SUCCESS:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {library.nvrtcGetErrorString(result).decode()}")
