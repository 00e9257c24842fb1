"""Peers that need a GPU a rank: NCCL between torch's permutes, DeepEP and NIXL EP by their low-latency calls.

Not run on a GPU, and never timed. The calls of the two libraries were run on a CPU against `fault_a2a.integrations`,
which speak the same dialects (tests/test_launched.py). Tokens are on the device before the first round that counts, and
a part of a round ends when the device has done it.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.distributed as dist

from .on_device import OnDevice, missing_device
from .permuted import ByTorch, process_group
from .systems import System
from .work import Batch, Shape, expert_factors, scaled


def _missing_module(name: str, what: str) -> str:
    return "" if importlib.util.find_spec(name) else f"{what} is not installed here ({name} cannot be imported)"


class Nccl(ByTorch):
    """NCCL's ``all_to_all_single`` between torch's permutes on the device."""

    backend = "nccl"

    def __init__(self, shape: Shape, rank: int, store: Any) -> None:
        self.group = process_group("nccl", shape, rank, store)
        self.on = OnDevice(rank)
        with self.on.device:
            super().__init__(shape, rank)

    @staticmethod
    def missing() -> str:
        has_nccl = dist.is_available() and dist.is_nccl_available()
        return missing_device() or ("" if has_nccl else "this torch has no NCCL: install one that has")

    def dispatch(self, batch: Batch) -> tuple[torch.Tensor, dict[str, Any]]:
        with self.on.device:
            received, handle = super().dispatch(self.on.bring(batch))
        self.on.finish()
        return received, handle

    def combine(self, received: torch.Tensor, handle: dict[str, Any]) -> torch.Tensor:
        with self.on.device:
            out = super().combine(received, handle)
        self.on.finish()
        return out


class LowLatency(System):
    """What DeepEP and NIXL EP have in common: rows come batched by expert, weights go with the combine.

    A row is sent for each (token, choice); bfloat16, summed at the owner.
    """

    def __init__(self, shape: Shape, rank: int, store: Any) -> None:
        if shape.dtype != "bf16" or shape.reduce != "owner":
            raise ValueError(f"{self.backend} sends bf16 and sums at the owner; leave out --dtype and --reduce")
        self.shape, self.rank = shape, rank
        self.buffer = self.connect(store)
        self.on = OnDevice(rank)
        placement = shape.config().placement_for(shape.ranks)
        local_experts = list(placement.local_experts(rank))
        self.factors = expert_factors(shape)[local_experts].to(self.on.device)
        self.sizes = (shape.tokens, shape.experts)

    def connect(self, store: Any) -> Any:
        """The library's buffer, connected to all ranks."""
        raise NotImplementedError

    def dispatch(self, batch: Batch) -> tuple[torch.Tensor, Any]:
        tokens = self.on.bring(batch)
        send = getattr(self.buffer, self.calls[0])
        received, _, handle, _, _ = send(tokens.x, tokens.topk_idx, *self.sizes, use_fp8=False)
        self.on.finish()
        return received, (tokens, handle)

    def combine(self, received: torch.Tensor, handle: Any) -> torch.Tensor:
        tokens, opened = handle
        out, _, _ = getattr(self.buffer, self.calls[1])(received, tokens.topk_idx, tokens.topk_weights, opened)
        self.on.finish()
        return out

    calls = ("dispatch", "combine")

    def apply_factors(self, received: torch.Tensor) -> None:
        received.copy_(scaled(received, self.factors[:, None, None]))

    def close(self) -> None:
        self.buffer.destroy()


class DeepEp(LowLatency):
    """DeepEP's low-latency calls."""

    backend = "deep_ep"
    calls = ("low_latency_dispatch", "low_latency_combine")

    @staticmethod
    def missing() -> str:
        return _missing_module("deep_ep", "DeepEP") or missing_device()

    def connect(self, store: Any) -> Any:
        import deep_ep

        shape = self.shape
        group = process_group("nccl" if torch.cuda.is_available() else "gloo", shape, self.rank, store)
        num_bytes = deep_ep.Buffer.get_low_latency_rdma_size_hint(
            shape.tokens, shape.hidden, shape.ranks, shape.experts
        )
        return deep_ep.Buffer(
            group, 0, num_bytes, low_latency_mode=True, num_qps_per_rank=max(shape.experts // shape.ranks, 1)
        )


class NixlEp(LowLatency):
    """NIXL EP, by the calls that vLLM makes of it."""

    backend = "nixl_ep"

    @staticmethod
    def missing() -> str:
        return _missing_module("nixl_ep", "NIXL EP") or missing_device()

    def connect(self, store: Any) -> Any:
        import nixl_ep

        shape = self.shape
        num_bytes = nixl_ep.Buffer.get_rdma_size_hint(shape.tokens, shape.hidden, shape.ranks, shape.experts)
        buffer = nixl_ep.Buffer(rank=self.rank, tcp_store_group=store)
        buffer.update_memory_buffers(
            num_ranks=shape.ranks, num_experts_per_rank=shape.experts // shape.ranks, num_rdma_bytes=num_bytes
        )
        buffer.connect_ranks([rank for rank in range(shape.ranks) if rank != self.rank])
        return buffer
