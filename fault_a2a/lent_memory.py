"""Memory for large tensors, lent again once no tensor refers to it: pages that were touched before cost nothing."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

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


class LendsMemory:
    """The part of ``Buffer`` that hands out memory for large tensors."""

    config: Any

    def _open_memory(self, recv_shape: Sequence[int], device: torch.device) -> None:
        self._memory = LentMemory(recv_shape, self.config.recv_dtype, device)
        self._output_memory = LentMemory(recv_shape, self.config.dtype, device)

    def empty_expert_output(self) -> torch.Tensor:
        """Memory for the experts to write into, for ``combine`` to read: pages that earlier rounds have touched.

        A tensor that an expert makes anew (``torch.empty_like(recv.x)``) is given back to the system with all its pages
        when the round is over, and the next one has each of them filled with zeros before the expert fills it.

        Returns:
            ``config.dtype``, contiguous, with any contents: batched ``[num_local_experts, capacity, hidden]``; packed
            ``[capacity * min(num_topk, num_local_experts), hidden]``, of which the first rows count. It is the caller's
            for as long as anything refers to it, an open round included.

        Not collective, does not block. Not for compiled code, nor captured: each call gives other memory. On a GPU it
        is what torch gives, which keeps pages itself.
        """
        return self._output_memory.lend()


def _take_back(idle: list[np.ndarray], memory: np.ndarray) -> None:
    if len(idle) < MAX_NUM_KEPT:
        idle.append(memory)
