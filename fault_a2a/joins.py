"""How a process becomes a member of a group that runs: what members tell of themselves, and the newcomer's way in."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from fault_a2a._core import core
from fault_a2a.config import Config
from fault_a2a.core_fields import core_fields
from fault_a2a.errors import JoinError
from fault_a2a.gpu import gpu_fields, of_several_hosts
from fault_a2a.group import Group, host_of_this_process

_LOOK_S = 0.002  # between two looks of a newcomer; members that hold for it wait for these
_LONG_LOOK_S = 0.02  # while the members have not let it in, which takes them a step at least


@dataclass(frozen=True)
class Member:
    """What a rank tells of its present life on the store. Everything else goes over its control page.

    Attributes:
        host: see ``host_of_this_process``.
        construction: the part of the group's keys that its construction made its own.
        pid, page_fd: the process, and under which number it has its control page open.
        incarnation: which life this is.
        config: what all members must have the same.
    """

    host: str
    construction: str
    pid: int
    page_fd: int
    incarnation: int
    config: dict[str, str]


def tell_life(group: Group, endpoint: Any, pid: int, config: dict[str, str]) -> None:
    """Puts this rank's life where newcomers look for it. The newest life of a rank is the one that counts."""
    life = Member(
        host_of_this_process(), group.construction, pid, endpoint.page_fd(), int(endpoint.incarnation()), config
    )
    group.store.set(_key(group, group.rank), json.dumps(vars(life)))


def _key(group: Group, rank: int) -> str:
    return f"fault_a2a/{group.name}/lives/{rank}"


class WayIn:
    """A newcomer's endpoint on its way into a running group.

    Args:
        group: the store and name of the group, and the rank whose place this process takes.
        config: the members' own.
        device: of this rank's buffer, in its former lives too.
        num_ranks: ranks that the group has room for.
        pid: of this process.

    Raises:
        JoinError: no member can be found, or they do not fit this process.
    """

    def __init__(
        self, group: Group, config: Config, device: torch.device, num_ranks: int, pid: int, deadline: float
    ) -> None:
        self.config, self.device, self.num_ranks, self.pid, self.deadline = config, device, num_ranks, pid, deadline
        self.compared = config.compared(num_ranks)
        member = self._first_member(group)
        self.group = replace(group, construction=member.construction)
        fields = core_fields(config, num_ranks, group.rank)
        self.endpoint: Any = core.Endpoint(fields | gpu_fields(config, device), None, "")
        try:
            self.endpoint.create_newcomer()
        except RuntimeError as error:
            raise JoinError(str(error)) from error
        tell_life(self.group, self.endpoint, pid, self.compared)

    def go(self) -> None:
        """Blocks until a view with this life is decided, or ``deadline``. The endpoint serves then.

        Raises:
            JoinError: the members did not let it in in time, and the message says what was missing; or they did, and
                evicted it before it could begin. Not a ``RankEvictedError``: there may be no buffer to rejoin with.
        """
        missing = ""
        while time.monotonic() < self.deadline:
            stage, rank, incarnation = self.endpoint.go_on_joining()
            if stage == "in":
                self.endpoint.serve_as_newcomer()
                return
            if stage == "out":
                raise JoinError(f"rank {self.group.rank} was let in and evicted before it could begin.")
            if stage == "no_members":
                missing = f"rank {self.group.rank} is still in the newest view that can be found"
                self._open_all()
            elif stage == "member_unknown":
                missing = f"rank {rank} of the view has not told of its life"
                self._open(rank, incarnation)
            else:
                missing = "the members came to no step start together; all of them must call buffer.begin_step()"
            time.sleep(_LOOK_S if stage == "waits" else _LONG_LOOK_S)
        raise JoinError(f"rank {self.group.rank} was not let in by group '{self.group.name}' in time: {missing}")

    def _first_member(self, group: Group) -> Member:
        while True:
            lives = [self._life(group, rank) for rank in range(self.num_ranks) if rank != group.rank]
            for member in lives:
                if member is not None:
                    return member
            if time.monotonic() >= self.deadline:
                raise JoinError(f"nobody of group '{group.name}' has told of itself on this store")
            time.sleep(_LONG_LOOK_S)

    def _life(self, group: Group, rank: int) -> Member | None:
        try:
            if not group.store.check([_key(group, rank)]):
                return None
            member = Member(**json.loads(bytes(group.store.get(_key(group, rank))).decode()))
        except RuntimeError as error:
            raise JoinError(f"group '{group.name}' lost its store while a rank joined ({error}).") from error
        if member.host != host_of_this_process():
            raise JoinError(
                f"group: rank {rank} is on another host or sees another /dev/shm; a newcomer must run beside members."
                + of_several_hosts(self.config.backend, self.device)
            )
        for name, value in self.compared.items():
            if member.config.get(name) != value:
                raise JoinError(
                    f"rank {rank} was built with another Config: {name} is {member.config.get(name)} there and "
                    f"{value} here"
                )
        return member

    def _open_all(self) -> None:
        for rank in range(self.num_ranks):
            self._open(rank, None)

    def _open(self, rank: int, incarnation: int | None) -> None:
        member = None if rank == self.group.rank else self._life(self.group, rank)
        if member is None or incarnation not in (None, member.incarnation):
            return
        try:  # of a process that is gone there is nothing to open, and nothing to wait for
            self.endpoint.open_member(rank, member.pid, member.page_fd, member.incarnation)
        except RuntimeError as error:
            raise JoinError(str(error)) from error
