"""What is asked of torch.cuda, with something else in its place: none of it needs a GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from fault_a2a import gpu
from fault_a2a.checks import check_kind, check_kinds
from fault_a2a.config import Config
from fault_a2a.kernels.cuda import rank as cuda_rank
from fault_a2a.testing.virtual import run_threads
from tests.graphs import CudaGraph

HERE, OTHER = torch.device("cuda", 1), torch.device("cuda", 0)


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


# --- a buffer on another GPU than the thread that calls it


class Torch:
    """In the place of torch.cuda, for a thread that begins on GPU 0, as every new one does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.captured = OTHER, {HERE: False, OTHER: False}
        self.streams = {HERE: 11, OTHER: 7}
        monkeypatch.setattr(torch.cuda, "device", self.device)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current.index)
        monkeypatch.setattr(torch.cuda, "current_stream", self.current_stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.captured[self.current])

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device
        yield
        self.current = before

    def current_stream(self, device: torch.device | None = None) -> SimpleNamespace:
        return SimpleNamespace(cuda_stream=self.streams[device or self.current])


class Core:
    """In the place of the native core, whose calls make their device the driver's current one."""

    def __init__(self, cuda: Torch) -> None:
        self.cuda, self.stream = cuda, -1
        self.seen: list[tuple[str, int, torch.device]] = []

    def set_stream(self, stream: int) -> None:
        self.stream = stream

    def __getattr__(self, verb: str):
        def call(*_: object) -> None:
            self.seen.append((verb, self.stream, self.cuda.current))
            self.cuda.current = HERE

        return call


def test_kernels_go_to_the_stream_of_the_buffers_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Torch(monkeypatch)
    core = Core(cuda)
    monkeypatch.setattr(cuda_rank, "core", core)
    monkeypatch.delenv("FAULT_A2A_TWIN_DRIVER", raising=False)
    rank = cuda_rank.Rank(core, HERE)
    rank.dispatch_send(1, 2)
    rank.launch_combine_send(1, 2)
    rank.begin_step()
    rank.close()
    assert core.seen == [(v, 11, HERE) for v in ("dispatch_send", "launch_combine_send", "begin_step", "close")]
    assert cuda.current == OTHER, "a call moved its thread to another device"


def test_what_is_captured_is_asked_of_the_buffers_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Torch(monkeypatch)
    monkeypatch.delenv("FAULT_A2A_TWIN_DRIVER", raising=False)
    rank = cuda_rank.Rank(Core(cuda), HERE)
    cuda.captured = {HERE: False, OTHER: True}
    assert not rank.is_capturing() and gpu.is_capturing(OTHER)
    cuda.captured = {HERE: True, OTHER: False}
    assert rank.is_capturing() and not gpu.is_capturing(torch.device("cpu"))


class OnTheOther(torch.Tensor):
    """A tensor that says it is on GPU 0."""

    device = OTHER


def test_a_tensor_on_another_gpu_is_refused() -> None:
    x = torch.zeros(4).as_subclass(OnTheOther)
    check_kind("x", x, OTHER)
    words = (
        r'topk_idx is on cuda:0; this buffer works on cuda:1, so give topk_idx.to\("cuda:1"\), or construct.*set_device'
    )
    with pytest.raises(ValueError, match=words):
        check_kinds(HERE, topk_idx=x)
    with pytest.raises(ValueError, match=r'x is on cpu; this buffer works on cuda:1, so give x.to\("cuda:1"\)$'):
        check_kind("x", torch.zeros(4), HERE)
    with pytest.raises(ValueError, match=r"x is on cuda:0; this buffer works on the CPU, so give x.cpu\(\)$"):
        check_kind("x", x)


def test_a_buffers_device_is_the_current_one_when_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new life is made by whatever thread calls rejoin, on the device of the ones before it."""
    cuda = Torch(monkeypatch)
    monkeypatch.delenv("FAULT_A2A_TWIN_DRIVER", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (9, 0))
    monkeypatch.setattr("fault_a2a.kernel_compiler.compile_kernels", lambda *_: [])
    with torch.cuda.device(HERE):
        device = gpu.device_of("cuda")
    assert device == HERE and cuda.current == OTHER
    config = Config(num_experts=2, hidden=8, num_topk=1, num_max_tokens_per_rank=1, backend="cuda")
    assert gpu.gpu_fields(config, device)["device"] == 1 and asked == [HERE]
