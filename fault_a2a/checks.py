"""Checks of a caller's tensors: each names the argument, what it is, and what to give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fault_a2a.config import Config

INDEX_DTYPES = (torch.int64, torch.int32)
CPU = torch.device("cpu")
VECTOR_BYTES = 16  # `Vector16` in kernels/cuda: rows that are summed are read and written by as many


def check_kind(name: str, tensor: Any, device: torch.device = CPU) -> None:
    """What torch's dispatcher would answer in its own words, or, on "meta", with tensors that hold nothing."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; give a torch.Tensor")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; {_next_step(name, tensor.device, device)}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} has the layout {tensor.layout}; give {name}.to_dense()")


def _next_step(name: str, there: torch.device, device: torch.device) -> str:
    if device.type == "cpu":
        return f"this buffer works on the CPU, so give {name}.cpu()"
    step = f'this buffer works on {device}, so give {name}.to("{device}")'
    if there.type != device.type:
        return step
    # A process that has not called set_device constructs on GPU 0, whatever its tensors are on.
    return f"{step}, or construct the Buffer while {there} is the current device (torch.cuda.set_device)"


def check_tensor(
    name: str,
    tensor: Any,
    dtypes: tuple[torch.dtype, ...],
    shape: Sequence[int | None],
    device: torch.device = CPU,
) -> None:
    check_kind(name, tensor, device)
    check_form(name, tensor, dtypes, ["num_tokens" if want is None else want for want in shape])


def check_form(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: Sequence[int | str]) -> None:
    """On any device. A word in ``shape`` is a size that is free."""
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} is {tensor.dtype}; convert it to {wanted}")
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} has shape {list(tensor.shape)}; give [{wanted}]")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous (strides {tensor.stride()}); give {name}.contiguous()")


def check_aligned(config: Config, name: str, tensor: torch.Tensor) -> None:
    """Before a GPU finds out: a misaligned access there ends CUDA for the whole process."""
    if config.backend in ("cuda", "cuda-host") and tensor.data_ptr() % VECTOR_BYTES:
        raise ValueError(
            f"{name} begins at element {tensor.storage_offset()} of its memory, whose address is no multiple of "
            f"{VECTOR_BYTES} bytes as backend={config.backend!r} needs it; give {name}.clone()"
        )


def check_kinds(device: torch.device, **tensors: Any) -> None:
    for name, tensor in tensors.items():
        check_kind(name, tensor, device)


def check_tokens(
    config: Config, device: torch.device, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor
) -> None:
    kinds = (config.recv_dtype,) if config.quantizes == "never" else (config.dtype, config.recv_dtype)
    check_tensor("x", x, kinds, [None, config.hidden], device)
    if x.shape[0] > config.num_max_tokens_per_rank:
        raise ValueError(
            f"x has {x.shape[0]} tokens; give at most num_max_tokens_per_rank = {config.num_max_tokens_per_rank}, "
            "or construct the Buffer with a larger one"
        )
    shape = [x.shape[0], config.num_topk]
    check_tensor("topk_idx", topk_idx, INDEX_DTYPES, shape, device)
    check_tensor("topk_weights", topk_weights, (torch.float32,), shape, device)


def check_scales(config: Config, device: torch.device, x: torch.Tensor, scales: torch.Tensor | None) -> None:
    if x.dtype == config.dispatch_dtype:
        if scales is None:
            raise ValueError(
                f"scales is missing for an x in {x.dtype}; give [{x.shape[0]}, {config.num_scales}] in "
                f"{config.scale_dtype}" + (f", or x in {config.dtype}" if config.quantizes != "never" else "")
            )
        check_tensor("scales", scales, (config.scale_dtype,), [x.shape[0], config.num_scales], device)
    elif scales is not None:
        raise ValueError(f"scales belongs to an x that comes quantised, and x is {x.dtype}; leave scales out")


def check_expert_rows(
    config: Config, device: torch.device, recv_shape: Sequence[int], y: torch.Tensor, num_received: int
) -> None:
    if config.recv_format == "batched":
        check_tensor("y", y, (config.dtype,), recv_shape, device)
    else:
        # Compiled callers hand back the whole of recv.x, others the received rows.
        rows = y.shape[0] if y.dim() == 2 and y.shape[0] == recv_shape[0] else num_received
        check_tensor("y", y, (config.dtype,), [rows, config.hidden], device)
    if config.reduce == "expert":  # else rows are copied, which any address will do for
        check_aligned(config, "y", y)


def check_sums(
    config: Config,
    device: torch.device,
    num_tokens: int,
    out: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
) -> None:
    """What a caller of combine brings to have its sums written into, and weighted with."""
    if out is not None:
        check_tensor("out", out, (config.dtype,), [num_tokens, config.hidden], device)
        check_aligned(config, "out", out)
    if topk_weights is None:
        return
    if config.reduce != "owner" or config.weights_at != "owner":
        raise ValueError(
            "topk_weights of combine come too late for sums that other ranks make; give them to dispatch, or set "
            'reduce="owner" and weights_at="owner"'
        )
    check_tensor("topk_weights", topk_weights, (torch.float32,), [num_tokens, config.num_topk], device)
