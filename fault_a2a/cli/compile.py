"""The command fault-a2a compile: every CUDA kernel for given chips, no GPU needed, with what each takes of a chip."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import Any

from fault_a2a import kernel_compiler, nvrtc

_HEADINGS = ("kernel", "arch", "variant", "registers", "spill_bytes", "shared_bytes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fault-a2a compile``."""
    parser.add_argument(
        "--arch",
        default=",".join(kernel_compiler.ARCHS),
        metavar="CC[,CC]",
        help="compute capabilities to compile for (%(default)s)",
    )
    parser.add_argument(
        "--variant",
        default=",".join(kernel_compiler.VARIANTS),
        metavar="DTYPE[,DTYPE]",
        help="types of the rows (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, and nothing else")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Compiles, or reads what was compiled before; 0 when every kernel was, 1 without NVRTC."""
    begun = time.monotonic()
    rows: list[dict[str, Any]] = []
    try:
        for arch in args.arch.split(","):
            for variant in args.variant.split(","):
                for _, found in kernel_compiler.compile_kernels(arch, variant):
                    rows += [asdict(row) for row in found]
    except ValueError as error:
        parser.error(str(error))
    except RuntimeError as error:
        print(json.dumps({"rows": rows, "why": str(error)}) if args.json else str(error), file=_out(args.json))
        return 1
    library = nvrtc.load()
    answer = {
        "rows": rows,
        "nvrtc": nvrtc.version(library) if library else None,
        "cache": str(kernel_compiler.cache_folder()),
        "seconds": round(time.monotonic() - begun, 3),
    }
    print(json.dumps(answer) if args.json else _table(answer))
    return 0


def _out(as_json: bool) -> Any:
    return sys.stdout if as_json else sys.stderr


def _table(answer: dict[str, Any]) -> str:
    lines = [_HEADINGS, *(tuple(str(row[name]) for name in _HEADINGS) for row in answer["rows"])]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADINGS))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, f"NVRTC {answer['nvrtc']}, {answer['seconds']} s; kept in {answer['cache']}"])
