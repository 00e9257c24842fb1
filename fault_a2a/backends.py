"""Which kernels run a rank whose ``Config`` leaves that open (``backend="auto"``), and why not others."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import os
from dataclasses import dataclass

import torch

from fault_a2a import nvrtc
from fault_a2a.config import Config

# The first that can run here is taken. Triton's kernels are none of a CPU's: the interpreter is for tests.
ORDER = ("cuda", "triton", "cpu")
_PAGEABLE_MEMORY_ACCESS = 88  # CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS


@dataclass(frozen=True)
class Machine:
    """What the choice rests on.

    Attributes:
        gpu: the name of the current CUDA or ROCm device, "" where torch finds none.
        compiles_cuda: whether CUDA's kernels can be compiled for it: it is NVIDIA's, and NVRTC is found.
        reaches_host: whether kernels on that device may use the host's memory by the host's own addresses. With Triton
            a rank's windows and words lie there, and so do its tensors.
        has_triton: whether Triton is installed.
        interprets: whether Triton's kernels run in its interpreter, on the CPU.
    """

    gpu: str
    compiles_cuda: bool
    reaches_host: bool
    has_triton: bool
    interprets: bool


def this_machine() -> Machine:
    """Asks torch and the driver; does not touch the device's memory."""
    has_gpu = torch.cuda.is_available()
    # As kernels/triton/target.py, which cannot be imported without Triton.
    wanted = os.environ.get("TRITON_INTERPRET", "")
    return Machine(
        gpu=torch.cuda.get_device_name() if has_gpu else "",
        compiles_cuda=has_gpu and torch.version.cuda is not None and nvrtc.load() is not None,
        reaches_host=has_gpu and _reaches_host(torch.cuda.current_device()),
        has_triton=importlib.util.find_spec("triton") is not None,
        interprets=not has_gpu if wanted == "" else wanted == "1",
    )


def why_not(backend: str, machine: Machine) -> str:
    """Why kernels of this kind do not run a rank here on a GPU, or on a CPU those that are its own; "" if they do."""
    if backend == "cpu":
        return ""
    if not machine.gpu:
        return "torch finds no GPU"
    if backend == "cuda":
        none = nvrtc.why_not() or "no NVRTC for an NVIDIA GPU; run `pip install 'fault_a2a[cuda13]'`"
        return "" if machine.compiles_cuda else none
    if not machine.has_triton:
        return "Triton is not installed; run `pip install 'fault_a2a[triton]'`"
    if machine.interprets:
        return "TRITON_INTERPRET=1 keeps its kernels on the CPU; unset it"
    if not machine.reaches_host:
        return f"windows lie in host memory, which kernels on this {machine.gpu} cannot reach by the host's addresses"
    return ""


def choose(machine: Machine, num_chunks: int = 1) -> str:
    """The backend of a rank on this machine: CUDA's kernels if they compile, else Triton's on a GPU, else the CPU's.

    Not run on a GPU: it follows what torch, NVRTC and the driver say of one.

    ``num_chunks``: more than one are a stream, which Triton's kernels do not send.
    """
    able = [backend for backend in ORDER if num_chunks == 1 or backend != "triton"]
    return next(backend for backend in able if not why_not(backend, machine))


def resolved(config: Config, machine: Machine | None = None) -> Config:
    """``config`` with a backend that runs on this machine.

    Raises:
        ValueError: it names Triton, whose kernels would run on a GPU that cannot reach this rank's windows.
    """
    if config.backend not in ("auto", "triton"):
        return config
    machine = machine or this_machine()
    if config.backend == "auto":
        num_chunks = -(-config.num_max_tokens_per_rank // config.chunk_tokens)
        return dataclasses.replace(config, backend=choose(machine, num_chunks))
    if machine.has_triton and not machine.interprets and why_not("triton", machine):
        # Without this the first kernel would be an illegal access, and take every other user of the device with it.
        raise ValueError(
            f"backend: 'triton' does not run here: {why_not('triton', machine)}; "
            "set TRITON_INTERPRET=1 to interpret its kernels on the CPU, or pass backend='cpu'."
        )
    return config


def _reaches_host(device: int) -> bool:
    """NVIDIA's driver says so of devices with ATS or HMM; of others nothing is known here, and no is safe."""
    if torch.version.cuda is None:
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    handle, value = ctypes.c_int(), ctypes.c_int()
    asked = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(handle), device)
    asked = asked or driver.cuDeviceGetAttribute(ctypes.byref(value), _PAGEABLE_MEMORY_ACCESS, handle)
    return asked == 0 and value.value == 1
