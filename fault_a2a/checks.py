"""Checks of a caller's tensors: each names the argument, what it is, and what to give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def check_kind(name: str, tensor: Any) -> None:
    """What torch's dispatcher would answer in its own words, or, on "meta", with tensors that hold nothing."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; give a torch.Tensor")
    if not tensor.is_cpu:
        raise ValueError(f"{name} is on {tensor.device}; this buffer works on the CPU, so give {name}.cpu()")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} has the layout {tensor.layout}; give {name}.to_dense()")


def check_tensor(name: str, tensor: Any, dtypes: tuple[torch.dtype, ...], shape: Sequence[int | None]) -> None:
    check_kind(name, tensor)
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} is {tensor.dtype}; convert it to {wanted}")
    fits = tensor.dim() == len(shape) and all(
        want in (None, have) for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("num_tokens" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}; give [{wanted}]")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous (strides {tensor.stride()}); give {name}.contiguous()")
