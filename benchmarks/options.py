"""The options that the benchmarks share, and what a shape needs before any process is started."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_a2a.cli.words import append_record, named_by_option, show_turns, whole_number, words

from .machine import ROOT, available_bytes, shared_memory_bytes
from .systems import OURS, Copy
from .teams import in_a_fork
from .work import DTYPES, Shape

_PROCESS_BYTES = 60 << 20  # what a forked rank with torch has for itself, tensors not counted
_GIB = 1 << 30


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    shape = parser.add_argument_group("shape")
    shape.add_argument("--ranks", type=whole_number, default=8, help="processes on this host (default 8)")
    shape.add_argument("--tokens", type=whole_number, default=128, help="per rank and round (default 128)")
    shape.add_argument("--hidden", type=whole_number, default=7168, help="elements of a row (default 7168)")
    shape.add_argument("--topk", type=whole_number, default=8, help="experts of a token (default 8)")
    shape.add_argument("--experts", type=whole_number, default=64, help="in the whole group (default 64)")
    shape.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    shape.add_argument("--recv-format", choices=["batched", "packed"], default="batched")
    shape.add_argument("--reduce", choices=["owner", "expert"], default="owner", help="who sums a token's choices")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens and the routing (default 0)")


def add_output_options(parser: argparse.ArgumentParser, record: Path) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    parser.add_argument(
        "--out", nargs="?", const=str(record), help=f"append the record to a file (default {record.relative_to(ROOT)})"
    )


def run_benchmark(
    measure: Callable[[argparse.Namespace, Callable[[int], None]], dict[str, Any]],
    as_text: Callable[[dict[str, Any]], str],
    arguments: argparse.Namespace,
    turns: tuple[str, int],
    command: Sequence[str],
) -> int:
    """Measures, prints the record, appends it where that was asked for, and returns the exit code.

    On a terminal it shows how many of its ``turns`` (what they are, and how many) are done.
    """
    record = measure(arguments, show_turns(*turns, is_silent=arguments.json))
    record["command"] = " ".join(["python", *command])
    print(json.dumps(record) if arguments.json else as_text(record))
    if arguments.out:
        append_record(arguments.out, record)
    return 0 if record["ok"] else 1


def shape_of(arguments: argparse.Namespace) -> Shape:
    names = ("ranks", "tokens", "hidden", "topk", "experts", "dtype", "recv_format", "reduce")
    return Shape(**{name: getattr(arguments, name) for name in names})


@dataclass(frozen=True)
class Library:
    """What a child that may import the package says of it: which it is, and what the shape means to it."""

    version: str
    core: str  # production, hooks or unchecked
    expert_rank: list[int]
    window_bytes: int  # of one rank
    backends: list[str]
    emulated: list[str]  # of these: GPU kernels that this machine runs on its CPU


def ask_library(
    shape: Shape,
    num_teams: int,
    num_local_ranks: int | None = None,
    num_ours: int | None = None,
    backends: Sequence[str] = ("cpu",),
) -> Library:
    """Checks the shape; nothing is started if it cannot be run.

    ``num_local_ranks``: if not all are on this host. ``backends``: whose windows there are; ``auto`` becomes what it is
    here. ``num_ours``: of the teams, those that have windows, if not one a backend.

    Raises:
        ValueError: naming the option, and what to change.
    """

    def ask() -> dict[str, Any]:
        import fault_a2a
        from fault_a2a import gpu
        from fault_a2a._core import core
        from fault_a2a.backends import this_machine
        from fault_a2a.core_fields import window_bytes

        machine = this_machine()
        configs = [_config_here(shape, backend, machine) for backend in backends]
        config = configs[0]
        is_emulated = {"cuda-host": True, "triton": machine.interprets, "cuda": gpu.has_twin()}
        return {
            "backends": [one.backend for one in configs],
            "emulated": [one.backend for one in configs if is_emulated.get(one.backend)],
            "version": fault_a2a.__version__,
            "core": core.__name__.removeprefix("fault_a2a.").removeprefix("_C").removeprefix("_") or "production",
            "expert_rank": list(config.placement_for(shape.ranks).expert_rank),
            "window_bytes": window_bytes(config, shape.ranks),
        }

    try:
        library = Library(**in_a_fork(ask))
    except ValueError as error:
        raise ValueError(named_by_option(str(error))) from None
    _check_memory(shape, library, num_teams, num_local_ranks or shape.ranks, num_ours or len(backends))
    return library


def _config_here(shape: Shape, backend: str, machine: Any) -> Any:
    """Its ``Config`` with what runs here. Triton's interpreter does, slowly; CUDA's kernels need a GPU."""
    from fault_a2a import gpu
    from fault_a2a.backends import resolved, why_not

    refusal = why_not("cuda", machine) if backend == "cuda" and not gpu.has_twin() else ""
    if backend == "triton" and not machine.has_triton:
        refusal = why_not("triton", machine) or "Triton is not installed"
    if refusal:
        raise ValueError(f"--backend: {backend} does not run here: {refusal}; leave it out of --backend")
    return resolved(shape.config(backend), machine)


def add_backend_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--backend",
        dest="backends",
        type=words("auto", *OURS),
        default=["auto"],
        help=f"whose kernels run this library, side by side in one run: of auto, {', '.join(OURS)} (default auto: cuda "
        "where it compiles, else triton on a GPU, else cpu)",
    )


def _check_memory(shape: Shape, library: Library, num_teams: int, num_local_ranks: int, num_ours: int) -> None:
    windows = num_ours * num_local_ranks * library.window_bytes
    rows = 6 * num_local_ranks * shape.tokens * shape.topk * shape.row_bytes  # tokens, received, returned, summed rows
    needed = windows + num_teams * (rows + num_local_ranks * _PROCESS_BYTES) + 2 * num_local_ranks * Copy.BLOCK_BYTES
    for have, what, need in (
        (shared_memory_bytes(), "free in /dev/shm", windows),
        (available_bytes(), "free memory", needed),
    ):
        if need > have:
            raise ValueError(
                f"--ranks {shape.ranks}: {shape.ranks} ranks of this shape need about {need / _GIB:.1f} GiB, and this "
                f"machine has {have / _GIB:.1f} GiB {what}; give fewer --ranks or --tokens, or a smaller --hidden"
            )
