"""The native core: the production build, or with FAULT_A2A_CORE=hooks the one with faults and switchable guards.

FAULT_A2A_CORE=unchecked is for ``benchmarks/price.py`` alone: it has no guards, and a dead peer hangs it for ever.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

_NAMES = {"": "_C", "hooks": "_C_hooks", "unchecked": "_C_unchecked"}
_BUILDS = {"unchecked": "`CMAKE_ARGS=-DFA2A_BENCH_UNCHECKED=ON make build`, which builds it for the benchmark"}


def _load() -> Any:
    wanted = os.environ.get("FAULT_A2A_CORE", "")
    if wanted not in _NAMES:
        raise ImportError(f"FAULT_A2A_CORE is {wanted!r}; leave it unset, or set it to 'hooks' for the test build")
    try:
        return importlib.import_module(f"fault_a2a.{_NAMES[wanted]}")
    except ImportError as error:
        raise ImportError(
            f"the native core fault_a2a.{_NAMES[wanted]} cannot be loaded ({error}). "
            f"Run {_BUILDS.get(wanted, '`pip install .` in the source tree, or `make test`, which builds it in place')}"
        ) from error


core: Any = _load()
