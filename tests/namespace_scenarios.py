"""A rank in a PID namespace of its own, as in a container of its own: its number is a stranger's to the others."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial

import pytest

from tests.apart import exit_code
from tests.process_rounds import Rounds, Wrong, begun_of, judge, small
from tests.processes import Here, Ranks, die_with_my_parent

APART, NUM_RANKS = 1, 3
_CLONE_NEWPID = 0x20000000
_SOON_S = 0.3  # a death is found within some milliseconds


@dataclass(frozen=True)
class Apart(Rounds):
    """As ``Rounds``; rank ``APART`` runs under the number that the test names, in a namespace of its own."""

    def __call__(self, here: Here) -> None:
        if here.rank == APART:
            _become(here.hear())
            here.say(int(os.readlink("/proc/self")))  # /proc is the test's: by its own number it would be a stranger
        super().__call__(here)


def _become(number: int) -> None:
    """Returns in a grandchild, the only one to go on, whose number is this one in a new PID namespace."""
    _new_namespace()
    _go_on_in_a_child()  # the namespace ends with its first process
    with open("/proc/sys/kernel/ns_last_pid", "w") as last:
        last.write(str(number - 1))
    _go_on_in_a_child()
    assert os.getpid() == number, f"this is {os.getpid()}, not {number}"


def _new_namespace() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWPID) != 0:
        raise OSError(ctypes.get_errno(), "unshare")


def _go_on_in_a_child() -> None:
    """Returns in a child. Its parent waits for it, and ends as it did."""
    child = os.fork()
    if child == 0:
        return die_with_my_parent()
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


@cache
def may_be_apart() -> bool:
    """May this process make PID namespaces, and choose numbers in them?"""
    return exit_code(partial(_become, 12345)) == 0


def a_stranger_ends(guards_off: Iterable[str] = ()) -> Wrong:
    """The process that has the rank's number outside of its namespace ends. That is nothing to the rank."""
    return _run(guards_off, ends_rank=False)


def the_rank_ends() -> Wrong:
    """The rank itself is killed: the others find out at once, by its death word."""
    return _run((), ends_rank=True)


def _run(guards_off: Iterable[str], ends_rank: bool) -> Wrong:
    if not may_be_apart():
        pytest.skip("PID namespaces take rights that this process does not have")
    config, task = small(NUM_RANKS), Apart(seed=3)
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        with Ranks(NUM_RANKS, config, task, guards_off) as ranks:
            ranks.tell(stranger.pid, [APART])
            number = ranks.hear(APART)
            ranks.wait_ready()
            ranks.wait_begun(5, *range(NUM_RANKS))
            if ends_rank:
                ranks.killed.add(APART)
                os.kill(number, signal.SIGKILL)
            else:
                stranger.kill()
                stranger.wait()
            time.sleep(_SOON_S)
            out = [rank for rank in range(NUM_RANKS) if ranks.board.ended[rank]]
            gone = begun_of(ranks, [APART] if ends_rank else out)
            last = ranks.end_after(3)
            reports = ranks.reports(gone)
    finally:
        stranger.kill()
        stranger.wait()
    wrong = judge(reports, task.work(config, NUM_RANKS), gone, last)
    return wrong + [f"rank {rank} is out" for rank in out]
