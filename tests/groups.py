"""Who runs the kernels of a test's group: the CPU, the CUDA kernels' twin, or the two in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import pytest

from fault_a2a.config import Config
from fault_a2a.testing.virtual import VirtualRanks

BACKENDS = {"cpu": ("cpu",), "cuda-host": ("cuda-host",), "mixed": ("cuda-host", "cpu")}

GroupOf = Callable[[int, Config], VirtualRanks]


def group_on(backends: Sequence[str]) -> GroupOf:
    """Makes a group whose ranks are on ``backends`` in turn, with NaN in its windows."""
    return partial(VirtualRanks, backends=backends, poison=True)


# For tests that ask for the fixture ``group_of`` (conftest.py).
on_each = pytest.mark.parametrize("group_of", ["cpu", "cuda-host"], indirect=True)
on_every = pytest.mark.parametrize("group_of", list(BACKENDS), indirect=True)


def name_of(value: object) -> str:
    return "-".join(str(part).removeprefix("torch.") for part in value) if isinstance(value, tuple) else str(value)


def each_on(backends: Sequence[str], names: str, cases: Iterable[tuple]) -> pytest.MarkDecorator:
    """Every case on the CPU, every fifth on each of the others, which take turns; CI's slow job runs them all.

    ``names``: of what a case holds, separated by commas.
    """
    # Every fourth or sixth would meet the same few of four phases, or of two formats, each time.
    runs = [
        pytest.param(
            *(backend, *case),
            marks=[] if backend == "cpu" or number % 5 == turn else pytest.mark.slow,
            id="-".join([*map(name_of, case), backend]),
        )
        for number, case in enumerate(cases)
        for turn, backend in enumerate(backends)
    ]
    return pytest.mark.parametrize(f"group_of,{names}", runs, indirect=["group_of"])


def every_third(cases: Iterable[tuple]) -> list:
    """The other cases run in CI's slow job."""
    return [
        pytest.param(*case, marks=[pytest.mark.slow] * (number % 3 > 0), id="-".join(map(name_of, case)))
        for number, case in enumerate(cases)
    ]
