"""Scales of received rows as other libraries lay them out."""

from __future__ import annotations

import torch


def column_major(scales: torch.Tensor) -> torch.Tensor:
    """``[experts, rows, scales]`` with the rows of one scale next to one another: what DeepGEMM reads."""
    return scales.transpose(1, 2).contiguous().transpose(1, 2)


def as_float32(ue8m0: torch.Tensor) -> torch.Tensor:
    """Four powers of two in each int32 as four float32: the exponent is all there is to them."""
    exponents = ue8m0.contiguous().view(torch.uint8).to(torch.int32)
    return (exponents << 23).view(torch.float32)
