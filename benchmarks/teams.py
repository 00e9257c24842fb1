"""Teams of processes that take turns: one team runs a system, all others stand still meanwhile (SIGSTOP)."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from typing import IO, Any

import torch
import torch.distributed

from .barrier import Barrier, Place
from .systems import System
from .work import NUM_BATCHES, Batch, Shape

END, BUILD, CHECK, SETTLE, SPLIT, WHOLE, JUDGE = range(7)
_BUILD_TIMEOUT_S = 180
_ROUND_TIMEOUT_S = 120
_END_TIMEOUT_S = 20
_FOLLOWERS_S = 0.3  # after a rank's end, for those that end because of it
_LAST_WORDS = 300  # characters of a failed rank's stderr
_PR_SET_PDEATHSIG = 1


class TeamFailedError(Exception):
    """A team cannot go on: a rank died, hung or gave a wrong answer. The text says which, and what it said last."""


class Team:
    """``shape.ranks`` processes that run one system. Forks at once; nothing is built until ``build``.

    Args:
        make_system: constructs the system on a rank: ``make_system(shape, rank, store)``.
        name: of the system, and of its keys in the store.
        environment: set in the processes before they import anything of the package.
    """

    def __init__(
        self,
        name: str,
        make_system: Callable[[Shape, int, Any], System],
        shape: Shape,
        seed: int,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name, self.shape, self.seed = name, shape, seed
        self.make_system, self.environment = make_system, environment or {}
        self.barrier = Barrier(shape.ranks)
        self.pids: dict[int, int] = {}  # of the ranks that are not reaped
        # What each of them says; closed with the team.
        self.words: list[IO[bytes]] = [tempfile.TemporaryFile() for _ in range(shape.ranks)]  # noqa: SIM115
        self._launch()

    def _launch(self) -> None:
        self.port_pipe = os.pipe()
        for rank in range(self.shape.ranks):
            self._fork(rank)
        os.close(self.port_pipe[0])

    def _fork(self, rank: int) -> None:
        words, parent_pid = self.words[rank], os.getpid()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                die_with(parent_pid)
                os.dup2(words.fileno(), 1)
                os.dup2(words.fileno(), 2)
                self._serve(rank)
                status = 0
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(status)  # never back into the parent's code
        self.pids[rank] = pid

    # -- a rank's side -----------------------------------------------------------------------------------------------

    def _serve(self, rank: int) -> None:
        os.close(self.port_pipe[1])
        port = int.from_bytes(os.read(self.port_pipe[0], 4), "little")
        if port == 0:
            return  # the parent gave up before there was a store
        os.environ.update(self.environment)
        serve(Place(self.barrier, rank), self.name, self.make_system, self.shape, self.seed, port)

    # -- the parent's side -------------------------------------------------------------------------------------------

    def build(self, port: int, num_check_rounds: int) -> None:
        """Constructs the system on every rank and checks its answers; leaves the team standing still.

        Raises:
            TeamFailedError: it could not be built, or an answer is wrong.
        """
        self._tell_port(port)
        self._wait(_BUILD_TIMEOUT_S)
        self.barrier.let_go(BUILD)
        self._wait(_BUILD_TIMEOUT_S)
        for _ in range(num_check_rounds):
            self._time(CHECK)
            self._judge()
        self._signal(signal.SIGSTOP)

    def _tell_port(self, port: int) -> None:
        for _ in range(self.shape.ranks):
            os.write(self.port_pipe[1], port.to_bytes(4, "little"))

    def turn(self, orders: Sequence[int]) -> dict[str, list[float]]:
        """Wakes the team, runs the rounds that are ordered, and stops it again. Times in us, every one checked.

        Returns:
            ``dispatch`` and ``combine``, one entry for each SPLIT; ``pair``, one for each WHOLE.
        """
        times: dict[str, list[float]] = {"dispatch": [], "combine": [], "pair": []}
        self._signal(signal.SIGCONT)
        for order in orders:
            if order == SPLIT:
                times["dispatch"].append(self._time(order))
                times["combine"].append(self._time(order))
            elif order == WHOLE:
                times["pair"].append(self._time(order))
            else:
                self._time(order)
            self._judge()
        self._signal(signal.SIGSTOP)
        return times

    def _time(self, order: int) -> float:
        began_ns = self.barrier.let_go(order)
        return (self._wait(_ROUND_TIMEOUT_S) - began_ns) / 1e3

    def _judge(self) -> None:
        self.barrier.let_go(JUDGE)
        self._wait(_ROUND_TIMEOUT_S)

    def _wait(self, timeout_s: float) -> int:
        try:
            return self.barrier.wait_for_all(timeout_s, self._check_ranks)
        except TimeoutError as error:
            raise TeamFailedError(str(error)) from None

    def _check_ranks(self) -> None:
        ended = self._reap_ended()
        if not ended:
            return
        time.sleep(_FOLLOWERS_S)
        ended |= self._reap_ended()
        # Those that a signal ended first: the others only say that they missed somebody.
        ranks = sorted(ended, key=lambda rank: (not os.WIFSIGNALED(ended[rank]), rank))
        raise TeamFailedError(
            "; ".join(f"rank {rank} ended with {_exit_words(ended[rank])}: {self._last_words(rank)}" for rank in ranks)
        )

    def _reap_ended(self) -> dict[int, int]:
        """The ranks that ended since they were last looked at, with their exit status."""
        ended = {}
        for rank, pid in list(self.pids.items()):
            reaped, status = os.waitpid(pid, os.WNOHANG)
            if reaped:
                del self.pids[rank]
                ended[rank] = status
        return ended

    def _last_words(self, rank: int) -> str:
        descriptor = self.words[rank].fileno()
        text = os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace").strip()
        last_line = text.splitlines()[-1] if text else "it said nothing"
        return last_line[-_LAST_WORDS:]

    def _signal(self, number: int) -> None:
        for pid in self.pids.values():
            os.kill(pid, number)

    def end(self) -> None:
        """Lets the ranks close their system and leave; ends by process id those that do not. May be repeated."""
        if not self.pids and not self.words:
            return
        try:
            if len(self.pids) == self.shape.ranks and self.barrier.num_meetings:
                self._signal(signal.SIGCONT)
                self.barrier.let_go(END)
                self._wait(_END_TIMEOUT_S)
                self.barrier.let_go(END)
                self._reap(_END_TIMEOUT_S)
        except TeamFailedError:
            pass  # it is being ended anyway
        finally:
            self.kill()

    def _reap(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self.pids and time.monotonic() < deadline:
            self._reap_ended()
            time.sleep(0.005)

    def kill(self) -> None:
        """Ends what still runs, by process id, and frees what the parent held for it. May be repeated."""
        self._kill_ranks()
        self.pids.clear()
        if self.words:
            for words in self.words:
                words.close()
            self.barrier.close()
        self.words = []

    def _kill_ranks(self) -> None:
        for pid in self.pids.values():
            os.kill(pid, signal.SIGKILL)
        for pid in self.pids.values():
            os.waitpid(pid, 0)
        if self.words:
            os.close(self.port_pipe[1])


def serve(
    place: Place, name: str, make_system: Callable[[Shape, int, Any], System], shape: Shape, seed: int, port: int
) -> None:
    """A rank's life: builds the system when it is told to, runs the rounds it is told to, and leaves.

    Raises:
        AssertionError: an answer was wrong.
    """
    if place.meet() != BUILD:
        return
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // shape.ranks))
    store = torch.distributed.PrefixStore(name, torch.distributed.TCPStore("127.0.0.1", port))
    batches = [Batch(shape, place.rank, seed + i) for i in range(NUM_BATCHES)]
    system = make_system(shape, place.rank, store)
    for batch in batches:
        _ = batch.of_identity, batch.of_factors  # computed now, not between two rounds
    gc.collect()
    gc.disable()  # a collection in the middle of a round would be charged to it
    place.stamp()
    order, num_rounds = place.meet(), 0
    while order != END:
        _run_round(system, batches[num_rounds % NUM_BATCHES], order, place)
        num_rounds += 1
        order = place.meet()
    system.close()
    place.stamp()
    place.meet()


def _run_round(system: System, batch: Batch, order: int, place: Place) -> None:
    """One round, and then its answer. Raises when the answer is wrong: a wrong system has no time."""
    received, handle = system.dispatch(batch)
    if order == SPLIT:
        place.stamp()
        place.meet()
    if order == CHECK:
        system.apply_factors(received)
    out = system.combine(received, handle)
    place.stamp()
    # Only when the last rank is done: whoever checked at once would take the processor from those still at work.
    place.meet()
    answer = batch.of_factors if order == CHECK else batch.of_identity
    trouble = system.trouble() or (system.computes and answer.trouble(out, system.bit_exact))
    if trouble:
        raise AssertionError(f"wrong answer: {trouble}")


def die_with(parent_pid: int, number: int = signal.SIGKILL) -> None:
    """A parent that is killed cannot end its ranks, stopped ones least of all: this process gets the signal then."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent_pid:
        os._exit(1)


