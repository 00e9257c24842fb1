"""Which device a rank measures on, and its tokens there before the first round that counts. Not run on a GPU."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch

from .work import Batch


def missing_device() -> str:
    return "" if torch.cuda.is_available() else "there is no CUDA device here: run it where each rank has a GPU"


class OnDevice:
    """The device of this rank, torch's current one from then on, and the batches that were brought to it.

    ``on_gpu``: a GPU's, where there is one; else the host.
    """

    def __init__(self, rank: int, on_gpu: bool = True) -> None:
        self.device = torch.device("cpu")
        if on_gpu and torch.cuda.is_available():
            local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", "-1")))
            number = local_rank if local_rank >= 0 else rank
            self.device = torch.device("cuda", number % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        self._brought: dict[int, tuple[Batch, Any]] = {}

    def bring(self, batch: Batch) -> Any:
        """The tensors of a batch on the device; copied once, so not in a round that counts."""
        if id(batch) not in self._brought:
            names = ("x", "topk_idx", "topk_weights")
            tensors = SimpleNamespace(**{name: getattr(batch, name).to(self.device) for name in names})
            self._brought[id(batch)] = (batch, tensors)  # with the batch, so that its id stays its own
        return self._brought[id(batch)][1]

    def finish(self) -> None:
        """A kernel that was only launched has moved nothing yet."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
