"""The ranks that meet: a store for rendezvous, this rank's number, and how many there are."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fault_a2a.errors import ConstructError
from fault_a2a.placement import MAX_NUM_RANKS

LONGEST_PAUSE_S = 0.02  # between two looks at the store


@dataclass(frozen=True)
class Group:
    """Who takes part in a buffer.

    Args:
        store: a ``torch.distributed`` store that all ranks reach (``TCPStore``, ``HashStore``). It is used for
            construction, and with ``Config(agreement="store")`` to decide between proposals for a view; otherwise it
            may be lost afterwards. No row and no beat goes through it.
        rank: this rank, 0 to ``num_ranks - 1``.
        num_ranks: ranks of the group, 1 to 1024. Of a rank that joins one with room for more: ``max_num_ranks``.
        name: several groups on one store need different names. Several buffers of one group do not, if every rank
            constructs them in the same order; who joins, joins the newest of that name.
        fabric: virtual ranks of one process share one (see ``fault_a2a.testing.VirtualRanks``); ``None`` means shared
            memory between the processes of this host.
        construction: set by ``introduce``.
    """

    store: Any
    rank: int
    num_ranks: int
    name: str = "default"
    fabric: Any = None
    construction: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.num_ranks <= MAX_NUM_RANKS:
            raise ValueError(f"num_ranks is {self.num_ranks}; give a number from 1 to {MAX_NUM_RANKS}")
        if not 0 <= self.rank < self.num_ranks:
            raise ValueError(f"rank is {self.rank}; give a number from 0 to num_ranks - 1 = {self.num_ranks - 1}")

    def key(self, *parts: object) -> str:
        construction = [self.construction] if self.construction else []
        return "/".join(["fault_a2a", self.name, *construction, *map(str, parts)])

    def meet(
        self, point: str, deadline: float, value: str = "here", trouble: Callable[[], str] | None = None
    ) -> list[str]:
        """Waits until every rank has come to ``point``; returns what each brought. Collective, bounded by ``deadline``.

        ``trouble`` is asked again and again: a sentence ends the waiting early.

        Raises:
            ConstructError: naming the ranks that did not come, or quoting ``trouble``.
        """
        keys = [self.key(point, rank) for rank in range(self.num_ranks)]
        try:
            self.store.set(keys[self.rank], value)
            self._wait(keys, point, deadline, trouble or (lambda: ""))
            return self._read(keys)
        except ConstructError:
            raise
        except RuntimeError as error:  # the store's own errors are
            raise ConstructError(f"group '{self.name}' lost its store on the way to '{point}' ({error}).") from error

    def introduce(self, value: str, deadline: float) -> tuple[Group, list[str]]:
        """The first meeting: what each rank brought, and this group with keys that only this construction uses.

        The store may still hold what an earlier buffer or attempt brought. So each rank publishes a digest of all that
        it read, and reads again until all digests are the same: whoever has the digest of my new ``value`` has read it.
        ``value`` must be unlike any that this rank brought before.
        """
        brought = self.meet("start", deadline, value)
        start_keys = [self.key("start", rank) for rank in range(self.num_ranks)]
        while True:
            digest = hashlib.sha256("\n".join(brought).encode()).hexdigest()[:16]
            digests = self.meet("read", deadline, digest)
            others = [rank for rank, other in enumerate(digests) if other != digest]
            if not others:
                return replace(self, construction=digest), brought
            if time.monotonic() >= deadline:
                raise ConstructError(f"ranks {others} did not join this attempt of group '{self.name}' in time")
            time.sleep(LONGEST_PAUSE_S)
            brought = self._read(start_keys)

    def _read(self, keys: list[str]) -> list[str]:
        return [bytes(self.store.get(key)).decode() for key in keys]

    def _wait(self, keys: list[str], point: str, deadline: float, trouble: Callable[[], str]) -> None:
        # Not store.wait(): when its time is over it writes to stderr, and a rank that is late is no news.
        pause_s = 0.001
        while not self.store.check(keys):
            sentence = trouble()
            # Whoever came through has done so after all had come: it may leave, or even die, while I am asleep.
            if sentence and not self.store.check(keys):
                raise ConstructError(sentence)
            if time.monotonic() >= deadline:
                missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
                if missing:
                    raise ConstructError(f"ranks {missing} did not reach '{point}' of group '{self.name}' in time")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def host_of_this_process() -> str:
    """Two processes with the same value map the same /dev/shm: one kernel boot, one mount."""
    with open("/proc/sys/kernel/random/boot_id") as boot_id:
        return f"{boot_id.read().strip()}-{os.stat('/dev/shm').st_dev}"


def forget_names(token: str) -> None:
    """Takes a group's names out of /dev/shm. Those of a rank that was killed have nobody else to do it."""
    for path in Path("/dev/shm").glob(f"fa2a-{token}-*"):
        path.unlink(missing_ok=True)


def as_group(group: Any) -> Group:
    """Takes a ``Group`` as it is, and makes one of a process group.

    That is one of ``torch.distributed``, registered there or made without it (stateless), or any object with a
    ``store``, a ``rank`` and a ``world_size``.
    """
    if isinstance(group, Group):
        return group
    import torch.distributed as dist

    if isinstance(group, dist.ProcessGroup):
        if group in dist.distributed_c10d._world.pg_map:
            store = dist.distributed_c10d._get_default_store()
            return Group(store, group.rank(), group.size(), name=f"pg-{group.group_name}")
        # Nobody has given it a name, and its store is its own.
        return Group(group.get_group_store(), group.rank(), group.size(), name="stateless")
    if isinstance(getattr(group, "store", None), dist.Store):
        return Group(group.store, int(group.rank), int(group.world_size), name="stateless")
    raise TypeError(
        f"group is a {type(group).__name__}; give a fault_a2a.Group, a torch.distributed process group, or an object "
        "with store, rank and world_size"
    )
