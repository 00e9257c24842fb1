"""One rank whose kernels run on a GPU: the verbs of the native core, on the stream that is torch's current one.

Outside a capture every half waits for its kernels, so that errors are raised where they arise. Captured, halves are
launched and nothing is waited for: what a replay finds, its handle says.
"""

from __future__ import annotations

from typing import Any

import torch

from fault_a2a._core import core
from fault_a2a.gpu import has_twin

Dispatched = tuple[str, int, int, int, int, int]


class Rank:
    """The verbs of one rank (``fault_a2a.rounds.Verbs``).

    Attributes:
        is_twin_capturing: with the twin's driver, what torch says of a stream on a GPU.
    """

    def __init__(self, endpoint: Any) -> None:
        self.endpoint = endpoint
        self.is_twin_capturing = False

    def is_capturing(self) -> bool:
        return self.is_twin_capturing if has_twin() else torch.cuda.is_current_stream_capturing()

    def _on_stream(self) -> Any:
        core.set_stream(0 if has_twin() else torch.cuda.current_stream().cuda_stream)
        return self.endpoint

    # -- each half, waited for ---------------------------------------------------------------------------------------

    def dispatch_send(self, *arguments: Any) -> Dispatched:
        return self._on_stream().dispatch_send(*arguments)

    def dispatch_receive(self, *arguments: int) -> Dispatched:
        return self._on_stream().dispatch_receive(*arguments)

    def combine_send(self, y: int, round_number: int) -> str:
        return self._on_stream().combine_send(y, round_number)

    def combine_receive(self, *arguments: int) -> str:
        return self._on_stream().combine_receive(*arguments)

    def abandon(self, round_number: int) -> str:
        return self._on_stream().abandon(round_number)

    # -- each half, launched -----------------------------------------------------------------------------------------

    def launch_dispatch_send(self, *arguments: Any) -> None:
        self._on_stream().launch_dispatch_send(*arguments)

    def launch_dispatch_receive(self, *arguments: int) -> None:
        self._on_stream().launch_dispatch_receive(*arguments)

    def launch_combine_send(self, y: int, handle: int) -> None:
        self._on_stream().launch_combine_send(y, handle)

    def launch_combine_receive(self, *arguments: int) -> None:
        self._on_stream().launch_combine_receive(*arguments)

    # -- what is known of rounds -------------------------------------------------------------------------------------

    def open_tokens(self, round_number: int) -> int:
        return self.endpoint.open_tokens(round_number)

    def sources(self, round_number: int) -> list[Any]:
        return self.endpoint.sources(round_number)

    def stats(self) -> dict[str, int]:
        self.endpoint.refresh()
        return self.endpoint.stats()

    def source_stats(self) -> list[Any]:
        self.endpoint.refresh()
        return self.endpoint.source_stats()

    def begin_step(self) -> tuple[str, bool]:
        return self.endpoint.begin_step()

    def close(self) -> None:
        self.endpoint.close()
