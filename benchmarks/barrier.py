"""Where the ranks of a team meet between rounds, and where the parent reads the clock for all of them."""

from __future__ import annotations

import mmap
import os
import select
import time
from collections.abc import Callable

_WORD_BYTES = 8
_LOOK_MS = 200  # how often somebody who waits for a rank asks whether it still lives


class Barrier:
    """Made before the ranks start; the parent calls ``wait_for_all`` and ``let_go``, each rank has a ``Place``.

    The clock is CLOCK_MONOTONIC, which all processes of a machine share. A round lasts from the instant before the
    parent opens the door to the stamp of the last rank: the time that a rank needs to be scheduled belongs to it, for
    every system alike. A rank's own start would hide that, and flatter whoever keeps the processors busy.
    """

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        # One a rank: whoever counted all arrivals in one word would be woken by each, and take a core from the last.
        self.arrived = [os.eventfd(0) for _ in range(num_ranks)]
        # Two, in turns: through one door a fast rank could pass twice, in place of a slow one.
        self.doors = [os.eventfd(0, os.EFD_SEMAPHORE) for _ in range(2)]
        self.memory = os.memfd_create("barrier")
        os.ftruncate(self.memory, _WORD_BYTES * (num_ranks + 1))
        self._map()

    def _map(self) -> None:
        self._mapped = mmap.mmap(self.memory, _WORD_BYTES * (self.num_ranks + 1))
        self.words = memoryview(self._mapped).cast("q")  # the order, then a stamp for each rank
        self.num_meetings = 0

    def descriptors(self) -> list[int]:
        """What a rank that is no fork of this process needs; see ``of_descriptors``."""
        return [*self.arrived, *self.doors, self.memory]

    @classmethod
    def of_descriptors(cls, descriptors: list[int]) -> Barrier:
        """The same barrier in another process, from its own copies of ``descriptors()``."""
        barrier = cls.__new__(cls)
        *barrier.arrived, first, second, barrier.memory = descriptors
        barrier.doors, barrier.num_ranks = [first, second], len(barrier.arrived)
        barrier._map()
        return barrier

    def wait_for_all(self, timeout_s: float, check_ranks: Callable[[], None]) -> int:
        """Returns the stamp of the last rank, in ns.

        Raises:
            TimeoutError: somebody did not come. ``check_ranks`` may raise first, if it knows better.
        """
        deadline = time.monotonic() + timeout_s
        for rank, descriptor in enumerate(self.arrived):
            waiting = select.poll()
            waiting.register(descriptor, select.POLLIN)
            while not waiting.poll(_LOOK_MS):
                check_ranks()
                if time.monotonic() > deadline:
                    raise TimeoutError(f"rank {rank} did not finish within {timeout_s:.0f} s")
            os.eventfd_read(descriptor)
        return max(self.words[1:])

    def let_go(self, order: int) -> int:
        """Gives every rank the order; returns the instant before, in ns."""
        self.words[0] = order
        door = self.doors[self.num_meetings % 2]
        self.num_meetings += 1
        now_ns = time.monotonic_ns()
        os.eventfd_write(door, self.num_ranks)
        return now_ns

    def close(self) -> None:
        self.words.release()
        self._mapped.close()
        for descriptor in self.descriptors():
            os.close(descriptor)


class Place:
    """One rank's side of the barrier."""

    def __init__(self, barrier: Barrier, rank: int) -> None:
        self.barrier, self.rank = barrier, rank

    def stamp(self) -> None:
        """My part of what is measured is done now."""
        self.barrier.words[1 + self.rank] = time.monotonic_ns()

    def meet(self) -> int:
        """Waits for the others; returns the next order."""
        barrier = self.barrier
        os.eventfd_write(barrier.arrived[self.rank], 1)
        os.eventfd_read(barrier.doors[barrier.num_meetings % 2])
        barrier.num_meetings += 1
        return int(barrier.words[0])
