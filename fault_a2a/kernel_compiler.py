"""Machine code for a chip from kernels/cuda: by NVRTC, once a chip and dtype, kept on disk.

Kernels read every size at run time, from memory that is written at construction, so one compilation serves all shapes:
an engine that changes its batch or its layer recompiles nothing. Only the type of the rows is fixed, because it decides
what the inner loops are.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from fault_a2a import nvrtc

# Of every file its kernels, in the order of a round; streams have kernels of their own.
KERNELS = {
    "dispatch.cu": ("dispatch_route", "dispatch_send"),
    "expand.cu": ("dispatch_collect", "dispatch_expand"),
    "combine.cu": ("combine_answer",),
    "reduce.cu": ("combine_gather", "combine_reduce"),
    "stream_send.cu": ("stream_open_rows", "stream_send_rows", "stream_open_answers", "stream_send_answers"),
    "stream_expand.cu": ("stream_collect", "stream_expand"),
    "stream_reduce.cu": ("stream_gather", "stream_reduce"),
}
# As `DType` in kernels/verbs.hpp numbers them.
VARIANTS = {"bfloat16": 0, "float32": 1, "float16": 2}
ARCHS = ("90a", "100a", "103a", "120a")
_ARCH = re.compile(r"[1-9]\d{1,2}[af]?", re.ASCII)
_OPTIONS = ("-std=c++17", "-default-device", "--fmad=false", "--ptxas-options=-v")
_ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)'")
_SPILLS = re.compile(r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads")
_USED = re.compile(r"Used (?P<registers>\d+) registers")
_SHARED = re.compile(r"(?P<bytes>\d+) bytes smem")


@dataclass(frozen=True)
class KernelRow:
    """One kernel as it was compiled."""

    kernel: str
    arch: str
    variant: str
    registers: int
    spill_bytes: int
    shared_bytes: int


def compile_kernels(
    arch: str, variant: str, *, library: ctypes.CDLL | None = None, cache: Path | None = None
) -> list[tuple[Path, list[KernelRow]]]:
    """The cubin of every file of kernels/cuda for one chip and dtype, with a line for each kernel in it.

    Needs no GPU. Blocks, seconds the first time; afterwards it reads ``cache`` (``cache_folder()``).

    Args:
        arch: a compute capability as "90a".
        variant: of ``VARIANTS``.
        library: NVRTC; ``None`` looks for it.

    Raises:
        ValueError: ``arch`` or ``variant`` is none.
        RuntimeError: there is no NVRTC on this machine, or it does not know the chip.
    """
    if not _ARCH.fullmatch(arch):
        raise ValueError(f"arch: {arch!r} is no compute capability; pass one as {', '.join(ARCHS)}.")
    if variant not in VARIANTS:
        raise ValueError(f"variant: {variant!r} is no dtype of rows; pass {', '.join(VARIANTS)}.")
    library = library or nvrtc.load()
    if library is None:
        raise RuntimeError(
            nvrtc.why_not()
            or "no libnvrtc: run `pip install 'fault_a2a[cuda13]'` (or 'fault_a2a[cuda12]'), or install a CUDA toolkit "
            "that has it."
        )
    folder = cache or cache_folder()
    return [_compile_file(library, name, arch, variant, folder) for name in KERNELS]


def cache_folder() -> Path:
    """``$FAULT_A2A_CACHE``, or ``fault_a2a`` in the user's cache folder."""
    chosen = os.environ.get("FAULT_A2A_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fault_a2a"


def _compile_file(
    library: ctypes.CDLL, name: str, arch: str, variant: str, folder: Path
) -> tuple[Path, list[KernelRow]]:
    # Not before: every command imports this module, and which core it is is settled when it is first imported.
    from fault_a2a._core import core

    kernels, include = _source_folders()
    rank_bytes = f"-DFA2A_RANK_BYTES={core.device_rank_bytes}"  # the host's half is another compiler's
    options = [*_OPTIONS, rank_bytes, f"-DFA2A_DTYPE={VARIANTS[variant]}", f"-arch=sm_{arch}"]
    key = _key([nvrtc.version(library), name, *options], _sources(kernels, include))
    cubin, rows = folder / f"{key}.cubin", folder / f"{key}.json"
    known = _read(cubin, rows)
    if known is not None:
        return cubin, known
    try:
        compiled = nvrtc.compile_program(
            library, (kernels / "cuda" / name).read_text(), [*options, f"-I{kernels.parent}", f"-I{include}"]
        )
    except nvrtc.CompileError as error:
        raise RuntimeError(f"NVRTC {nvrtc.version(library)} does not compile {name} for {arch}: {error}") from error
    found = _rows(compiled.log, name, arch, variant)
    # The rows come last, and say which code they belong to: whatever a crash or another process leaves is not taken.
    write_whole(cubin, compiled.cubin)
    digest = hashlib.sha256(compiled.cubin).hexdigest()
    write_whole(rows, json.dumps({"cubin": digest, "rows": [asdict(row) for row in found]}).encode())
    return cubin, found


def _source_folders() -> tuple[Path, Path]:
    """Where kernels/ and the folder with protocol/ are: in the checkout, or in the installed package."""
    package = Path(__file__).resolve().parent
    if (package.parent / "csrc" / "protocol").is_dir():
        return package.parent / "kernels", package.parent / "csrc"
    return package / "kernels", package / "include"


def _sources(kernels: Path, include: Path) -> list[Path]:
    found = [*(kernels / "cuda").glob("*.*"), *kernels.glob("*.hpp"), *(include / "protocol").glob("*.hpp")]
    return sorted(path for path in found if path.is_file())


def _key(words: Iterable[str], sources: Iterable[Path]) -> str:
    digest = hashlib.sha256("\0".join(words).encode())
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def _rows(log: str, name: str, arch: str, variant: str) -> list[KernelRow]:
    """What ptxas said of each kernel of a file."""
    found = {}
    parts = _ENTRY.split(log)[1:]
    for kernel, text in zip(parts[::2], parts[1::2], strict=True):
        spills, used, shared = _SPILLS.search(text), _USED.search(text), _SHARED.search(text)
        if spills and used:
            spill_bytes = int(spills["stores"]) + int(spills["loads"])
            shared_bytes = int(shared["bytes"]) if shared else 0
            found[kernel] = KernelRow(kernel, arch, variant, int(used["registers"]), spill_bytes, shared_bytes)
    missing = [kernel for kernel in KERNELS[name] if kernel not in found]
    if missing:
        raise RuntimeError(f"the compiler says nothing of {', '.join(missing)}; its log: {log}")
    return [found[kernel] for kernel in KERNELS[name]]


def _read(cubin: Path, rows: Path) -> list[KernelRow] | None:
    try:
        known = json.loads(rows.read_text())
        if known["cubin"] != hashlib.sha256(cubin.read_bytes()).hexdigest():
            return None
        return [KernelRow(**row) for row in known["rows"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_whole(path: Path, content: bytes) -> None:
    """Whole or not at all, also beside another process that writes the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".part", delete=False) as part:
        part.write(content)
    os.replace(part.name, path)