def _exit_words(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    return f"exit code {os.WEXITSTATUS(status)}"


def check_can_fork() -> None:
    """Raises ``RuntimeError`` if this process has several threads, whose locks a fork would copy without them."""
    num_threads = len(os.listdir("/proc/self/task"))
    if num_threads != 1:
        raise RuntimeError(
            f"a benchmark forks its ranks, and this process has {num_threads} threads; run it as a command of its own"
        )


def resolve_names_locally() -> None:
    """Keeps the store from asking a name server who 127.0.0.1 is: where none answers, each question costs seconds."""
    configure = getattr(ctypes.CDLL(None), "__nss_configure_lookup", None)
    if configure is not None:
        configure(b"hosts", b"files")


def in_a_fork(ask: Callable[[], Any]) -> Any:
    """What ``ask`` returns (as JSON can say it) in a process of its own.

    The parent must not import the package, since every team chooses its own core; so it has a child ask.

    Raises:
        ValueError: with the text of whatever ``ask`` raised.
    """
    reading, writing = os.pipe()
    parent_pid, pid = os.getpid(), os.fork()
    if pid == 0:
        try:
            die_with(parent_pid)
            try:
                answer = {"is": ask()}
            except Exception as error:
                answer = {"error": str(error)}
            os.write(writing, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    answer = json.loads(text or b'{"error": "the process that was asked died"}')
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["is"]
