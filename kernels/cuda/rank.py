"""One rank whose kernels run on a GPU: the verbs of the native core, on torch's current stream of the buffer's device.

Outside a capture every half waits for its kernels, so that errors are raised where they arise. Captured, halves are
launched and nothing is waited for: what a replay finds, its handle says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fault_a2a._core import core
from fault_a2a.gpu import at, is_capturing

T = TypeVar("T")
Dispatched = tuple[str, int, int, int, int, int]


class Rank:
    """The verbs of one rank (``fault_a2a.rounds.Verbs``).

    Attributes:
        is_twin_capturing: with the twin's driver, what torch says of a stream on a GPU.
    """

    def __init__(self, endpoint: Any, device: torch.device) -> None:
        self.endpoint, self.device = endpoint, device
        self.is_twin_capturing = False

    def is_capturing(self) -> bool:
        return self.is_twin_capturing or is_capturing(self.device)

    def _call(self, verb: Callable[..., T], *arguments: Any) -> T:
        """On this thread's stream of the buffer's device; the twin's is the host, and has one stream."""
        with at(self.device):
            on_gpu = self.device.type == "cuda"
            core.set_stream(torch.cuda.current_stream(self.device).cuda_stream if on_gpu else 0)
            return verb(*arguments)

    # -- each half, waited for ---------------------------------------------------------------------------------------

    def dispatch_send(self, *arguments: Any) -> Dispatched:
        return self._call(self.endpoint.dispatch_send, *arguments)

    def dispatch_receive(self, *arguments: int) -> Dispatched:
        return self._call(self.endpoint.dispatch_receive, *arguments)

    def combine_send(self, y: int, round_number: int) -> str:
        return self._call(self.endpoint.combine_send, y, round_number)

    def combine_receive(self, *arguments: int) -> str:
        return self._call(self.endpoint.combine_receive, *arguments)

    def abandon(self, round_number: int) -> str:
        return self._call(self.endpoint.abandon, round_number)

    # -- each half, launched -----------------------------------------------------------------------------------------

    def launch_dispatch_send(self, *arguments: Any) -> None:
        self._call(self.endpoint.launch_dispatch_send, *arguments)

    def launch_dispatch_receive(self, *arguments: int) -> None:
        self._call(self.endpoint.launch_dispatch_receive, *arguments)

    def launch_combine_send(self, y: int, handle: int) -> None:
        self._call(self.endpoint.launch_combine_send, y, handle)

    def launch_combine_receive(self, *arguments: int) -> None:
        self._call(self.endpoint.launch_combine_receive, *arguments)

    # -- what is known of rounds -------------------------------------------------------------------------------------

    def open_tokens(self, round_number: int) -> int:
        return self.endpoint.open_tokens(round_number)

    def sources(self, round_number: int) -> list[Any]:
        return self._call(self.endpoint.sources, round_number)

    def stats(self) -> dict[str, int]:
        self._call(self.endpoint.refresh)
        return self.endpoint.stats()

    def source_stats(self) -> list[Any]:
        self._call(self.endpoint.refresh)
        return self.endpoint.source_stats()

    def begin_step(self) -> tuple[str, bool]:
        return self._call(self.endpoint.begin_step)

    def close(self) -> None:
        self._call(self.endpoint.close)
