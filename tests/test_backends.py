"""The choice of kernels where a Config leaves it open, on machines that are not here. Nothing here was run on a GPU."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fault_a2a import backends
from fault_a2a.backends import Machine, choose, resolved, this_machine, why_not
from fault_a2a.config import Config
from fault_a2a.testing.virtual import VirtualRanks
from tests.rig import Work, run_checked

CPU_ONLY = Machine(gpu="", compiles_cuda=False, reaches_host=False, has_triton=True, interprets=True)
COHERENT = Machine(gpu="NVIDIA GH200", compiles_cuda=False, reaches_host=True, has_triton=True, interprets=False)
SIZES = {"num_experts": 4, "hidden": 16, "num_topk": 2, "num_max_tokens_per_rank": 4}


def changed(**changes: object) -> Machine:
    return dataclasses.replace(COHERENT, **changes)


def test_cuda_where_it_compiles_else_triton_on_a_gpu_else_the_cpu() -> None:
    assert choose(changed(compiles_cuda=True)) == "cuda"
    assert choose(COHERENT) == "triton"
    others = {
        "no GPU": CPU_ONLY,
        "no GPU, no Triton": dataclasses.replace(CPU_ONLY, has_triton=False),
        "no Triton": changed(has_triton=False),
        "interpreted": changed(interprets=True),
        "a GPU that reaches its own memory only": changed(gpu="NVIDIA H100", reaches_host=False),
    }
    assert {what: choose(machine) for what, machine in others.items()} == dict.fromkeys(others, "cpu")


def test_every_machine_has_an_answer_and_every_refusal_a_reason() -> None:
    for gpu, *rest in itertools.product(("", "a GPU"), *[(False, True)] * 4):
        machine = Machine(gpu, *rest)
        answer = choose(machine)
        assert why_not(answer, machine) == ""
        assert all(why_not(earlier, machine) for earlier in backends.ORDER[: backends.ORDER.index(answer)])


def test_extras_are_quoted_in_what_people_copy() -> None:
    """Some shells take brackets for a pattern, and say that nothing matches it."""
    for machine, backend in ((changed(), "cuda"), (changed(has_triton=False), "triton")):
        assert re.search(r"`pip install 'fault_a2a\[\w+\]'`", why_not(backend, machine))
    package = Path(backends.__file__).parent
    bare = re.compile(r"install fault_a2a\[")
    assert [path.name for path in package.rglob("*.py") if bare.search(path.read_text(encoding="utf-8"))] == []


def test_a_stream_is_not_sent_by_triton() -> None:
    config = Config(**SIZES, num_chunk_tokens=2, backend="auto")
    assert resolved(config, COHERENT).backend == "cpu"
    assert resolved(config, changed(compiles_cuda=True)).backend == "cuda"
    whole = dataclasses.replace(config, num_chunk_tokens=4)
    assert resolved(whole, COHERENT).backend == "triton"
    assert resolved(whole, changed(compiles_cuda=True)).backend == "cuda"


def test_triton_on_a_gpu_that_cannot_reach_the_windows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(**SIZES, backend="triton")
    here = changed(gpu="NVIDIA H100", reaches_host=False)
    with pytest.raises(
        ValueError, match=r"backend: 'triton' does not run here: windows lie in host memory.*H100.*'cpu'"
    ):
        resolved(config, here)
    for machine in (COHERENT, CPU_ONLY, dataclasses.replace(here, interprets=True)):
        assert resolved(config, machine) is config
    monkeypatch.setattr(backends, "this_machine", lambda: here)
    with pytest.raises(ValueError, match="backend: 'triton' does not run here"), VirtualRanks(1, config):
        pass


def test_what_is_named_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "this_machine", lambda: pytest.fail("nobody asked for a choice"))
    for backend in ("cpu", "cuda", "cuda-host"):
        config = Config(**SIZES, backend=backend)
        assert resolved(config) is config
    assert Config(**SIZES).backend == "cpu"  # what tensors a Buffer takes does not depend on where it runs


def test_a_group_that_leaves_it_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "this_machine", lambda: CPU_ONLY)
    config = Config(**SIZES, backend="auto")
    with VirtualRanks(2, config) as ranks:
        assert [buffer.config.backend for buffer in ranks.buffers] == ["cpu", "cpu"]
        assert all(not tally.corrupt for tally in run_checked(ranks, Work(config, 2), 2))


# --- what a machine says of itself


class Driver:
    """In libcuda's place."""

    def __init__(self, pageable: int, status: int = 0) -> None:
        self.pageable, self.status = pageable, status

    def cuInit(self, _: int) -> int:
        return self.status

    def cuDeviceGet(self, handle: object, device: int) -> int:
        return 0

    def cuDeviceGetAttribute(self, value: SimpleNamespace, which: int, handle: object) -> int:
        assert which == 88
        value._obj.value = self.pageable
        return 0


@pytest.mark.parametrize(("pageable", "status", "reaches"), [(1, 0, True), (0, 0, False), (1, 100, False)])
def test_a_device_is_asked_whether_it_reaches_the_host(
    monkeypatch: pytest.MonkeyPatch, pageable: int, status: int, reaches: bool
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(backends.ctypes, "CDLL", lambda name: Driver(pageable, status))
    monkeypatch.setattr(backends.nvrtc, "load", lambda: object())
    found = this_machine()
    assert (found.gpu, found.reaches_host, found.interprets) == ("a GPU", reaches, False) and found.compiles_cuda
    monkeypatch.setattr(backends.nvrtc, "load", lambda: None)
    assert not this_machine().compiles_cuda
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert this_machine().interprets
    monkeypatch.setattr(torch.version, "cuda", None)  # ROCm: nothing is known of it here
    monkeypatch.setattr(backends.nvrtc, "load", lambda: object())
    assert not this_machine().reaches_host and not this_machine().compiles_cuda


def test_no_driver_and_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = this_machine()
    assert (found.gpu, found.reaches_host, found.interprets) == ("", False, True)
