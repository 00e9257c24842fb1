"""Every line that this package logs: its level, its words, and what an operator does next.

docs/runbook.md explains each one from a warning upwards.
A line is a sentence for people and, in ``record.fault_a2a``, its fields for machines: the event, and the rank, evidence
and epoch where there are any.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

_log = logging.getLogger("fault_a2a")


@dataclass(frozen=True)
class LogEvent:
    """``words`` are filled with the fields that ``tell`` is given."""

    level: int
    words: str
    next_step: str = ""


EVENTS = {
    "peer_suspected": LogEvent(
        logging.WARNING,
        "rank {peer} is suspected by rank {rank} in epoch {epoch}: {evidence}",
        "nothing: the group decides within settle_ms, after a stall at most half of the shorter of stall_ms and "
        "agreement_timeout_ms later; the runbook says what this evidence means",
    ),
    "ranks_evicted": LogEvent(
        logging.WARNING,
        "rank {rank} is in epoch {epoch} without ranks {gone}: {reason}",
        "replace these ranks; the others go on",
    ),
    "evicted_here": LogEvent(
        logging.ERROR,
        "rank {rank} was left out of epoch {epoch}: {reason}",
        "call buffer.rejoin(), or end this process and start it with join=True under the same rank number (vLLM: "
        "FAULT_A2A_JOIN=1); a start without join waits for all ranks and fails; the other ranks go on",
    ),
    "quorum_lost": LogEvent(
        logging.ERROR,
        "rank {rank} suspects ranks {suspects} in epoch {epoch} and finds no quorum",
        "wake or reconnect the suspected ranks, then call again; if they are lost, start the group anew",
    ),
    "view_changed": LogEvent(logging.INFO, "rank {rank} is in epoch {epoch}: {reason}"),
    "callback_failed": LogEvent(
        logging.ERROR,
        "a callback of on_view_change failed on rank {rank} in epoch {epoch}; views go on without it",
        "mend the callback; the traceback stands below",
    ),
    "fault_acknowledged": LogEvent(
        logging.WARNING,
        "rank {rank} acknowledges in epoch {epoch} that ranks {gone} are gone; layers run with the others' experts",
        "replace these ranks, or restart the group when it suits you",
    ),
    "vllm_served": LogEvent(logging.INFO, "vLLM's backend nixl_ep is served by fault_a2a"),
}


def tell(event: str, exc_info: bool = False, **fields: Any) -> None:
    """Logs one of ``EVENTS``."""
    line = EVENTS[event]
    words = line.words.format(**fields) + (f"; next: {line.next_step}" if line.next_step else "")
    _log.log(line.level, "%s", words, exc_info=exc_info, extra={"fault_a2a": {"event": event, **fields}})


class GroupLog:
    """Tells what a rank has found out about its group since the last look."""

    def __init__(self, endpoint: Any, rank: int) -> None:
        self._endpoint, self._rank = endpoint, rank
        self._num_evidence = 0
        first = endpoint.views()[0][0]
        self._epoch, self._active = first["epoch"], set(first["active"])

    def look(self) -> None:
        """Cheap, and from one thread."""
        evidence = self._endpoint.evidence(self._num_evidence)
        for peer, kind, _ in evidence:
            if kind != "left":  # planned, as far as this rank can tell; the view that follows says that it went
                tell("peer_suspected", rank=self._rank, peer=peer, evidence=kind, epoch=self._epoch)
        self._num_evidence += len(evidence)
        for decision, _ in self._endpoint.views(self._epoch + 1):
            self._tell_view(decision)

    def _tell_view(self, decision: dict[str, Any]) -> None:
        active = set(decision["active"])
        fields = {"rank": self._rank, "epoch": decision["epoch"], "reason": decision["reason"]}
        gone = sorted(self._active - active)
        if self._rank not in active:
            tell("evicted_here", **fields)
        elif gone:
            tell("ranks_evicted", gone=gone, **fields)
        else:
            tell("view_changed", **fields)
        self._epoch, self._active = decision["epoch"], active
