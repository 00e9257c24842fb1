"""A contest whose ranks a launcher started: torchrun or mpirun gives the processes, and each of them runs every system.

Nobody here can stop the others' processes, so systems share them and take turns: their threads are there, and wait. On
one host a round lasts from the first rank's start to the last one's end. Hosts have no clock in common: between them it
is the longest that any rank needed from its own start.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from .contest import TURN, Score
from .dispatch_combine import as_record, systems_of
from .machine import where_and_when
from .mpi import Mpi
from .options import shape_of
from .peers import PEERS
from .permuted import all_gather_single
from .systems import System
from .teams import CHECK, SETTLE, SPLIT
from .work import NUM_BATCHES, Batch, Shape

_FAILED, _FINE = 1, 0


@dataclass(frozen=True)
class Launch:
    """Which process of how many this is, and who started it."""

    launcher: str
    rank: int
    num_ranks: int
    num_local_ranks: int

    @property
    def one_host(self) -> bool:
        return self.num_local_ranks == self.num_ranks


def find_launch() -> Launch | None:
    """``None``: nobody launched this process, so the benchmark starts its ranks itself."""
    for launcher, names in (
        ("mpirun", ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")),
        ("torchrun", ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")),
    ):
        if all(name in os.environ for name in names):
            return Launch(launcher, *(int(os.environ[name]) for name in names))
    return None


def peers_of(launch: Launch, names: list[str], everybody: bool) -> list[str]:
    """Those of ``names`` that this launcher's processes can run; ``everybody``: whichever they are.

    Raises:
        ValueError: one that was asked for cannot; says what to do.
    """
    found = []
    for name in names:
        refusal = _refusal(launch, name)
        if refusal and not everybody:
            raise ValueError(f"--peers: {name} {refusal}")
        found += [] if refusal else [name]
    return found


def _refusal(launch: Launch, name: str) -> str:
    if name == "mpi-no-cma":
        return "is an option of mpirun's: run mpirun --mca btl_vader_single_copy_mechanism none, with --peers mpi"
    if issubclass(PEERS[name], Mpi) and launch.launcher != "mpirun":
        return f"needs ranks that mpirun started; use mpirun, or leave {name} out"
    return ""


@cache
def _meeting_place(launch: Launch) -> Any:
    """The store that all ranks reach; with it the group that ranks meet in outside of what is timed. Once a process."""
    if launch.launcher == "mpirun" and "MASTER_ADDR" not in os.environ:
        store = _store_by_mpi(launch)
    else:
        os.environ.setdefault("RANK", str(launch.rank))
        os.environ.setdefault("WORLD_SIZE", str(launch.num_ranks))
        store, _, _ = next(iter(dist.rendezvous("env://")))
    if launch.one_host:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("meeting", store), rank=launch.rank, world_size=launch.num_ranks
    )
    return store


def _store_by_mpi(launch: Launch) -> Any:
    """mpirun names no address: rank 0 opens the store where the others can reach it, and tells them by MPI."""
    try:
        from mpi4py import MPI
    except ImportError:
        raise ValueError(
            "under mpirun without mpi4py nobody says where to meet: run `python -m pip install mpi4py`, or set "
            "MASTER_ADDR and MASTER_PORT (mpirun -x)"
        ) from None
    import socket

    address = None
    if launch.rank == 0:
        host = "127.0.0.1" if launch.one_host else socket.gethostbyname(socket.gethostname())
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        address = (host, store.port)
    host, port = MPI.COMM_WORLD.bcast(address, root=0)
    return store if launch.rank == 0 else dist.TCPStore(host, port, is_master=False)


class Meeting:
    """All ranks' words after a part of a round; the time of the part, and whether somebody failed."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch

    def start(self) -> int:
        dist.barrier()
        return time.monotonic_ns()

    def end(self, began_ns: int, trouble: str) -> tuple[float, str]:
        """(us, what is wrong on some rank; empty if nothing is)."""
        mine = torch.tensor([began_ns, time.monotonic_ns(), _FAILED if trouble else _FINE])
        told = torch.empty(3 * self.launch.num_ranks, dtype=torch.int64)
        all_gather_single(told, mine)
        begins, ends, failed = told.view(-1, 3).unbind(dim=1)
        if failed.any():
            texts: list[str] = [""] * self.launch.num_ranks
            dist.all_gather_object(texts, trouble)
            return 0.0, "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)
        if self.launch.one_host:
            return float(ends.max() - begins.min()) / 1e3, ""
        return float((ends - begins).max()) / 1e3, ""


