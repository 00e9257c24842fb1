"""Tools to test an engine that uses fault_a2a; each is imported when it is first asked for."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "RowInvariance": "row_invariance",
    "check_row_invariant": "row_invariance",
    "VirtualRanks": "virtual",
}

__all__ = ["RowInvariance", "VirtualRanks", "check_row_invariant"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
