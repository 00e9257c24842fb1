"""Memory for large tensors, lent again once no tensor refers to it: pages that were touched before cost nothing."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import numpy as np
import torch

ALIGNMENT = 64
# glibc keeps what is smaller to itself, and returns what is larger to the system with all its pages.
MIN_BYTES = 32 << 20
MAX_NUM_KEPT = 2  # as many as rounds can be open


class LentMemory:
    """Gives tensors of one shape, with any contents.

    A tensor is its holder's for as long as anything refers to it, a view or a compiler's computation in place included.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> None:
        self.shape, self.dtype, self.device = list(shape), dtype, device or torch.device("cpu")
        self.num_bytes = math.prod(shape) * dtype.itemsize
        self._idle: list[np.ndarray] = []

    def lend(self) -> torch.Tensor:
        # On a GPU torch keeps what it has, and a graph that is captured needs it from there.
        if self.num_bytes < MIN_BYTES or self.device.type != "cpu":
            return torch.empty(self.shape, dtype=self.dtype, device=self.device)
        memory = self._idle.pop() if self._idle else np.empty(self.num_bytes + ALIGNMENT, dtype=np.uint8)
        first = -memory.ctypes.data % ALIGNMENT
        lent = memory[first : first + self.num_bytes]
        # The tensor's storage holds this array and nothing else does: the two end together.
        weakref.finalize(lent, _take_back, self._idle, memory).atexit = False
        return torch.from_numpy(lent).view(self.dtype).view(self.shape)


def _take_back(idle: list[np.ndarray], memory: np.ndarray) -> None:
    if len(idle) < MAX_NUM_KEPT:
        idle.append(memory)