class Contestant:
    """One system on this rank, and its score."""

    def __init__(self, name: str, make_system: type[System], shape: Shape, store: Any, meeting: Meeting) -> None:
        self.score, self.meeting, self.num_rounds = Score(name), meeting, 0
        self.system: System | None = None

        def build() -> None:
            self.system = make_system(shape, meeting.launch.rank, store)

        began_ns = meeting.start()
        _, self.score.failure = meeting.end(began_ns, _trouble_of(build))

    def run(self, batch: Batch, order: int) -> dict[str, float]:
        """One round, and then its answer. Times in us; none, and no further round, once somebody was wrong."""
        system, meeting, held = self.system, self.meeting, SimpleNamespace(out=None)
        if system is None or self.score.failure:
            return {}

        def dispatch() -> None:
            held.received, held.handle = system.dispatch(batch)

        def combine() -> None:
            held.out = system.combine(held.received, held.handle)

        times: dict[str, float] = {}
        if order == SPLIT:
            times["dispatch"] = self._timed(dispatch)
            times["combine"] = self._timed(combine)
        elif order == CHECK:
            self._timed(dispatch)
            self._timed(lambda: system.apply_factors(held.received))
            self._timed(combine)
        else:
            times["pair"] = self._timed(lambda: (dispatch(), combine()))
        answer = batch.of_factors if order == CHECK else batch.of_identity
        if not self.score.failure:
            wrong = system.trouble() or (system.computes and answer.trouble(held.out, system.bit_exact)) or ""
            _, self.score.failure = meeting.end(meeting.start(), f"wrong answer: {wrong}" if wrong else "")
        return times

    def _timed(self, do: Callable[[], Any]) -> float:
        if self.score.failure:
            return 0.0
        began_ns = self.meeting.start()
        trouble = _trouble_of(do)
        us, self.score.failure = self.meeting.end(began_ns, trouble)
        return us

    def take_turn(self, batches: list[Batch], is_counted: bool) -> None:
        for order in TURN:
            times = self.run(batches[self.num_rounds % NUM_BATCHES], order)
            self.num_rounds += 1
            if is_counted and order != SETTLE:
                for part, us in times.items():
                    getattr(self.score, part).append(us)

    def close(self) -> None:
        """Leaves the group, and takes the times of a system that failed."""
        if self.score.failure:
            # Not closed: that may be collective, and on some rank nothing is left that could be.
            self.score.dispatch, self.score.combine, self.score.pair = [], [], []
        elif self.system is not None:
            dist.barrier()
            logging.getLogger("fault_a2a").setLevel(logging.CRITICAL)  # to leave one after the other is no fault
            self.system.close()
            dist.barrier()
            logging.getLogger("fault_a2a").setLevel(logging.NOTSET)


def _trouble_of(do: Callable[[], Any]) -> str:
    """What went wrong, in words; empty if nothing did. Not raised: who failed must come to the next meeting too."""
    try:
        do()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def measure(launch: Launch, number: int, arguments: argparse.Namespace, watch: Callable[[int], None]) -> dict[str, Any]:
    """The record as ``dispatch_combine.measure`` makes it, on every rank. ``number``: of this contest in the run."""
    shape, meeting = shape_of(arguments), Meeting(launch)
    systems = systems_of(arguments)
    store = _meeting_place(launch)
    began = where_and_when()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // launch.num_local_ranks))
    batches = [Batch(shape, launch.rank, arguments.seed + i) for i in range(NUM_BATCHES)]
    for batch in batches:
        _ = batch.of_identity, batch.of_factors  # computed now, not between two rounds
    contestants = [
        Contestant(name, system, shape, dist.PrefixStore(f"{name}/{number}", store), meeting)
        for name, system in systems.items()
    ]
    for one in contestants:
        for batch in batches:
            one.run(batch, CHECK)
    for iteration in range(-arguments.warm_up, arguments.iterations):
        watch(iteration)
        for one in contestants:
            one.take_turn(batches, is_counted=iteration >= 0)
    for one in contestants:
        one.close()
    record = as_record(arguments, began, [one.score for one in contestants], systems)
    return record | {"launcher": launch.launcher, "num_local_ranks": launch.num_local_ranks}


def leave() -> None:
    """Ends the meeting, if there was one, once all have come: a launcher ends everybody when one rank exits badly."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
