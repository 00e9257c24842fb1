"""The rig of the process tests: ranks forked from a server without threads, struck by pid, gone without a trace."""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from fault_a2a._core import core
from fault_a2a.buffer import Buffer
from fault_a2a.config import Config
from fault_a2a.group import Group
from fault_a2a.membership import Evidence, View
from tests.rig import Tally

# The server imports torch once and starts no thread; a rank is forked from it in milliseconds.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.process_scenarios"])

_PATIENCE_S = 60.0  # a loaded machine is no hang
_LOOK_S = 0.0005
_NO_END = 1 << 60
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Board:
    """Words that the test and all its ranks see: where each rank is, and after which round all are to stop."""

    begun: Any  # [num_ranks]: the newest round each rank has begun, or is about to
    ended: Any  # [num_ranks]: 1 when a rank runs no more rounds, for whatever reason
    last_round: Any  # [1]

    @classmethod
    def of(cls, num_ranks: int) -> Board:
        words = [SERVER.RawArray(ctypes.c_int64, num_ranks) for _ in range(2)]
        return cls(*words, SERVER.RawArray(ctypes.c_int64, [_NO_END]))


@dataclass
class Report:
    """What a rank knows at the end."""

    rank: int
    tally: Tally
    views: list[tuple[View, int]]
    evidence: list[Evidence]


class Here:
    """A rank's own side: its pipe to the test, the board, and the way to its buffer."""

    def __init__(
        self, rank: int, num_ranks: int, config: Config, pipe: Connection, board: Board, port: int, joins: bool = False
    ) -> None:
        self.rank, self.num_ranks, self.config, self.pipe, self.board = rank, num_ranks, config, pipe, board
        self.joins, self.num_founders = joins, num_ranks
        self.store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)

    def open(self, group: Group | None = None) -> Buffer:
        """Constructs the buffer, and tells the test that it stands."""
        num_ranks = self.num_ranks if self.joins else self.num_founders
        buffer = Buffer(group or Group(self.store, self.rank, num_ranks), self.config, join=self.joins)
        self.say("ready")
        return buffer

    def say(self, what: Any) -> None:
        _send(self.pipe, what)

    def hear(self, timeout_s: float = _PATIENCE_S) -> Any:
        if not self.pipe.poll(timeout_s):
            raise TimeoutError(f"rank {self.rank} heard nothing from the test for {timeout_s} s")
        return pickle.loads(self.pipe.recv_bytes())

    def end_together(self, buffer: Buffer, tally: Tally) -> None:
        """Reports once the others are done too, and closes when all have reported: nobody's leave disturbs anybody."""
        self.board.ended[self.rank] = 1
        self.say("done")
        gone = set(self.hear())
        deadline = time.monotonic() + 5.0
        while gone & set(buffer.view.active_ranks) and tally.error is None and time.monotonic() < deadline:
            time.sleep(0.002)
        self.say(Report(self.rank, tally, buffer.views(), buffer.evidence()))
        self.hear()
        buffer.close()


def _send(pipe: Connection, what: Any) -> None:
    # Plain pickles: multiprocessing's own would send a tensor as a handle of shared memory.
    pipe.send_bytes(pickle.dumps(what))


@dataclass(frozen=True)
class _Seat:
    """What a forked rank is given."""

    rank: int
    num_ranks: int
    config: Config
    task: Callable[[Here], Any]
    guards_off: tuple[str, ...]
    pipe: Connection
    board: Board
    port: int
    words: Path  # takes its stacks when it is asked for them
    joins: bool
    num_founders: int


def _live(seat: _Seat) -> None:
    """The life of a rank's process."""
    die_with_my_parent()
    torch.set_num_threads(1)
    try:
        faulthandler.register(signal.SIGUSR1, file=seat.words.open("w"), all_threads=True)
        names = core.guard_names()
        core.set_guards_off(sum(1 << names.index(guard) for guard in seat.guards_off))
        here = Here(seat.rank, seat.num_ranks, seat.config, seat.pipe, seat.board, seat.port, seat.joins)
        here.num_founders = seat.num_founders
        _send(seat.pipe, ("ended", seat.task(here)))
    except BaseException:
        _send(seat.pipe, ("failed", traceback.format_exc()))


def _host_store(pipe: Connection) -> None:
    """A process for the store alone, so that it can be killed alone."""
    die_with_my_parent()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _send(pipe, store.port)
    while (key := pickle.loads(pipe.recv_bytes())) is not None:
        _send(pipe, bytes(store.get(key)).decode() if store.check([key]) else "")


