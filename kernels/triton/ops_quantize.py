"""Rows to fp8 e4m3 in blocks of 1 x 128, and back, with the bits of the CPU's kernels."""

from __future__ import annotations

import torch
import triton.language as tl

from fault_a2a.kernels.triton.layout import DTYPES, constant
from fault_a2a.kernels.triton.numbers import (
    E4M3_NAN,
    FLOAT16,
    FLOAT_NAN,
    QUANTIZED_BLOCK,
    UE8M0_NAN,
    bits_of,
    float_of,
    store_elements,
    store_quantized_block,
)
from fault_a2a.kernels.triton.target import kernel, launch
from fault_a2a.kernels.triton.words import integers, load32

SMALLEST_SCALE = constant(0x00400000)  # 2^-127, which is no normal float32


@kernel
def quantize_blocks(
    x, q, scales,
    HIDDEN: tl.constexpr, NUM_BLOCKS: tl.constexpr, SCALE_BYTES: tl.constexpr, DTYPE: tl.constexpr,
    IS_UE8M0: tl.constexpr,
):  # fmt: skip
    """A program a block of a row."""
    row, block = tl.program_id(0).to(tl.int64) // NUM_BLOCKS, tl.program_id(0).to(tl.int64) % NUM_BLOCKS
    first = QUANTIZED_BLOCK * block
    item: tl.constexpr = 4 if DTYPE > FLOAT16 else 2
    source, to = x + item * HIDDEN * row, q + HIDDEN * row
    store_quantized_block(to, scales + SCALE_BYTES * row, source, first, HIDDEN, DTYPE, IS_UE8M0)


@kernel
def dequantize_blocks(
    q, scales, out,
    HIDDEN: tl.constexpr, NUM_BLOCKS: tl.constexpr, SCALE_BYTES: tl.constexpr, DTYPE: tl.constexpr,
    IS_UE8M0: tl.constexpr,
):  # fmt: skip
    """A program a block of a row."""
    row, block = tl.program_id(0).to(tl.int64) // NUM_BLOCKS, tl.program_id(0).to(tl.int64) % NUM_BLOCKS
    element = QUANTIZED_BLOCK * block + integers(QUANTIZED_BLOCK)
    inside = element < HIDDEN
    byte = tl.load((q + HIDDEN * row + element).to(tl.pointer_type(tl.int8)), mask=inside, other=0).to(tl.int64)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    # By bits: what a target makes of a float8 is its own business, and a subnormal has no exponent to move.
    magnitude = float_of(((exponent + 120) << 23) | (mantissa << 20))
    magnitude = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, magnitude)
    magnitude = tl.where((byte & E4M3_NAN) == E4M3_NAN, float_of(byte * 0 + FLOAT_NAN), magnitude)
    # By a bit: Triton negates by subtraction from +0.0, which makes no -0.0.
    value = float_of(bits_of(magnitude) | ((byte & 0x80) << 24))
    if IS_UE8M0:
        at = (scales + SCALE_BYTES * row + block).to(tl.pointer_type(tl.int8))
        biased = tl.load(at).to(tl.int64) & 0xFF
        bits = tl.where(biased == 0, SMALLEST_SCALE, biased << 23)
        scale = float_of(tl.where(biased == UE8M0_NAN, FLOAT_NAN, bits))
    else:
        scale = float_of(load32(scales + SCALE_BYTES * row + 4 * block))
    item: tl.constexpr = 4 if DTYPE > FLOAT16 else 2
    store_elements(out + item * (HIDDEN * row + element), value * scale, inside, DTYPE)


def constants(hidden: int, dtype: torch.dtype, is_ue8m0: bool) -> dict[str, int]:
    """What both are compiled for; ``dtype``: of the rows that are not fp8."""
    num_blocks = -(-hidden // QUANTIZED_BLOCK.value)
    return {
        "HIDDEN": hidden,
        "NUM_BLOCKS": num_blocks,
        "SCALE_BYTES": -(-num_blocks // 4) * 4 if is_ue8m0 else 4 * num_blocks,
        "DTYPE": DTYPES[str(dtype).removeprefix("torch.")],
        "IS_UE8M0": int(is_ue8m0),
    }


def quantize_1x128(x: torch.Tensor, scale: str = "float32") -> tuple[torch.Tensor, torch.Tensor]:
    """``reference.quantize_1x128``. Its arguments were checked."""
    num_rows, hidden = x.shape
    sizes = constants(hidden, x.dtype, scale == "ue8m0")
    q = torch.empty(num_rows, hidden, dtype=torch.float8_e4m3fn, device=x.device)
    # Zeros: a row's last word of UE8M0 bytes may have some to spare.
    dtype = torch.int32 if scale == "ue8m0" else torch.float32
    scales = torch.zeros(num_rows, sizes["SCALE_BYTES"] // 4, dtype=dtype, device=x.device)
    addresses = [tensor.data_ptr() for tensor in (x, q, scales)]
    launch(quantize_blocks, num_rows * sizes["NUM_BLOCKS"], *addresses, *sizes.values())
    return q, scales


def dequantize_1x128(q: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``reference.dequantize_1x128``, rounded once more to ``dtype``. Its arguments were checked."""
    num_rows, hidden = q.shape
    out = torch.empty(num_rows, hidden, dtype=dtype or torch.float32, device=q.device)
    sizes = constants(hidden, out.dtype, scales.dtype == torch.int32)
    addresses = [tensor.data_ptr() for tensor in (q, scales, out)]
    launch(dequantize_blocks, num_rows * sizes["NUM_BLOCKS"], *addresses, *sizes.values())
    return out
