"""What is asked of torch.cuda, with something else in its place: none of it needs a GPU."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from fault_a2a.testing.virtual import run_threads
from tests.graphs import CudaGraph


class Captures:
    """In the place of torch.cuda.graph: CUDA refuses to wait for a device while a stream of it is captured."""

    def __init__(self) -> None:
        self.num_open = self.num_done = 0

    def __enter__(self) -> None:
        assert self.num_open == 0, "operation not permitted when stream is capturing"
        self.num_open += 1

    def __exit__(self, *_: object) -> None:
        self.num_open -= 1
        self.num_done += 1


def test_threads_capture_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    captures, all_here = Captures(), threading.Barrier(3)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "Stream", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: captures)

    def capture() -> None:
        graph = CudaGraph(None)  # type: ignore[arg-type]
        all_here.wait(10)
        graph.capture(lambda: time.sleep(0.02))

    run_threads([capture] * 3)
    assert captures.num_done == 3
