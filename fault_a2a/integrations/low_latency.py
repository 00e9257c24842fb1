"""What the low-latency calls of other libraries have in common, in the words of ``RankBuffers``."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeAlias

import torch

from fault_a2a.config import SCALE_BLOCK
from fault_a2a.integrations.rank_buffers import LayerShape, OpenLayer, RankBuffers, backend_for
from fault_a2a.integrations.scale_layout import as_float32, column_major
from fault_a2a.rounds import Received, RecvHook

# Rows, or rows and their scales.
Rows: TypeAlias = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class Done:
    """Stands where callers look for an event: on the CPU a call that has returned is done."""

    def current_stream_wait(self) -> None:
        """Nothing to wait for."""


def send_tokens(
    buffers: RankBuffers,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    *,
    num_max_tokens: int,
    num_experts: int,
    use_fp8: bool,
    round_scale: bool,
    use_ue8m0: bool,
) -> tuple[Rows, torch.Tensor, OpenLayer, RecvHook]:
    """(received rows, rows of each local expert, what combine needs, the hook that receives). Rows hold nothing before
    the hook has been called. Weights follow with the combine."""
    if num_experts % buffers.num_ranks:
        raise ValueError(f"num_experts is {num_experts}; give a multiple of the {buffers.num_ranks} ranks")
    shape = LayerShape(
        hidden=x.shape[1],
        num_local_experts=num_experts // buffers.num_ranks,
        num_topk=topk_idx.shape[1],
        num_max_tokens=num_max_tokens,
        dtype=x.dtype,
        quantized="" if not use_fp8 else "ue8m0" if round_scale or use_ue8m0 else "float32",
        backend=backend_for(x),
    )
    weights = torch.ones(topk_idx.shape, dtype=torch.float32, device=x.device)
    received, opened, hook = buffers.dispatch(shape, x, topk_idx, weights)
    if received.scales is None:
        return received.x, received.num_tokens, opened, hook
    num_blocks = -(-shape.hidden // SCALE_BLOCK)
    scales = _scales_to_fill(received, num_blocks, packed=use_ue8m0)

    def receive() -> None:
        hook()
        assert received.scales is not None
        as_asked = received.scales if use_ue8m0 or not round_scale else as_float32(received.scales)[..., :num_blocks]
        scales.copy_(as_asked)

    return (received.x, scales), received.num_tokens, opened, RecvHook("dispatch", receive)


def _scales_to_fill(received: Received, num_blocks: int, packed: bool) -> torch.Tensor:
    """The caller holds it before its rows are there, so it is laid out now and filled then."""
    assert received.scales is not None
    rows, device = received.scales.shape[:2], received.x.device
    if packed:
        return column_major(torch.empty([*rows, received.scales.shape[2]], dtype=torch.int32, device=device))
    return column_major(torch.empty([*rows, num_blocks], dtype=torch.float32, device=device))


def return_rows(
    y: torch.Tensor, topk_weights: torch.Tensor, opened: OpenLayer, out: torch.Tensor | None, return_recv_hook: bool
) -> tuple[torch.Tensor, Done, Any]:
    """(the sums, event, the hook that fills them or ``None`` if they are filled)."""
    if out is None:
        out = torch.empty([topk_weights.shape[0], y.shape[-1]], dtype=y.dtype, device=y.device)
    _, hook = opened.combine(y, out, topk_weights)
    return out, Done(), hook_or_receive(hook, return_recv_hook)


def hook_or_receive(hook: Callable[[], None], return_recv_hook: bool) -> Callable[[], None] | None:
    """The hook for a caller who asked for it; for any other it is called now."""
    if return_recv_hook:
        return hook
    hook()
    return None


def write_mask(buffers: RankBuffers, mask_status: torch.Tensor) -> None:
    """**1 = masked**, into the first entries of the caller's int32 tensor."""
    if mask_status.dtype != torch.int32 or mask_status.numel() < buffers.num_ranks:
        raise ValueError(
            f"mask_status is {mask_status.dtype} {list(mask_status.shape)}; give int32 [{buffers.num_ranks}]"
        )
    mask_status.zero_()
    mask_status[: buffers.num_ranks] = torch.tensor(buffers.mask_status(), dtype=torch.int32)


def set_masked(buffers: RankBuffers, rank: int, masked: bool) -> None:
    """This rank's tokens go around ``rank``, or no longer do. With everybody else masked, rounds stay on this rank."""
    if not 0 <= rank < buffers.num_ranks:
        raise ValueError(f"rank is {rank}; give a number from 0 to {buffers.num_ranks - 1}")
    if masked:
        buffers.masked.add(rank)
    else:
        buffers.masked.discard(rank)
    buffers.warms_up = len(buffers.masked - {buffers.rank}) == buffers.num_ranks - 1 and buffers.num_ranks > 1


def no_stats(**tensors: Any) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            raise NotImplementedError(f"{name} is not counted; leave it out and read Buffer.source_stats()")


def install_as(name: str, module: ModuleType) -> None:
    """Makes ``module`` importable under another library's name. May be called repeatedly."""
    present = sys.modules.get(name)
    if present is module:
        return
    if present is not None or importlib.util.find_spec(name) is not None:
        raise RuntimeError(f"a real {name} is installed; uninstall it, or import {module.__name__} by its own name")
    # Callers ask find_spec() first, which is an error, not a "no", for a module that has none.
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin=module.__file__)
    sys.modules[name] = module
