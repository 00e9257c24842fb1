"""A team whose ranks mpirun starts. It meets and is timed like any other, through descriptors that it is handed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from .barrier import Barrier, Place
from .machine import IMPORT_ROOT, PACKAGE
from .mpi import Mpi
from .systems import System
from .teams import Team, TeamFailedError, die_with, serve
from .work import Shape

_START_TIMEOUT_S = 120
_END_TIMEOUT_S = 5


class MpiTeam(Team):
    """``shape.ranks`` processes under one mpirun, which share this host's cores like every team's."""

    make_system: type[Mpi]  # type: ignore[assignment]

    def _launch(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{self.folder.name}/meet")
        self.listener.listen(self.shape.ranks)
        task = {"team": self.name, "peer": self.make_system.__name__, "shape": asdict(self.shape), "seed": self.seed}
        command = [
            *("mpirun", "--oversubscribe", "--bind-to", "none", "--mca", "pml", "ob1", "--mca", "btl", "self,vader"),
            *("--mca", "btl_vader_single_copy_mechanism", self.make_system.single_copy),
            *(["--allow-run-as-root"] if os.geteuid() == 0 else []),
            *("-n", str(self.shape.ranks), sys.executable, "-m", f"{PACKAGE}.mpi_team"),
            *(self.listener.getsockname(), json.dumps(task)),
        ]
        self.starter = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self.words[0],
            stderr=self.words[0],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(IMPORT_ROOT)])},
            preexec_fn=partial(die_with, os.getpid(), signal.SIGTERM),  # mpirun then ends its ranks
        )

    def _tell_port(self, port: int) -> None:
        """Hands each rank what it needs to meet: the port of the store, the barrier, and where to write its words."""
        self.listener.settimeout(1)
        for _ in range(_START_TIMEOUT_S):
            with contextlib.suppress(TimeoutError):
                while len(self.pids) < self.shape.ranks:
                    self._greet(self.listener.accept()[0], port)
                return
            self._check_ranks()
        raise TeamFailedError(
            f"{len(self.pids)} of {self.shape.ranks} ranks came within {_START_TIMEOUT_S} s of mpirun"
        )

    def _greet(self, rank_socket: socket.socket, port: int) -> None:
        with rank_socket:
            rank, pid = json.loads(rank_socket.recv(256))
            self.pids[rank] = pid
            descriptors = [*self.barrier.descriptors(), self.words[rank].fileno()]
            socket.send_fds(rank_socket, [json.dumps(port).encode()], descriptors)

    def _check_ranks(self) -> None:
        if self.starter.poll() is not None:
            said = next((words for words in map(self._last_words, self.pids) if "Error" in words), self._last_words(0))
            raise TeamFailedError(f"mpirun ended with exit code {self.starter.returncode}: {said}")

    def _signal(self, number: int) -> None:
        for pid in self.pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _reap_ended(self) -> dict[int, int]:
        if self.starter.poll() is not None:
            self.pids.clear()
        return {}

    def _kill_ranks(self) -> None:
        # By mpirun, which also takes its segments out of /dev/shm; by hand only what is left then.
        if self.starter.poll() is None and self.pids:
            self._signal(signal.SIGCONT)
        self.starter.terminate()
        try:
            self.starter.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self.starter.kill()
            self.starter.wait()
        self.listener.close()
        self.folder.cleanup()


def team_of(name: str, system: type[System], shape: Shape, seed: int) -> Callable[[], Team]:
    """What makes the team that runs a system: its ranks are forked, or mpirun's."""
    return partial(MpiTeam if issubclass(system, Mpi) else Team, name, system, shape, seed)


def main() -> None:
    """One rank, as mpirun starts it."""
    from .peers import PEERS

    address, task = sys.argv[1], json.loads(sys.argv[2])
    die_with(os.getppid())
    rank, shape = int(os.environ["OMPI_COMM_WORLD_RANK"]), Shape(**task["shape"])
    with socket.socket(socket.AF_UNIX) as parent:
        parent.connect(address)
        parent.sendall(json.dumps([rank, os.getpid()]).encode())
        port, descriptors, _, _ = socket.recv_fds(parent, 64, shape.ranks + 4)
    *of_barrier, words = descriptors
    os.dup2(words, 1)
    os.dup2(words, 2)
    peer = next(peer for peer in PEERS.values() if peer.__name__ == task["peer"])
    place = Place(Barrier.of_descriptors(of_barrier), rank)
    serve(place, task["team"], peer, shape, task["seed"], json.loads(port))


if __name__ == "__main__":
    main()
