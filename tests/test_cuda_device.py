"""What is asked of torch.cuda, with something else in its place: none of it needs a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fault_a2a import backends, gpu
from fault_a2a.checks import check_kind, check_kinds
from fault_a2a.config import Config
from fault_a2a.kernels.cuda import rank as cuda_rank
from fault_a2a.testing import virtual
from fault_a2a.testing.virtual import VirtualRanks, run_threads
from tests.drills import ROOT
from tests.graphs import CudaGraph

CONFIG = Config(num_experts=2, hidden=8, num_topk=1, num_max_tokens_per_rank=1, backend="cuda")
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
    assert gpu.gpu_fields(CONFIG, device)["device"] == 1 and asked == [HERE]


# --- ranks that share a GPU


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment in which nobody has thought of CUDA."""
    for name in (*virtual.CUDA_SETTINGS, "FAULT_A2A_TWIN_DRIVER"):
        monkeypatch.setenv(name, "")  # so that it is as it was afterwards, whoever sets it meanwhile
        monkeypatch.delenv(name)
    return monkeypatch


def settings() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in virtual.CUDA_SETTINGS}


def test_virtual_ranks_on_a_gpu_ask_for_queues_before_cuda_starts(bare: pytest.MonkeyPatch) -> None:
    bare.setattr(torch.cuda, "is_initialized", lambda: False)
    with VirtualRanks(1, replace(CONFIG, backend="cpu")):
        assert settings() == dict.fromkeys(virtual.CUDA_SETTINGS), "ranks on the CPU leave the environment alone"
    found: list[dict] = []
    bare.setattr(virtual, "_stream_for", lambda backend: found.append(settings()))
    bare.setattr(virtual, "Buffer", lambda group, config: None)
    VirtualRanks(1, CONFIG)
    assert found == [virtual.CUDA_SETTINGS]
    bare.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "16")
    VirtualRanks(1, CONFIG)
    assert settings()["CUDA_DEVICE_MAX_CONNECTIONS"] == "16", "it was the user's choice"


def test_they_warn_where_cuda_has_started_without(bare: pytest.MonkeyPatch) -> None:
    bare.setattr(torch.cuda, "is_initialized", lambda: True)
    bare.setenv("CUDA_MODULE_LOADING", "LAZY")
    with pytest.warns(UserWarning, match=r"started without CUDA_DEVICE_MAX_CONNECTIONS=32 CUDA_MODULE_LOADING=EAGER"):
        virtual.set_up_cuda()
    for name, value in virtual.CUDA_SETTINGS.items():
        bare.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        virtual.set_up_cuda()


def test_ranks_whose_backend_is_left_open_have_streams_of_their_own(bare: pytest.MonkeyPatch) -> None:
    here = backends.Machine(gpu="a GPU", compiles_cuda=True, reaches_host=False, has_triton=False, interprets=False)
    bare.setattr(backends, "this_machine", lambda: here)
    asked: list[str] = []
    bare.setattr(virtual, "_stream_for", asked.append)
    bare.setattr(virtual, "Buffer", lambda group, config: None)
    VirtualRanks(2, replace(CONFIG, backend="auto"))
    assert asked == ["cuda", "cuda"]


def test_the_suite_asks_for_them_too() -> None:
    program = (
        "import os, tests.conftest; from fault_a2a.testing.virtual import CUDA_SETTINGS; "
        "print(CUDA_SETTINGS.items() <= os.environ.items())"
    )
    env = {name: value for name, value in os.environ.items() if name not in virtual.CUDA_SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "True", done.stderr
