"""A rank on a GPU before it runs: which device, and its machine code."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from fault_a2a._core import core
from fault_a2a.errors import ConstructError

if TYPE_CHECKING:
    from fault_a2a.config import Config

_TWIN = "FAULT_A2A_TWIN_DRIVER"  # test build: the CUDA driver is one whose device is this host


def has_twin() -> bool:
    return bool(core.has_hooks) and _TWIN in os.environ


def device_type_of(backend: str) -> str:
    """Where tensors of this backend lie: "cuda" or "cpu"."""
    return "cuda" if backend == "cuda" and not has_twin() else "cpu"


def device_of(backend: str) -> torch.device:
    """The same with its number: the device that is torch's current one when the buffer is constructed.

    Raises:
        ConstructError: torch finds no GPU.
    """
    if device_type_of(backend) == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConstructError(
            f'backend: "cuda" needs a GPU, and torch {torch.__version__} finds none; `fault-a2a doctor` says why, '
            'and backend="cpu" runs anywhere'
        )
    return torch.device("cuda", torch.cuda.current_device())


def at(device: torch.device) -> AbstractContextManager[Any]:
    """Inside of it ``device`` is torch's current one, where that is a GPU, and afterwards whatever was it before.

    A new thread begins on GPU 0, and the driver's contexts, which the core sets, are torch's devices by another name.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def is_capturing(device: torch.device) -> bool:
    """This thread's stream on ``device`` is being captured into a graph. torch itself asks of the current device."""
    if device.type != "cuda":
        return False
    with at(device):
        return torch.cuda.is_current_stream_capturing()


def of_several_hosts(backend: str, device: torch.device) -> str:
    """For the error of a group on several hosts: what windows on a GPU would need there. Not run on a GPU."""
    if backend != "cuda":
        return ""
    why = core.why_no_windows(device.index or 0, across_hosts=True)
    has = "this device has, and which nothing here uses yet" if not why else f"are not to be had here ({why})"
    return f" Between hosts windows on a GPU go by fabric handles, which {has}."


def gpu_fields(config: Config, device: torch.device) -> dict[str, Any]:
    """What the native core needs of ``device``, if that is a GPU: compiles the kernels, seconds the first time."""
    if config.backend != "cuda":
        return {}
    if has_twin():
        return {"device": 0, "cubins": [b"twin"]}
    from fault_a2a.kernel_compiler import compile_kernels

    major, minor = torch.cuda.get_device_capability(device)
    arch = f"{major}{minor}" + ("a" if major >= 9 else "")
    found = compile_kernels(arch, str(config.dtype).removeprefix("torch."))
    return {"device": device.index, "cubins": [cubin.read_bytes() for cubin, _ in found]}
