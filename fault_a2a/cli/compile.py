"""The command fault-a2a compile: every kernel for given chips, no GPU needed, with what each takes of a chip."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from dataclasses import asdict
from typing import Any

from fault_a2a import kernel_compiler, nvrtc
from fault_a2a.kernels.triton import compiled as triton_compiler

_HEADINGS = ("kernel", "arch", "variant", "registers", "spill_bytes", "shared_bytes")
_KERNELS = ("cuda", "triton")
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fault-a2a compile``."""
    parser.add_argument(
        "--kernels",
        choices=(*_KERNELS, "all"),
        default="all",
        help="whose: CUDA's through NVRTC, kept once compiled; Triton's, ten to twenty seconds a chip (%(default)s)",
    )
    parser.add_argument(
        "--arch",
        default=",".join(kernel_compiler.ARCHS),
        metavar="CC[,CC]",
        help="compute capabilities to compile for (%(default)s); Triton's rows call 90a 90, and mean the same code; "
        "Triton's for AMD too: gfx942, gfx950",
    )
    parser.add_argument(
        "--variant",
        default=",".join(kernel_compiler.VARIANTS),
        metavar="DTYPE[,DTYPE]",
        help="types of the rows (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, and nothing else")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Compiles, or reads what was compiled before; 0 when every kernel that was asked for was, 1 without a compiler."""
    begun = time.monotonic()
    rows: list[Row] = []
    missing: list[str] = []
    for kernels in _KERNELS if args.kernels == "all" else (args.kernels,):
        try:
            rows += _ROWS_OF[kernels](args.arch.split(","), args.variant.split(","))
        except ValueError as error:
            parser.error(str(error))
        except RuntimeError as error:
            missing.append(str(error))
    library = nvrtc.load()
    answer = {
        "rows": rows,
        "nvrtc": nvrtc.version(library) if library else None,
        "triton": _triton_version(),
        "cache": str(kernel_compiler.cache_folder()),
        "seconds": round(time.monotonic() - begun, 3),
        **({"why": " ".join(missing)} if missing else {}),
    }
    if args.json:
        print(json.dumps(answer))
    else:
        print(_table(answer))
        print(*missing, sep="\n", end="\n" if missing else "", file=sys.stderr)
    return 1 if missing else 0


def _cuda_rows(archs: list[str], variants: list[str]) -> list[Row]:
    files = [kernel_compiler.compile_kernels(arch, variant) for arch in archs for variant in variants]
    return [asdict(row) for found in files for _, rows in found for row in rows]


def _triton_rows(archs: list[str], variants: list[str]) -> list[Row]:
    # Triton adds the "a" of 90a itself, and knows no chip by it.
    chips = [arch if arch.startswith("gfx") else arch.rstrip("af") for arch in archs]
    rows: list[Row] = triton_compiler.kernel_rows(list(dict.fromkeys(chips)), variants)
    return rows


_ROWS_OF = {"cuda": _cuda_rows, "triton": _triton_rows}


def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _table(answer: dict[str, Any]) -> str:
    lines = [_HEADINGS, *(tuple(str(row[name]) for name in _HEADINGS) for row in answer["rows"])]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADINGS))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    compilers = f"NVRTC {answer['nvrtc']}, Triton {answer['triton']}"
    return "\n".join([*text, f"{compilers}, {answer['seconds']} s; kept in {answer['cache']}"])
