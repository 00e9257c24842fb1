"""Who stands still, for how long, and who may say so: accidents in which a kernel charges a stall.

What each returns is as in tests/scenarios.py, whose groups these are.
"""

from __future__ import annotations

import os
import subprocess
import time

from fault_a2a._core import core
from fault_a2a.buffer import Buffer
from fault_a2a.errors import QuorumLostError
from tests import scenarios
from tests.rig import Checker, Tally, Work, raised, run_checked, suspicions_of
from tests.scenarios import Wrong, corrupt


def hung_in_an_older_view(stall_ms: int = 600) -> Wrong:
    """Rank 3 dies, and the view without it comes while round 4 is open under the view before. Rank 2's kernel hangs in
    that round and its process beats: whoever waits for it must not do so for ever."""
    config = scenarios.small(stall_ms=stall_ms, silence_ms=60_000, link_ms=60_000)
    work = Work(config, 4)
    with scenarios.VirtualRanks(4, config) as ranks:
        ranks.buffers[3].arm("dispatch.gate", 4, "crash")
        ranks.buffers[2].arm("dispatch.rows_sent", 4, "sleep_us", 5 * stall_ms * 1000)
        tallies = run_checked(ranks, work, 8)
        wrong = corrupt(tallies)
        for rank in (0, 1):
            views = [view.active_ranks for view, _ in ranks.buffers[rank].views()]
            if views[-1] != (0, 1):
                wrong.append(f"rank {rank} waited until rank 2 came, and is in {views[-1]}")
            elif (0, 1, 2) not in views:
                wrong.append("both went at once: the scenario shows nothing")
        return wrong


def stalled_without_a_quorum(pause_s: float = 6.0) -> Wrong:
    """Ranks 0 and 1 stop, so 2 and 3 are no quorum. Rank 3 comes late to round 4, which it has promised by then not to
    begin, and its call ends; rank 2 has begun that round, waits for 3 in it, and its call must end as well."""
    config = scenarios.small(silence_ms=300, stall_ms=600, link_ms=60_000, agreement_timeout_ms=500)
    work = Work(config, 4)
    with scenarios.VirtualRanks(4, config) as ranks:
        ended_s: dict[int, float] = {}
        for rank in (0, 1):
            ranks.buffers[rank].arm("dispatch.gate", 4, "sleep_us", int(pause_s * 1e6))
        ranks.buffers[3].arm("dispatch.gate", 4, "sleep_us", 1_500_000)

        def one(buffer: Buffer) -> Tally:
            checker = Checker(buffer, work)
            checker.run(3)
            if buffer.rank in (0, 1):
                buffer.core.pause_pulse(int(pause_s * 1000))
            began_s = time.monotonic()
            tally = checker.run(1)
            ended_s[buffer.rank] = time.monotonic() - began_s
            return tally

        tallies = raised(ranks.run(one))
        wrong = corrupt(tallies)
        if not isinstance(tallies[3].error, QuorumLostError):
            wrong.append(f"rank 3 was told {tallies[3].error!r}: the scenario shows nothing")
        if ended_s[2] > pause_s - 1:
            wrong.append(f"rank 2's call ended after {ended_s[2]:.1f} s, when there was a quorum again")
        return wrong


def taken_back() -> Wrong:
    """A rank was found stalled, and a view has taken it back while the one that waits for it did not look: its kernel
    was not running, as on a chip that others use as well. What is counted then?"""
    watch, timeout_ns, wrong = core.StallWatch(), 1000, []

    def look(now_ns: int, epoch: int) -> bool:
        return watch.has_stalled(progress=7, now_ns=now_ns, looked_ns=now_ns - 200, timeout_ns=timeout_ns, epoch=epoch)

    if look(200, 0) or look(1000, 0) or not look(1200, 0) or not look(1400, 0):
        wrong.append("a stall is not found, or too early")
    if look(1600, 1) or look(2400, 1):
        wrong.append("a rank that a view took back is held again at once")
    if not look(2600, 1):
        wrong.append("a rank that was taken back and stands still is waited for for ever")
    return wrong


def stopped_host() -> Wrong:
    """Rank 0 waits for rank 1, and the whole process is stopped for longer than a stall lasts. Rank 1 comes soon after.

    For a process of its own. Silence and links are judged too late to matter: what is charged, a kernel charges.
    """
    config = scenarios.small(stall_ms=1200, silence_ms=60_000, link_ms=60_000)
    work = Work(config, 2)
    stop = f"sleep 0.2; kill -STOP {os.getpid()}; sleep 1.6; kill -CONT {os.getpid()}"
    with scenarios.VirtualRanks(2, config) as ranks:
        ranks.buffers[1].arm("dispatch.gate", 4, "sleep_us", 2_300_000)

        def one(buffer: Buffer) -> Tally:
            checker = Checker(buffer, work)
            checker.run(3)
            if buffer.rank == 0:
                subprocess.Popen(["sh", "-c", stop])
            return checker.run(3)

        tallies = raised(ranks.run(one))
        return corrupt(tallies) + [str(found) for found in suspicions_of(ranks, {0, 1})]
