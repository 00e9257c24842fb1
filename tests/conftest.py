"""Settings that all tests share: they run on the core with hooks, the same source with guards that can be switched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.groups import GroupOf

os.environ.setdefault("FAULT_A2A_CORE", "hooks")
# As fault_a2a.testing.virtual.CUDA_SETTINGS, which is imported after torch has asked CUDA for its devices.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Virtual ranks are threads themselves: torch's own would only take the processor from them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def group_of(request: pytest.FixtureRequest) -> GroupOf:
    """Makes the group of a test, on the backends that its parameter names (tests/groups.py)."""
    from tests.groups import BACKENDS, group_on

    return group_on(BACKENDS[request.param])
