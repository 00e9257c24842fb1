"""Fault-tolerant all-to-all for mixture-of-experts models: one dead rank costs one rank."""

from __future__ import annotations

import importlib
from typing import Any

from fault_a2a._version import __version__

# Imported when first asked for: the reference and the placement work without the native core.
_HOME = {
    "Buffer": "buffer",
    "Received": "rounds",
    "Handle": "rounds",
    "Outcome": "rounds",
    "RecvHook": "rounds",
    "SourceStats": "rounds",
    "Contributions": "collectives",
    "phases": "core_fields",
    "Config": "config",
    "Group": "group",
    "Placement": "placement",
    "status": "group_status",
    "View": "membership",
    "Evidence": "membership",
    "FaultA2AError": "errors",
    "RankEvictedError": "errors",
    "QuorumLostError": "errors",
    "ConstructError": "errors",
    "JoinError": "errors",
    "ClosedError": "errors",
}

__all__ = [
    "Buffer",
    "ClosedError",
    "Config",
    "ConstructError",
    "Contributions",
    "Evidence",
    "FaultA2AError",
    "Group",
    "Handle",
    "JoinError",
    "Outcome",
    "Placement",
    "QuorumLostError",
    "RankEvictedError",
    "Received",
    "RecvHook",
    "SourceStats",
    "View",
    "__version__",
    "phases",
    "status",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
