"""The drill's store: a process of its own, so that the parent stays without threads and may fork whenever it wants to.

A newcomer is forked when it is known that it will be needed, which may be long after the group has begun.
"""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch.distributed

from fault_a2a.cli.drill.rank import GROUP_NAME, die_with_the_parent
from fault_a2a.group import Group

_HOST = "127.0.0.1"
_TIMEOUT = timedelta(seconds=10)
_SHARED_MEMORY = Path("/dev/shm")


class StoreProcess:
    """Serves a ``TCPStore`` until it is ended."""

    def __init__(self) -> None:
        parent_pid = os.getpid()
        told_read, told_write = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(told_read)
            _serve(told_write, parent_pid)
        os.close(told_write)
        with os.fdopen(told_read) as told:
            line = told.readline()
        if not line:
            self.end()
            raise RuntimeError("the drill's store could not be started; is there a free port on 127.0.0.1?")
        self.port = int(line)

    def end(self) -> None:
        if self._is_alive():
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)

    def _is_alive(self) -> bool:
        """False from when it was reaped: the pid may be somebody else's by then."""
        if self._pid and os.waitpid(self._pid, os.WNOHANG)[0]:
            self._pid = 0
        return self._pid != 0

    def unlink_leftovers(self, num_ranks: int) -> list[str]:
        """Removes the group's names of shared memory, and returns them. There are none once all ranks have opened."""
        if not self._is_alive():  # nobody knows by then what the group's names are
            return []
        store = torch.distributed.TCPStore(_HOST, self.port, is_master=False, timeout=_TIMEOUT)
        key = Group(store, 0, num_ranks, name=GROUP_NAME).key("start", 0)
        if not store.check([key]):
            return []
        token = bytes(store.get(key)).decode().split()[1]
        found = sorted(path.name for path in _SHARED_MEMORY.glob(f"fa2a-{token}-*"))
        for name in found:
            (_SHARED_MEMORY / name).unlink(missing_ok=True)
        return found


def _serve(told_fd: int, parent_pid: int) -> NoReturn:
    try:
        die_with_the_parent(parent_pid)
        # Whoever ends the drill may signal all of its processes; the parent asks this one about leftovers yet.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        store = torch.distributed.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
        os.write(told_fd, b"%d\n" % store.port)
        os.close(told_fd)
        while True:
            signal.pause()
    finally:
        os._exit(1)  # never back into the parent's code
