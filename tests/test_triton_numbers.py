"""Triton's number formats against torch's: every sign, exponent and seven bits of mantissa, around where they turn."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="install triton==3.7.1: requirements-dev.txt has it")

import triton.language as tl

from fault_a2a.kernels.triton.layout import DTYPES, constant
from fault_a2a.kernels.triton.numbers import e4m3_of, load_elements, store_elements
from fault_a2a.kernels.triton.target import INTERPRETED, kernel, launch
from fault_a2a.kernels.triton.words import integers
from fault_a2a.reference import same_bits
from tests.test_fp8 import every_pattern, structured_floats

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="its addresses are the CPU's"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

BLOCK = 1 << 16
FLOAT32 = constant(DTYPES["float32"])


@kernel
def convert(x, out, count, FROM: tl.constexpr, TO: tl.constexpr, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + integers(BLOCK)
    inside = element < count
    from_bytes: tl.constexpr = 4 if FROM == FLOAT32 else 2
    to_bytes: tl.constexpr = 4 if TO == FLOAT32 else 2
    value = load_elements(x + from_bytes * element, inside, FROM)
    store_elements(out + to_bytes * element, value, inside, TO)


@kernel
def to_e4m3(x, out, count, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + integers(BLOCK)
    inside = element < count
    value = load_elements(x + 4 * element, inside, FLOAT32)
    tl.store((out + element).to(tl.pointer_type(tl.int8)), e4m3_of(value).to(tl.int8), mask=inside)


def converted(x: torch.Tensor, to: torch.dtype) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=to)
    kinds = [DTYPES[str(dtype).removeprefix("torch.")] for dtype in (x.dtype, to)]
    launch(convert, -(-x.numel() // BLOCK), x.data_ptr(), out.data_ptr(), x.numel(), *kinds, BLOCK)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_from_float32(dtype: torch.dtype) -> None:
    x = structured_floats()
    assert same_bits(converted(x, dtype), x.to(dtype)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widening_to_float32(dtype: torch.dtype) -> None:
    x = every_pattern(dtype)
    assert same_bits(converted(x, torch.float32), x.float()).all()


def test_rounding_to_e4m3() -> None:
    """What a block holds once it is scaled: no more than 448."""
    x = structured_floats()
    x = x[x.abs() <= 448].contiguous()
    out = torch.empty(x.shape, dtype=torch.uint8)
    launch(to_e4m3, -(-x.numel() // BLOCK), x.data_ptr(), out.data_ptr(), x.numel(), BLOCK)
    assert torch.equal(out, x.to(torch.float8_e4m3fn).view(torch.uint8))
