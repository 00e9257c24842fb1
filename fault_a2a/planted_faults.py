"""Faults that a buffer of the test build can be told to do to itself."""

from __future__ import annotations

from typing import Any

from fault_a2a._core import core
from fault_a2a.core_fields import collective_phases, phases


class PlantedFaults:
    """The part of ``Buffer`` that only the test build has."""

    core: Any

    def arm(self, phase: str, round_number: int, action: str, value: int = 0, skip: int = 0) -> None:
        """Test build: ``action`` (kill, stop, sleep_us, crash) when this rank reaches ``phase`` of ``round_number``.

        ``round_number``: of a phase of a collective, that collective's number.

        ``skip``: how often it passes the phase first; a stream comes to some of them once a chunk.
        """
        _need_hooks()
        known = [*phases(), *collective_phases()]
        if phase not in known:
            raise ValueError(f"phase is {phase!r}; give one of {', '.join(known)}")
        self.core.arm(core.phases().index(phase), round_number, action, value, skip)

    def cut(self, rank: int) -> None:
        """Test build: from now on everything between this rank and ``rank`` is lost, on this side."""
        _need_hooks()
        self._cut: set[int] = getattr(self, "_cut", set()) | {rank}
        self.core.set_faults({"cut": sorted(self._cut)})


def _need_hooks() -> None:
    if not core.has_hooks:
        raise RuntimeError("faults need the test build; set FAULT_A2A_CORE=hooks before importing fault_a2a")
