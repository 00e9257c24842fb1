"""Rounds that are captured once and replayed, by torch's graphs on a GPU and by the twin's driver without one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from fault_a2a._core import core
from fault_a2a.buffer import Buffer
from fault_a2a.rounds import Outcome
from tests.rig import Checker, Work


class TwinGraph:
    """What torch.cuda.graph does, with the twin's driver."""

    def __init__(self, buffer: Buffer) -> None:
        self._verbs, self._graph = buffer.verbs, -1

    def capture(self, work: Callable[[], Any]) -> Any:
        self._verbs.is_twin_capturing = True  # type: ignore[attr-defined]
        core.begin_twin_capture()
        try:
            return work()
        finally:
            self._graph = core.end_twin_capture()
            self._verbs.is_twin_capturing = False  # type: ignore[attr-defined]

    def replay(self) -> None:
        core.replay_twin(self._graph)


# torch waits for the whole device before a capture, which no stream of it may be inside of then (CUDA's error 900).
_one_capture = threading.Lock()


class CudaGraph:
    """The same with torch's; virtual ranks are threads, and each captures by itself, one after the other."""

    def __init__(self, buffer: Buffer) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, work: Callable[[], Any]) -> Any:
        graph = torch.cuda.graph(self._graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local")
        with _one_capture, graph:
            return work()

    def replay(self) -> None:
        self._graph.replay()
        torch.cuda.current_stream().synchronize()


class CapturedRounds:
    """Dispatch and combine of one shape, captured once; experts run between the two."""

    def __init__(self, buffer: Buffer, work: Work, device: str, checker: Checker | None = None) -> None:
        make = TwinGraph if device == "twin" else CudaGraph
        self.buffer, self.work, self.checker = buffer, work, checker or Checker(buffer, work)
        self._dispatch, self._combine = make(buffer), make(buffer)
        self.inputs = [tensor.to(buffer.device) for tensor in work.tokens(buffer.rank, 0)]
        self.received, self.handle = self._dispatch.capture(lambda: buffer.dispatch(*self.inputs))
        self.y = torch.zeros(self.received.x.shape, dtype=buffer.config.dtype, device=buffer.device)
        self.out, self.outcome = self._combine.capture(lambda: buffer.combine(self.y, self.handle))

    def dispatch(self, number: int) -> None:
        for held, new in zip(self.inputs, self.work.tokens(self.buffer.rank, number), strict=True):
            held.copy_(new)
        self._dispatch.replay()

    def combine(self) -> None:
        self._combine.replay()

    def replay(self, number: int) -> None:
        """A whole round, checked."""
        self.dispatch(number)
        self.y.copy_(self.checker.experts(self.received.to(torch.device("cpu"))))
        self.combine()
        outcome = Outcome(self.outcome.codes.cpu().clone(), self.outcome.lost.cpu().clone())  # the next replay's soon
        self.checker.check_output(self.out.cpu(), outcome, number)

    def launch(self, number: int) -> None:
        """A whole round that nobody waits for or looks at, with whatever the experts computed last."""
        self.dispatch(number)
        self.combine()
