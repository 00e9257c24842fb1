"""Membership's face: views and evidence as Python sees them, and an arbiter for groups that decide by their store."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from fault_a2a.config import Config
from fault_a2a.group import Group
from fault_a2a.log_events import GroupLog, tell


@dataclass(frozen=True)
class View:
    """Who is in. Totally ordered by ``epoch``; the same on every rank that installs it.

    Attributes:
        epoch: generation of the membership, from 0.
        active_mask: one int a rank, 1 = active.
        first_round: the first round that uses this view.
        reason: why it differs from the one before, for an operator.
        incarnations: which life of each rank this view speaks of.
    """

    epoch: int
    active_mask: tuple[int, ...]
    first_round: int
    reason: str
    incarnations: tuple[int, ...]

    @property
    def active_ranks(self) -> tuple[int, ...]:
        return tuple(rank for rank, active in enumerate(self.active_mask) if active)

    @classmethod
    def of(cls, decision: dict[str, Any]) -> View:
        active = set(decision["active"])
        incarnations = tuple(decision["incarnations"])
        return cls(
            epoch=decision["epoch"],
            active_mask=tuple(int(rank in active) for rank in range(len(incarnations))),
            first_round=decision["first_round"],
            reason=decision["reason"],
            incarnations=incarnations,
        )


@dataclass(frozen=True)
class Evidence:
    """What this rank itself found against a peer: kind exit, left, silence, stall or link; CLOCK_MONOTONIC ns."""

    rank: int
    kind: str
    at_ns: int


class Arbiter(Protocol):
    """Decides between proposals for one epoch, in place of the members: the first one wins, for ever."""

    def decide(self, proposal: dict[str, Any]) -> dict[str, Any]:
        """Returns the decision of ``proposal["epoch"]``, which may be another rank's proposal. Blocks; may raise."""


class StoreArbiter:
    """An arbiter over a store's ``compare_set``.

    Losing the store stops view changes (survivors then hold and end in ``QuorumLostError``), never a running view.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        # A connection of its own: a caller that blocks in store.wait() must not hold up a view change.
        self._store = group.store.clone() if hasattr(group.store, "clone") and group.fabric is None else group.store

    def decide(self, proposal: dict[str, Any]) -> dict[str, Any]:
        key = self._group.key("view", proposal["epoch"])
        decided = self._store.compare_set(key, "", json.dumps(proposal, sort_keys=True))
        decision: dict[str, Any] = json.loads(bytes(decided).decode())
        return decision


def arbiter_for(config: Config, group: Group) -> Arbiter | None:
    """``None``: the members decide natively, and no proposal comes to Python."""
    return StoreArbiter(group) if config.agreement == "store" else None


class MembershipThread:
    """Carries view changes to callbacks and, where there is an arbiter, proposals from the native core to it.

    It is a Python thread: while somebody holds the GIL it stands still. Without an arbiter nothing that the group needs
    goes through it; with one, beats, watching, promises and the adoption of decisions do not, and another rank proposes
    if this one does not.
    """

    POLL_MS = 200
    # After an error, doubled with every further one: a store that is gone complains on stderr each time it is asked.
    MIN_PAUSE_S, MAX_PAUSE_S = 0.05, 1.0

    def __init__(
        self, endpoint: Any, arbiter: Arbiter | None, rank: int, callbacks: list[Callable[[View], None]], joined: bool
    ) -> None:
        self._endpoint = endpoint
        self._arbiter = arbiter
        self._rank = rank
        self._log = GroupLog(endpoint, rank)
        self._callbacks = callbacks  # the buffer's: it outlives this thread when the rank comes back
        # To a newcomer the view that let it in is news; founders have constructed theirs.
        self._told_epoch = endpoint.views()[0][0]["epoch"] - int(joined)
        self._ending = threading.Event()
        self._pause_s = self.MIN_PAUSE_S
        self.last_error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="fault_a2a-membership", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ending.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=2 * self.POLL_MS / 1000)  # at once, unless a callback is at work

    def _run(self) -> None:
        # The core does not wait any more once it leaves: to ask it again would be a busy loop.
        while not (self._ending.is_set() or self._endpoint.is_leaving()):
            self._tell()
            proposal = self._endpoint.next_proposal(self.POLL_MS)
            if proposal is not None and not self._ending.is_set():
                self._decide(proposal)
        # What came last is told too: a view, or the end of this life, may have come in the last wait.
        self._tell()

    def _decide(self, proposal: dict[str, Any]) -> None:
        assert self._arbiter is not None, "the core hands out proposals only when it was told of an arbiter"
        try:
            self._endpoint.learn(self._arbiter.decide(proposal))
            self._pause_s = self.MIN_PAUSE_S
        except Exception as error:  # the store may be gone in any way it likes; the core, in time, says so
            self.last_error = error
            self._endpoint.proposal_failed()
            self._ending.wait(self._pause_s)
            self._pause_s = min(2 * self._pause_s, self.MAX_PAUSE_S)

    def _tell(self) -> None:
        self._log.look()
        if not self._callbacks:
            return
        for decision, _ in self._endpoint.views(self._told_epoch + 1):
            self._told_epoch = decision["epoch"]
            for callback in self._callbacks:
                try:
                    callback(View.of(decision))
                except Exception:  # the group must go on: this thread may carry its proposals
                    tell("callback_failed", exc_info=True, rank=self._rank, epoch=decision["epoch"])
