"""The command `bench`: dispatch, combine and the pair over a sweep of shapes, beside the peers found here."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from fault_a2a.cli.pictures import check_picture
from fault_a2a.cli.words import append_record, show_turns, whole_number, whole_numbers, words

_BACKENDS = ("auto", "cpu", "cuda-host", "triton", "cuda")
_SHAPE = ("ranks", "tokens", "hidden", "topk", "experts", "dtype", "reduce", "recv_format")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shape = parser.add_argument_group("shapes", "each takes several values, separated by commas: all combinations run")
    shape.add_argument(
        "--ranks",
        type=whole_numbers,
        help="processes on this host (default 8; under torchrun or mpirun, those it started)",
    )
    shape.add_argument(
        "--num-tokens",
        "--tokens",
        dest="tokens",
        type=whole_numbers,
        default=[128],
        help="per rank and round (default 128)",
    )
    shape.add_argument("--hidden", type=whole_numbers, default=[7168], help="elements of a row (default 7168)")
    shape.add_argument("--num-topk", "--topk", dest="topk", type=whole_numbers, default=[8], help="experts of a token")
    shape.add_argument("--num-experts", "--experts", dest="experts", type=whole_numbers, default=[64], help="in all")
    shape.add_argument("--dtype", type=words("bf16", "f16", "f32"), default=["bf16"], help="bf16, f16, f32")
    shape.add_argument("--reduce", type=words("owner", "expert"), default=["owner"], help="owner, expert")
    shape.add_argument("--recv-format", type=words("batched", "packed"), default=["batched"], help="batched, packed")
    parser.add_argument(
        "--backend",
        dest="backends",
        type=words(*_BACKENDS),
        default=["auto"],
        help=f"whose kernels run this library, side by side in one run: of {', '.join(_BACKENDS)} (default auto: cuda "
        "where it compiles, else triton on a GPU, else cpu)",
    )
    parser.add_argument(
        "--peers",
        default="gloo",
        help="comma-separated, of gloo, gloo-cpp, gloo-per-choice, mpi, mpi-cpp, mpi-no-cma, nccl, deep-ep, nixl-ep "
        "(-cpp: with permutes in C++ instead of torch); or `all` for those found here (default gloo)",
    )
    parser.add_argument("--iterations", type=whole_number, default=30, help="counted turns of each system (default 30)")
    parser.add_argument("--warm-up", type=whole_number, default=3, help="turns that are not counted (default 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens and the routing (default 0)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    parser.add_argument("--out", metavar="FILE", help="append the JSON object to a file, as a line")
    parser.add_argument("--markdown", metavar="FILE", help="write the rows as a table")
    parser.add_argument("--plot", metavar="FILE", help="draw the pairs (.svg, .png or .pdf; needs matplotlib)")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """0: every answer was right. 1: some system failed. 2: something that cannot be run was asked for."""
    # Late: it needs torch's distributed package, and the other commands do not.
    from fault_a2a.benchmarks import launched, peers, sweep

    launch = launched.find_launch()
    try:
        _settle_ranks(args, launch)
        combinations = itertools.product(*(getattr(args, name) for name in _SHAPE))
        shapes: list[dict[str, Any]] = [dict(zip(_SHAPE, values, strict=True)) for values in combinations]
        if args.plot:
            check_picture("--plot", args.plot)
        chosen = peers.chosen_peers(args.peers)
        if launch is not None:
            chosen = launched.peers_of(launch, chosen, everybody=args.peers == "all")
        num_local_ranks = launch.num_local_ranks if launch else None
        options = (chosen, args.iterations, args.warm_up, args.seed, num_local_ranks, args.backends)
        tasks = [sweep.task(shape, *options) for shape in shapes]
    except ValueError as error:
        parser.error(str(error))
    speaks = launch is None or launch.rank == 0
    watch = show_turns("turn", args.iterations, is_silent=args.json or not speaks)
    record = sweep.run_sweep(tasks, watch, print if speaks and not args.json else None, launch)
    if speaks:
        _hand_out(args, record)
    launched.leave()
    return 0 if record["ok"] else 1


def _settle_ranks(args: argparse.Namespace, launch: Any) -> None:
    """A launcher has settled how many ranks there are."""
    if launch is None:
        args.ranks = args.ranks or [8]
    elif args.ranks not in (None, [launch.num_ranks]):
        raise ValueError(f"--ranks: {launch.launcher} started {launch.num_ranks}; leave it out, or start as many ranks")
    else:
        args.ranks = [launch.num_ranks]


def _hand_out(args: argparse.Namespace, record: dict[str, Any]) -> None:
    from fault_a2a.benchmarks import sweep

    record["command"] = " ".join(["fault-a2a", *sys.argv[1:]])
    if args.json:
        print(json.dumps(record))
    if args.out:
        append_record(args.out, record)
    if args.markdown:
        Path(args.markdown).write_text(sweep.as_markdown(record))
    if args.plot:
        sweep.draw(record, args.plot)
