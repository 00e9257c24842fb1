"""What is measured on a rank: the face of a system, this library with each backend, the machine's own copy rate."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from .on_device import OnDevice
from .work import Batch, Shape, expert_factors, scaled


class System:
    """One rank's end of an all-to-all.

    Attributes:
        backend: how it moves bytes.
        bit_exact: its answers must have the reference's bits; otherwise ``benchmarks.work.TOLERANCE`` holds.
        computes: it gives answers at all.
    """

    backend = ""
    bit_exact = False
    computes = True

    def __init__(self, shape: Shape, rank: int, store: Any) -> None:
        raise NotImplementedError

    @staticmethod
    def missing() -> str:
        """Why this machine cannot run it, and what to do; empty if it can."""
        return ""

    def dispatch(self, batch: Batch) -> tuple[Any, Any]:
        """Returns what this rank's experts received, in expert-major order, and a handle."""
        raise NotImplementedError

    def combine(self, received: Any, handle: Any) -> torch.Tensor:
        """Sends the expert rows back and sums them, weighted, at their owner: ``[tokens, hidden]``."""
        raise NotImplementedError

    def apply_factors(self, received: Any) -> None:
        """Multiplies, in place, each expert's rows by its factor: the experts of a checking round."""
        raise NotImplementedError

    def trouble(self) -> str:
        """What went wrong in the last round beside its answer; empty if nothing did."""
        return ""

    def close(self) -> None:
        """Leaves the group."""


class FaultA2A(System):
    """This library, by its public face."""

    backend = "cpu"
    bit_exact = True

    def __init__(self, shape: Shape, rank: int, store: Any) -> None:
        import fault_a2a

        self.shape = shape
        # Before the buffer, which is on torch's current device. Where its tensors lie is up to the backend.
        self.on = OnDevice(rank, on_gpu=self.backend in ("cuda", "triton"))
        self.buffer = fault_a2a.Buffer(fault_a2a.Group(store, rank, shape.ranks), shape.config(self.backend))
        self.on.device = self.buffer.device
        factors = expert_factors(shape)[list(self.buffer.placement.local_experts(rank))]
        self.factors = factors.to(self.on.device)
        self.outcome: Any = None

    def dispatch(self, batch: Batch) -> tuple[Any, Any]:
        tokens = self.on.bring(batch)
        received = self.buffer.dispatch(tokens.x, tokens.topk_idx, tokens.topk_weights)
        self.on.finish()
        return received

    def combine(self, received: Any, handle: Any) -> torch.Tensor:
        out, self.outcome = self.buffer.combine(received.x, handle)
        self.on.finish()
        return out

    def apply_factors(self, received: Any) -> None:
        for expert, (first, last) in enumerate(zip(received.offsets[:-1], received.offsets[1:], strict=True)):
            rows = received.x[first:last] if self.shape.recv_format == "packed" else received.x[expert, : last - first]
            rows.copy_(scaled(rows, self.factors[expert]))

    def trouble(self) -> str:
        if not bool(self.outcome.lost) and self.buffer.view.epoch == 0:
            return ""
        return (
            f"a healthy round lost choices or changed the view ({self.buffer.view.reason or self.buffer.evidence()}); "
            "the machine was too loaded for the timeouts, so measure again when it is quiet"
        )

    def close(self) -> None:
        self.buffer.close()


class OnCudaHost(FaultA2A):
    """CUDA's kernels on this host's twin of their chip: to see that they run, not how fast."""

    backend = "cuda-host"


class OnTriton(FaultA2A):
    """Triton's kernels: on a GPU, or in the interpreter, which says nothing of their speed."""

    backend = "triton"


class OnCuda(FaultA2A):
    """CUDA's kernels on a GPU."""

    backend = "cuda"


OURS: dict[str, type[FaultA2A]] = {one.backend: one for one in (FaultA2A, OnCudaHost, OnTriton, OnCuda)}


def ours(backends: Sequence[str]) -> dict[str, type[System]]:
    """This library once with each of ``backends``, by the names of their rows."""
    names = ["fault_a2a"] if len(backends) == 1 else [f"fault_a2a-{backend}" for backend in backends]
    return dict(zip(names, (OURS[backend] for backend in backends), strict=True))


class Copy(System):
    """No all-to-all: every rank copies a block of memory, all at once. Its rate is what the floor is reckoned with."""

    backend = "memcpy"
    computes = False
    BLOCK_BYTES = 64 << 20  # so large that the C library copies past the caches, which is its fastest way
    NUM_BLOCKS = 1

    def __init__(self, shape: Shape, rank: int, store: Any) -> None:
        blocks = [
            torch.full([self.BLOCK_BYTES], fill, dtype=torch.uint8) for fill in (1, 2)
        ]  # written: pages are there
        self.blocks = blocks

    def dispatch(self, batch: Batch) -> tuple[Any, Any]:
        source, target = self.blocks
        for _ in range(self.NUM_BLOCKS):
            ctypes.memmove(target.data_ptr(), source.data_ptr(), self.BLOCK_BYTES)
        return None, None

    def combine(self, received: Any, handle: Any) -> torch.Tensor:
        return torch.empty(0)

    def apply_factors(self, received: Any) -> None:
        pass


def copied_bytes_per_round(shape: Shape) -> int:
    """By all ranks of ``Copy`` together."""
    return shape.ranks * Copy.NUM_BLOCKS * Copy.BLOCK_BYTES
