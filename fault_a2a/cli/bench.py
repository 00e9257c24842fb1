"""The command `bench`: dispatch, combine and the pair over a sweep of shapes, beside the peers found here."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from fault_a2a.cli.pictures import check_picture

_BACKENDS = ("auto", "cpu", "cuda-host", "triton", "cuda")
_SHAPE = ("ranks", "tokens", "hidden", "topk", "experts", "dtype", "reduce", "recv_format")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shape = parser.add_argument_group("shapes", "each takes several values, separated by commas: all combinations run")
    shape.add_argument(
        "--ranks", type=_numbers, help="processes on this host (default 8; under torchrun or mpirun, those it started)"
    )
    shape.add_argument(
        "--num-tokens", "--tokens", dest="tokens", type=_numbers, default=[128], help="per rank and round (default 128)"
    )
    shape.add_argument("--hidden", type=_numbers, default=[7168], help="elements of a row (default 7168)")
    shape.add_argument("--num-topk", "--topk", dest="topk", type=_numbers, default=[8], help="experts of a token")
    shape.add_argument("--num-experts", "--experts", dest="experts", type=_numbers, default=[64], help="in all")
    shape.add_argument("--dtype", type=_words("bf16", "f16", "f32"), default=["bf16"], help="bf16, f16, f32")
    shape.add_argument("--reduce", type=_words("owner", "expert"), default=["owner"], help="owner, expert")
    shape.add_argument("--recv-format", type=_words("batched", "packed"), default=["batched"], help="batched, packed")
    parser.add_argument(
        "--backend",
        dest="backends",
        type=_words(*_BACKENDS),
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
    parser.add_argument("--iterations", type=_number, default=30, help="counted turns of each system (default 30)")
    parser.add_argument("--warm-up", type=_number, default=3, help="turns that are not counted (default 3)")
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
    record = sweep.run_sweep(tasks, _watch(args, speaks), print if speaks and not args.json else None, launch)
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
        with Path(args.out).open("a") as out:
            out.write(json.dumps(record) + "\n")
    if args.markdown:
        Path(args.markdown).write_text(sweep.as_markdown(record))
    if args.plot:
        sweep.draw(record, args.plot)


def _watch(args: argparse.Namespace, speaks: bool) -> Any:
    def watch(iteration: int) -> None:
        if speaks and not args.json and sys.stderr.isatty():
            print(f"\rturn {iteration + 1} of {args.iterations} ", end="", file=sys.stderr, flush=True)

    return watch


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 up")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_number(part) for part in text.split(",")]


def _words(*known: str) -> Any:
    def words(text: str) -> list[str]:
        given = text.split(",")
        for word in given:
            if word not in known:
                raise argparse.ArgumentTypeError(f"there is no {word!r}; give some of {', '.join(known)}")
            if given.count(word) > 1:
                raise argparse.ArgumentTypeError(f"{word!r} is given twice; give it once")
        return given

    return words