def die_with_my_parent() -> None:
    """Whose end kills this process: the server ends when the test process does, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass(frozen=True)
class Former:
    """A process whose rank another one has taken: dead, stopped or woken, and no member any more."""

    pipe: Connection
    process: Any

    def wake(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def report(self) -> Report:
        """What it knows once it has learnt that it is out, and ran no more rounds."""
        assert self._hear() == "done"
        _send(self.pipe, [])
        report: Report = self._hear()
        return report

    def _hear(self) -> Any:
        assert self.pipe.poll(_PATIENCE_S), "a former rank said nothing"
        return pickle.loads(self.pipe.recv_bytes())


class Ranks:
    """``num_ranks`` processes that run ``task``, and their store. A context: afterwards every process is gone.

    Args:
        num_ranks: how many.
        config: of every rank's buffer.
        task: called with a ``Here`` on every rank; picklable, so a function of a module or a partial of one.
        guards_off: guards that are out on every rank.
        num_founders: so many construct the group, if not all; the others join with ``grow``.
    """

    def __init__(
        self,
        num_ranks: int,
        config: Config,
        task: Callable[[Here], Any],
        guards_off: Iterable[str] = (),
        num_founders: int | None = None,
    ) -> None:
        self.num_founders = num_founders or num_ranks
        self.num_ranks, self.config, self.task, self.guards_off = num_ranks, config, task, tuple(guards_off)
        self.board = Board.of(num_ranks)
        self.killed: set[int] = set()  # on purpose, by the test or by a fault it armed
        self._words = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._former: list[Former] = []
        self._token = ""

    def __enter__(self) -> Self:
        self._host_pipe, theirs = SERVER.Pipe()
        self._host = SERVER.Process(target=_host_store, args=(theirs,), daemon=True)
        try:
            self._host.start()
            theirs.close()
            self._port = self._receive(self._host_pipe, "the store's host")
            for rank in range(self.num_founders):
                pipe, process = self._start(rank)
                self._pipes.append(pipe)
                self._processes.append(process)
        except BaseException:
            self._clean_up()
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        left = self._clean_up(patience_s=5.0 if kind is None else 0.0)
        if kind is not None:
            return
        codes = {rank: process.exitcode for rank, process in enumerate(self._processes)}
        bad = {rank: code for rank, code in codes.items() if code != 0 and rank not in self.killed}
        assert not bad, f"exit codes of ranks that nobody killed: {bad}"
        assert not left, f"names left in /dev/shm: {left}"

    def _start(self, rank: int, joins: bool = False) -> tuple[Connection, Any]:
        ours, theirs = SERVER.Pipe()
        words = Path(self._words.name) / f"{rank}-{len(self._former)}"
        who = (rank, self.num_ranks, self.config, self.task, self.guards_off)
        seat = _Seat(*who, theirs, self.board, self._port, words, joins, self.num_founders)
        process = SERVER.Process(target=_live, args=(seat,), daemon=True)
        process.start()
        theirs.close()
        return ours, process

    def replace(self, rank: int) -> Former:
        """A new process joins as this rank. Returns what was there before, dead or not; it is ended with the rest."""
        former = Former(self._pipes[rank], self._processes[rank])
        self._former.append(former)
        self.killed.discard(rank)
        self._pipes[rank], self._processes[rank] = self._start(rank, joins=True)
        return former

    def grow(self) -> int:
        """A process joins as the lowest rank that never was; returns which."""
        pipe, process = self._start(len(self._pipes), joins=True)
        self._pipes.append(pipe)
        self._processes.append(process)
        return len(self._pipes) - 1

    # -- talking -----------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> list[int]:
        return [rank for rank, process in enumerate(self._processes) if process.is_alive()]

    def tell(self, what: Any, ranks: Iterable[int]) -> None:
        for rank in ranks:
            _send(self._pipes[rank], what)

    def hear(self, rank: int, timeout_s: float = _PATIENCE_S) -> Any:
        """The rank's next word. An exception on its side is one here."""
        return self._receive(self._pipes[rank], f"rank {rank}", timeout_s, rank)

    def hear_all(self, ranks: Iterable[int], what: Any) -> None:
        for rank in ranks:
            heard = self.hear(rank)
            assert heard == what, f"rank {rank} said {heard!r} instead of {what!r}"

    def result(self, rank: int) -> Any:
        """What the rank's task returned."""
        how, value = self.hear(rank)
        assert how == "ended", f"rank {rank}: {how} {value}"
        return value

    def _receive(self, pipe: Connection, who: str, timeout_s: float = _PATIENCE_S, rank: int | None = None) -> Any:
        if not pipe.poll(timeout_s):
            raise TimeoutError(f"{who} said nothing for {timeout_s} s. {self._stacks()}")
        try:
            heard = pickle.loads(pipe.recv_bytes())
        except EOFError:
            code = None if rank is None else self._processes[rank].exitcode
            raise AssertionError(f"{who} is gone, exit code {code}, and said nothing more") from None
        if isinstance(heard, tuple) and heard[0] == "failed":
            raise AssertionError(f"{who} failed:\n{heard[1]}")
        return heard

    def _stacks(self) -> str:
        """Where every rank stands: for a rank that hangs."""
        for rank in self.alive:
            self.signal(rank, signal.SIGUSR1)
        time.sleep(0.5)
        begun = {rank: self.board.begun[rank] for rank in self.alive}
        words = [f"rank {path.name}: {path.read_text()}" for path in sorted(Path(self._words.name).iterdir())]
        return "\n".join([f"Rounds begun: {begun}", *words])

    # -- rounds ------------------------------------------------------------------------------------------------------

    def wait_ready(self) -> None:
        self.hear_all(range(self.num_founders), "ready")

    def wait_begun(self, round_number: int, *ranks: int) -> None:
        """Until each of the ranks has begun that round, or runs no more rounds at all."""

        def begun() -> bool:
            return all(self.board.begun[rank] >= round_number or self.board.ended[rank] for rank in ranks)

        self.wait_until(begun, f"ranks {ranks} to begin round {round_number}")

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = _PATIENCE_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout_s} s for {what}. {self._stacks()}")
            time.sleep(_LOOK_S)  # no tight loop: the ranks need the processor

    def end_after(self, num_more: int) -> int:
        """Every rank that lives stops after the same round, ``num_more`` after the newest that any has begun."""
        last = max(self.board.begun) + num_more
        self.board.last_round[0] = last
        return last

    def reports(self, gone: Iterable[int] = ()) -> dict[int, Report]:
        """Waits until every rank that was not killed is done, and takes its report. ``gone``: who leaves the view."""
        ranks = [rank for rank in range(self.num_ranks) if rank not in self.killed]
        self.hear_all(ranks, "done")
        self.tell(list(gone), ranks)
        reports = {rank: self.hear(rank) for rank in ranks}
        self.tell("close", ranks)
        for rank in ranks:
            self.result(rank)
        return reports

    # -- faults ------------------------------------------------------------------------------------------------------

    def signal(self, rank: int, number: int) -> None:
        """By pid, and only while it is our process: a reaped pid may belong to somebody else."""
        if self._processes[rank].is_alive():
            os.kill(self._processes[rank].pid, number)

    def kill(self, *ranks: int) -> None:
        self.killed.update(ranks)
        for rank in ranks:
            self.signal(rank, signal.SIGKILL)

    def stop(self, rank: int) -> None:
        self.signal(rank, signal.SIGSTOP)
        self.wait_stopped(rank)

    def wake(self, rank: int) -> None:
        self.signal(rank, signal.SIGCONT)

    def wait_stopped(self, rank: int) -> None:
        self.wait_until(lambda: _state(self._processes[rank].pid) == "T", f"rank {rank} to be stopped")

    def wait_gone(self, rank: int) -> None:
        self._processes[rank].join(_PATIENCE_S)
        assert not self._processes[rank].is_alive(), f"rank {rank} still runs"

    def kill_store(self) -> None:
        self._learn_token()
        os.kill(self._host.pid, signal.SIGKILL)
        self._host.join(_PATIENCE_S)

    # -- the end -----------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """This group's names in /dev/shm."""
        self._learn_token()
        return sorted(path.name for path in Path("/dev/shm").glob(f"fa2a-{self._token}-*")) if self._token else []

    def _learn_token(self) -> None:
        if self._token or not self._host.is_alive():
            return
        _send(self._host_pipe, Group(None, 0, self.num_ranks).key("start", 0))
        introduction = self._receive(self._host_pipe, "the store's host")
        self._token = introduction.split()[1] if introduction else ""

    def _clean_up(self, patience_s: float = 0.0) -> list[str]:
        """Every process is ended by its pid; returns the names that were left in /dev/shm, which are gone too."""
        deadline = time.monotonic() + patience_s
        for rank, process in enumerate(self._processes):
            if rank not in self.killed:
                process.join(max(0.0, deadline - time.monotonic()))  # it said its last word and is about to end
        for process in [*self._processes, *(one.process for one in self._former)]:
            if process.is_alive():
                process.kill()
                process.join(_PATIENCE_S)
        left = self.names()
        for name in left:
            (Path("/dev/shm") / name).unlink(missing_ok=True)
        if self._host.is_alive():
            self._host.kill()
        self._host.join(_PATIENCE_S)
        for pipe in [self._host_pipe, *self._pipes, *(one.pipe for one in self._former)]:
            pipe.close()
        self._words.cleanup()
        return left


def _state(pid: int) -> str:
    """One letter of /proc: R, S, T (stopped)..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
