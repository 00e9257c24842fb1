"""What a small all_reduce takes beside gloo's: python -m benchmarks.collectives --help

Ranks are processes that hold both; iterations take turns (ours, gloo, ours, ...), a barrier of gloo before each, and
every answer is checked. An iteration lasts as long as its slowest rank's own call. gloo promises less: a death in the
middle hangs it or fails all, ours ends with one answer on all who go on, for one more exchange.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from multiprocessing import connection
from typing import Any

import torch
import torch.distributed as dist

from fault_a2a.cli.words import whole_number, whole_numbers

from .machine import ROOT, where_and_when
from .options import add_output_options, run_benchmark
from .spread import spread
from .teams import check_can_fork, resolve_names_locally

RECORD = ROOT / "benchmarks" / "results" / "collectives.jsonl"
SYSTEMS = ("fault_a2a", "gloo")
_TIMEOUT = timedelta(seconds=60)
_END_TIMEOUT_S = 10


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.collectives", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=whole_number, default=8, help="processes on this host (default 8)")
    parser.add_argument(
        "--sizes", type=whole_numbers, default="8,1024,4096", help="bytes of a contribution (default 8,1024,4096)"
    )
    parser.add_argument("--iterations", type=whole_number, default=300, help="counted turns of each (default 300)")
    parser.add_argument("--warm-up", type=whole_number, default=20, help="turns that are not counted (default 20)")
    add_output_options(parser, RECORD)
    arguments = parser.parse_args(argv)
    if any(size % 8 for size in arguments.sizes):
        parser.error(f"--sizes {','.join(map(str, arguments.sizes))}: give multiples of 8, separated by commas")
    return arguments


def measure(arguments: argparse.Namespace, watch: Callable[[int], None]) -> dict[str, Any]:
    check_can_fork()
    resolve_names_locally()
    began = where_and_when()
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(arguments.ranks)]
    ranks = [context.Process(target=_live, args=(rank, arguments, pipes[rank][1])) for rank in range(arguments.ranks)]
    for process in ranks:
        process.start()
    try:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for ours, _ in pipes:
            ours.send(store.port)
        times = [_answer_of(process, ours) for process, (ours, _) in zip(ranks, pipes, strict=True)]
    finally:
        for process in ranks:
            process.join(_END_TIMEOUT_S)
            process.kill()
    rows = []
    for number, size in enumerate(arguments.sizes):
        for system in SYSTEMS:
            slowest = [max(us) for us in zip(*(one[number][system] for one in times), strict=True)]
            found = spread(slowest)
            rows.append(
                {
                    "system": system,
                    "num_ranks": arguments.ranks,
                    "num_bytes": size,
                    "all_reduce_us": round(found.median, 1),
                    "p95_us": round(found.p95, 1),
                    "spread_us": {key: round(value, 1) for key, value in asdict(found).items()},
                }
            )
    return {
        "benchmark": "collectives",
        "ok": True,  # a wrong answer ended the run
        **began,
        "load_average_after": [round(load, 2) for load in os.getloadavg()],
        "num_iterations": arguments.iterations,
        "rows": rows,
    }


def _answer_of(process: Any, pipe: Any) -> Any:
    connection.wait([pipe, process.sentinel])
    if not pipe.poll():
        process.join()
        raise RuntimeError(f"a rank ended with exit code {process.exitcode}, see above; nothing is reported")
    return pipe.recv()


def _live(rank: int, arguments: argparse.Namespace, parent: Any) -> None:
    import fault_a2a

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", parent.recv(), is_master=False)
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("gloo", store), rank=rank, world_size=arguments.ranks, timeout=_TIMEOUT
    )
    config = fault_a2a.Config(
        num_experts=arguments.ranks,
        hidden=64,
        num_topk=1,
        num_max_tokens_per_rank=1,
        max_collective_bytes=max(arguments.sizes),
    )
    with fault_a2a.Buffer(fault_a2a.Group(dist.PrefixStore("ours", store), rank, arguments.ranks), config) as buffer:
        parent.send([_times(buffer, size, arguments) for size in arguments.sizes])
        dist.barrier()
    os._exit(0)


def _times(buffer: Any, num_bytes: int, arguments: argparse.Namespace) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    for turn in range(arguments.warm_up + arguments.iterations):
        x = torch.arange(num_bytes // 8) + (buffer.rank + 1) * (turn + 1)
        num_ranks = arguments.ranks
        want = torch.arange(num_bytes // 8) * num_ranks + num_ranks * (num_ranks + 1) // 2 * (turn + 1)
        for system in SYSTEMS:
            dist.barrier()
            began_ns = time.monotonic_ns()
            if system == "gloo":
                out = x.clone()
                dist.all_reduce(out)
            else:
                out = buffer.all_reduce(x)[0]
            took_us = (time.monotonic_ns() - began_ns) / 1e3
            if not torch.equal(out, want):
                raise AssertionError(f"{system} gave a wrong sum in turn {turn}; nothing is reported")
            if turn >= arguments.warm_up:
                times[system].append(took_us)
    return times


def as_text(record: dict[str, Any]) -> str:
    lines = [
        f"all_reduce (sum of int64), median of {record['num_iterations']} in us; commit {record['commit']}, "
        f"{record['date']}; load average {record['load_average'][0]} before, {record['load_average_after'][0]} after",
        f"{'system':<12}{'ranks':>6}{'bytes':>8}{'median':>10}{'p95':>10}",
    ]
    lines += [
        f"{row['system']:<12}{row['num_ranks']:>6}{row['num_bytes']:>8}{row['all_reduce_us']:>10}{row['p95_us']:>10}"
        for row in record["rows"]
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    command = ["-m", "benchmarks.collectives", *(sys.argv[1:] if argv is None else argv)]
    return run_benchmark(measure, as_text, arguments, ("turn", arguments.iterations), command)


if __name__ == "__main__":
    raise SystemExit(main())
