"""Settings that all tests share: they run on the core with hooks, the same source with guards that can be switched."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("FAULT_A2A_CORE", "hooks")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Virtual ranks are threads themselves: torch's own would only take the processor from them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
