"""The environment variables that integrations read; engines have no other way to hand us a number."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from fault_a2a.config import MAX_MS
from fault_a2a.placement import MAX_NUM_RANKS

ON_FAULT = ("report", "serve")


@dataclass(frozen=True)
class Setting:
    """One environment variable: what it means, its default, and between which numbers it may lie."""

    name: str
    default: str
    meaning: str
    least: int | None = None
    most: int | None = None
    choices: tuple[str, ...] = ()

    def value(self) -> str | int:
        text = os.environ.get(self.name, self.default)
        if self.choices:
            if text not in self.choices:
                raise ValueError(f"{self.name} is {text!r}; set it to {' or '.join(self.choices)}")
            return text
        if self.least is None or self.most is None:
            return text
        try:
            number = int(text)
        except ValueError:
            raise ValueError(f"{self.name} is {text!r}; set it to a whole number") from None
        if not self.least <= number <= self.most:
            raise ValueError(f"{self.name} is {number}; set it to {self.least} to {self.most}")
        return number


def _ms(name: str, default: int, meaning: str, least: int = 1) -> Setting:
    return Setting(name, str(default), meaning, least, MAX_MS)


ENABLED = Setting(
    "FAULT_A2A_VLLM", "0", "1: vLLM's nixl_ep backend is served by fault_a2a, and may be called so", choices=("0", "1")
)
ON_FAULT_SETTING = Setting(
    "FAULT_A2A_ON_FAULT",
    "report",
    "report: vLLM is told of a fault until it has recovered; serve: a fault is acknowledged at once, and steps go on "
    "with the experts that are left",
    choices=ON_FAULT,
)
STEP_STARTS = Setting(
    "FAULT_A2A_STEP_STARTS",
    "1",
    "1: vLLM's workers mark where a step begins, so that ranks can join and come back; 0: they do not",
    choices=("0", "1"),
)
JOIN = Setting(
    "FAULT_A2A_JOIN",
    "0",
    "1, and on a new process only: it takes its rank's place in a group that runs already",
    choices=("0", "1"),
)
METRICS_PORT = Setting(
    "FAULT_A2A_METRICS_PORT",
    "0",
    "port + rank serves Prometheus metrics of that rank; 0: none",
    least=0,
    most=65535 - (MAX_NUM_RANKS - 1),
)
# Construction waits for the slowest rank's weights, so its default is far above the library's.
TIMEOUTS = {
    "beat_ms": _ms("FAULT_A2A_BEAT_MS", 10, "how often a rank shows that its process lives"),
    "silence_ms": _ms("FAULT_A2A_SILENCE_MS", 2000, "a rank that does not beat so long, while it is waited for, goes"),
    "stall_ms": _ms("FAULT_A2A_STALL_MS", 30000, "a rank that beats and does not move on so long goes"),
    "link_ms": _ms("FAULT_A2A_LINK_MS", 5000, "how long a signal that was sent may be missing"),
    "settle_ms": _ms("FAULT_A2A_SETTLE_MS", 50, "how long an accusation waits for others to join it", least=0),
    "construct_timeout_ms": _ms(
        "FAULT_A2A_CONSTRUCT_TIMEOUT_MS", 600000, "how long ranks wait for one another at start"
    ),
    "agreement_timeout_ms": _ms(
        "FAULT_A2A_AGREEMENT_TIMEOUT_MS", 10000, "how long a rank without a quorum waits before it suspends itself"
    ),
}
ALL = (ENABLED, ON_FAULT_SETTING, STEP_STARTS, JOIN, METRICS_PORT, *TIMEOUTS.values())


def timeouts() -> dict[str, Any]:
    """Fields of a ``Config``, from the environment.

    Raises:
        ValueError: naming the variable.
    """
    return {field: setting.value() for field, setting in TIMEOUTS.items()}
