"""The ranks that meet: a store for rendezvous, this rank's number, and how many there are."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from fault_a2a.errors import ConstructError
from fault_a2a.placement import MAX_NUM_RANKS


@dataclass(frozen=True)
class Group:
    """Who takes part in a buffer.

    Args:
        store: a ``torch.distributed`` store that all ranks reach (``TCPStore``, ``HashStore``). It is used for
            construction and, until agreement over the windows themselves is built, to decide between proposals for a
            view; no row and no beat goes through it.
        rank: this rank, 0 to ``num_ranks - 1``.
        num_ranks: ranks of the group, 1 to 1024.
        name: several groups on one store need different names.
        fabric: virtual ranks of one process share one (see ``fault_a2a.testing.VirtualRanks``); ``None`` means shared
            memory between the processes of this host.
    """

    store: Any
    rank: int
    num_ranks: int
    name: str = "default"
    fabric: Any = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_ranks <= MAX_NUM_RANKS:
            raise ValueError(f"num_ranks is {self.num_ranks}; give a number from 1 to {MAX_NUM_RANKS}")
        if not 0 <= self.rank < self.num_ranks:
            raise ValueError(f"rank is {self.rank}; give a number from 0 to num_ranks - 1 = {self.num_ranks - 1}")

    def key(self, *parts: object) -> str:
        return "/".join(["fault_a2a", self.name, *map(str, parts)])

    def meet(self, point: str, deadline: float, value: str = "here") -> list[str]:
        """Waits until every rank has come to ``point``; returns what each brought. Collective, bounded by ``deadline``.

        Raises:
            ConstructError: naming the ranks that did not come.
        """
        self.store.set(self.key(point, self.rank), value)
        keys = [self.key(point, rank) for rank in range(self.num_ranks)]
        while not self._all_there(keys, deadline):
            if time.monotonic() < deadline:
                continue
            missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            if missing:
                raise ConstructError(f"ranks {missing} did not reach '{point}' of group '{self.name}' in time")
        return [bytes(self.store.get(key)).decode() for key in keys]

    def _all_there(self, keys: list[str], deadline: float) -> bool:
        try:
            left = min(max(deadline - time.monotonic(), 0.0), 1.0)
            self.store.wait(keys, timedelta(seconds=left + 0.001))
            return True
        except RuntimeError:  # DistStoreError, the store's time-out, is one
            return False


def host_of_this_process() -> str:
    """Two processes with the same value map the same /dev/shm: one kernel boot, one mount."""
    with open("/proc/sys/kernel/random/boot_id") as boot_id:
        return f"{boot_id.read().strip()}-{os.stat('/dev/shm').st_dev}"


def as_group(group: Any) -> Group:
    """Takes a ``Group`` as it is, and makes one of a ``torch.distributed`` process group."""
    if isinstance(group, Group):
        return group
    import torch.distributed as dist

    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group is a {type(group).__name__}; give a fault_a2a.Group or a torch.distributed process group"
        )
    store = dist.distributed_c10d._get_default_store()
    return Group(store, group.rank(), group.size(), name=f"pg-{group.group_name}")
