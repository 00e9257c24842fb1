"""A buffer's side of its group: the views it has seen, and how its rank comes, goes and comes back."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fault_a2a.config import Config
from fault_a2a.errors import ClosedError
from fault_a2a.gpu import at
from fault_a2a.group import Group
from fault_a2a.joins import tell_life
from fault_a2a.membership import Evidence, View
from fault_a2a.rounds import Verbs


class Membership:
    """What ``Buffer`` can say and do about who is in."""

    core: Any
    verbs: Verbs
    config: Config
    device: torch.device
    group: Group
    _callbacks: list[Callable[[View], None]]
    _closed: bool
    _finalizer: weakref.finalize

    @property
    def rank(self) -> int:
        """This rank's number in its group."""
        return self.group.rank

    @property
    def view(self) -> View:
        """The newest view installed on this rank. Does not block."""
        return View.of(self.core.current())

    def views(self, from_epoch: int = 0) -> list[tuple[View, int]]:
        """Every view with the time it was installed (CLOCK_MONOTONIC ns); one without this rank comes last.

        Args:
            from_epoch: leave out those before it. A group may live through any number of them.
        """
        return [(View.of(decision), at_ns) for decision, at_ns in self.core.views(from_epoch)]

    def evidence(self, num_known: int = 0) -> list[Evidence]:
        """What this rank found against peers, in order; without the first ``num_known``."""
        return [Evidence(rank, kind, at_ns) for rank, kind, at_ns in self.core.evidence(num_known)]

    def on_view_change(self, callback: Callable[[View], None]) -> None:
        """Calls ``callback(view)`` on a thread of the buffer after each new view; ``view.reason`` says why it came."""
        if not callable(callback):
            raise TypeError(f"callback is a {type(callback).__name__}; give a function of one View")
        self._callbacks.append(callback)

    def begin_step(self) -> View:
        """Marks a step start, and returns the view in which the step begins.

        Ranks join, and leave as planned, only here. Every rank calls it at the same rounds, none of them open. Costs
        next to nothing but when such a change stands: then it blocks until all members have come here and agreed on the
        change, at most ``config.join_hold_ms``, or not at all if one of them is past this step start. Once all have
        agreed it blocks until the view is decided, or raises ``QuorumLostError`` after ``agreement_timeout_ms``. Not
        capturable.

        With ``backend="cuda"`` windows are swapped here, also those of ranks that have gone since the last step start.
        When there is one to swap it waits for the device; no other thread may launch or replay rounds meanwhile.

        Raises:
            RuntimeError: a round or a collective is open.
            RankEvictedError, QuorumLostError, ClosedError: this rank may not go on. ``ClosedError`` also where it had
                called ``leave`` before, in vain, and the others let it go only now: it is out, and closed.
        """
        self._check_open()
        status, is_out = self.verbs.begin_step()
        self._raise_for(status)
        if is_out:  # the wish of a leave() that was in vain still stood
            self.close()
            raise ClosedError(f"rank {self.rank} had asked to leave, and is out of the group.")
        return self.view

    def leave(self) -> bool:
        """In the place of ``begin_step``: leaves the group without any loss. True: this rank is out, and closed.

        False: it did not come to that here, because others were past this step start already, did not come to it within
        ``config.join_hold_ms``, or had another change to agree on first. The wish stands: run the step, and call
        ``leave`` again before the next one. Blocks as ``begin_step`` does, and raises what it raises. The rank's
        experts are unroutable afterwards.
        """
        self._check_open()
        self.core.ask_to_leave()
        status, is_out = self.verbs.begin_step()
        self._raise_for(status)
        if not is_out and self.view.active_ranks != (self.rank,):
            return False
        self.close()
        return True

    def rejoin(self) -> View:
        """Comes back as a new life of the same rank, after ``RankEvictedError`` or ``close()``.

        Blocks as construction with ``join`` does. Members keep buffers, addresses and view objects, and so does this
        rank; handles of its former life are void.

        Raises:
            RuntimeError: this rank is in the group, or is a virtual one.
            JoinError: the members did not let it in in time, or evicted it again before it could begin.
        """
        if self.group.fabric is not None:
            raise RuntimeError("rejoin: virtual ranks cannot come back; construct the group anew")
        if not self._closed and self.views()[-1][0].active_mask[self.rank]:
            raise RuntimeError("rejoin: this rank is in the group; call it after RankEvictedError, or close() first")
        self.close()
        self._finalizer.detach()
        with at(self.device):
            self._begin_life(join=True)
        return self.view

    def be_found_at(self, store: Any, name: str) -> None:
        """From now on newcomers find this rank on ``store``, in a group of that name. Not collective; does not block.

        For engines whose ranks meet on another store whenever their number changes. A newcomer finds the group on a
        store on which every member has called this.

        Args:
            store: a ``torch.distributed`` store.
            name: as in ``Group``.

        Raises:
            RuntimeError: the ranks of this group are virtual; or the store cannot be reached.
        """
        self._check_open()
        if self.group.fabric is not None:
            raise RuntimeError("be_found_at: nobody can join virtual ranks; give a Group of processes")
        self.group = replace(self.group, store=store, name=name)
        tell_life(
            self.group, self.core, os.getpid(), self.config.compared(self.config.num_ranks_for(self.group.num_ranks))
        )

    def close(self) -> None:
        """See ``Buffer``."""
        raise NotImplementedError

    def _begin_life(self, join: bool) -> None:
        raise NotImplementedError

    def _check_open(self) -> None:
        raise NotImplementedError

    def _raise_for(self, status: str) -> None:
        raise NotImplementedError
