"""Row arithmetic: casts, the weighted sum in one pass, copies; against torch, the reference and integer arithmetic."""

from __future__ import annotations

import math
import struct

import pytest
import torch

import fault_a2a.reference as reference
from fault_a2a._core import core
from fault_a2a.placement import Placement
from tests.test_fp8 import BF16, DTYPES, F16, F32, every_pattern, name_of, structured_floats
from tests.test_reference import bf16, f32, f32_bits

HIDDENS = [8, 16, 24, 32, 40, 56, 64, 72, 128, 1000, 2048, 7168, 7176, 16384]


def f16(value: float) -> float:
    """Nearest float16, ties to even, by Python's own arithmetic."""
    if math.isnan(value) or math.isinf(value):
        return value
    try:
        return struct.unpack("<e", struct.pack("<e", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


ROUND = {BF16: bf16, F16: f16, F32: f32}


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    same = reference.same_bits(got, want)
    assert same.all(), f"{(~same).sum()} differ, first at {(~same).nonzero()[0].tolist()}"


def with_canary(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((count + 16,), 77.0, dtype=dtype)


def checked(out: torch.Tensor, count: int) -> torch.Tensor:
    assert (out[count:] == 77.0).all(), "wrote past the end"
    return out[:count]


# ---- casts ----------------------------------------------------------------------------------------------------------
def widen(row: torch.Tensor) -> torch.Tensor:
    out = with_canary(row.numel(), F32)
    core.widen_row(name_of(row.dtype), out.data_ptr(), row.data_ptr(), row.numel())
    return checked(out, row.numel())


def narrow(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = with_canary(values.numel(), dtype)
    core.store_row(name_of(dtype), out.data_ptr(), values.data_ptr(), values.numel())
    return checked(out, values.numel())


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_widening_every_pattern_is_torchs(dtype):
    values = every_pattern(dtype)
    assert_same(widen(values), values.float())


def test_widening_float16_is_pythons():
    patterns = [bits for bits in range(1 << 16) if bits & 0x7FFF <= 0x7C00]
    values = torch.tensor(patterns, dtype=torch.int32).to(torch.int16).view(F16)
    want = [f32_bits(struct.unpack("<e", struct.pack("<H", bits))[0]) for bits in patterns]
    assert (widen(values).view(torch.int32).long() & 0xFFFFFFFF).tolist() == want


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_torchs(dtype):
    values = structured_floats()
    assert_same(narrow(values, dtype), values.to(dtype))
    there_and_back = every_pattern(dtype if dtype != F32 else BF16)
    assert_same(narrow(there_and_back.float(), there_and_back.dtype), there_and_back)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_rounding_is_integer_arithmetics(dtype):
    """Torch is not believed either: around every tie of a sample of patterns, denormals and the largest among them."""
    bits = [*range(0, 0x7C00, 41), 1, 2, 3, 0x3FF, 0x400, 0x401, 0x7BFF]
    exact = torch.tensor(bits, dtype=torch.int16).view(dtype).float()
    following = torch.tensor([pattern + 1 for pattern in bits], dtype=torch.int16).view(dtype).float()
    middle = exact + (following - exact) / 2
    middle = torch.where(middle.isinf(), 65520.0, middle).view(torch.int32)
    values = torch.cat([middle - 1, middle, middle + 1]).view(F32)
    values = torch.cat([values, -values, torch.tensor([0.0, -0.0, math.inf, -math.inf, 2.0**-149, 3e38, -3e38])])
    got = narrow(values, dtype).float().tolist()
    assert [f32_bits(value) for value in got] == [f32_bits(ROUND[dtype](value)) for value in values.tolist()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 15, 16, 17, 31, 33])
def test_casts_of_any_count(count, dtype):
    values = torch.linspace(-3, 70000, 33)[:count].contiguous()
    assert_same(narrow(values, dtype), values.to(dtype))
    assert_same(widen(values.to(dtype)), values.to(dtype).float())


# ---- the weighted sum -----------------------------------------------------------------------------------------------
def weighted_sum(rows: list[torch.Tensor], weights: list[float], factor: float = 1.0, zero: bool = False):
    """Through the core; the rows in one pass, and the same in steps, must agree, whatever rows a test sums."""
    dtype, hidden = rows[0].dtype, rows[0].numel()
    out = with_canary(hidden, dtype)
    at = [row.data_ptr() for row in rows]
    core.weighted_sum(name_of(dtype), out.data_ptr(), at, weights, hidden, factor, zero)
    got = checked(out, hidden)
    if not zero:
        assert_same(in_torch(rows, weights, factor), got)
    return got


def in_torch(rows: list[torch.Tensor], weights: list[float], factor: float = 1.0) -> torch.Tensor:
    total = torch.zeros(rows[0].numel())
    for row, weight in zip(rows, torch.tensor(weights), strict=True):
        total = total + weight * row.float()
    return (total * torch.tensor(factor) if factor != 1.0 else total).to(rows[0].dtype)


def wild_rows(seed: int, num_rows: int, hidden: int, dtype: torch.dtype):
    """Rows of wildly different size, so that the order and the number of roundings show."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.randint(-12, 12, (num_rows, hidden), generator=g).float())
    rows = (torch.randn(num_rows, hidden, generator=g) * scale).to(dtype)
    return list(rows), torch.rand(num_rows, generator=g).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDENS)
def test_sum_is_torchs(hidden, dtype):
    for num_rows, factor in ((1, 1.0), (2, 1.5), (8, 1.0), (8, 4 / 3), (32, 0.7)):
        rows, weights = wild_rows(hidden + num_rows, num_rows, hidden, dtype)
        assert_same(weighted_sum(rows, weights, factor), in_torch(rows, weights, factor))


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("on_lost", ["drop", "renormalize"])
def test_sum_is_the_references(dtype, on_lost):
    hidden, num_topk = 264, 6
    rows, weights = wild_rows(3, num_topk, hidden, dtype)
    kept = [k for k in range(num_topk) if k % 3 != 1]
    delivered = torch.tensor([[k in kept for k in range(num_topk)]])
    want = reference.combine(
        torch.stack(rows)[None],
        torch.arange(num_topk)[None],
        torch.tensor(weights)[None],
        delivered,
        placement=Placement.contiguous(num_topk, 2),
        on_lost=on_lost,
    )
    factor = 1.0
    if on_lost == "renormalize":
        everything, here = 0.0, 0.0
        for k in range(num_topk):
            everything = f32(everything + f32(weights[k]))
            here = f32(here + f32(weights[k])) if k in kept else here
        factor = f32(everything / here)
    assert_same(weighted_sum([rows[k] for k in kept], [weights[k] for k in kept], factor), want[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_against_the_oracle(dtype):
    """Python loops: each product, each sum and the factor rounded to float32, the result to the type."""
    rows, weights = wild_rows(9, 5, 48, dtype)
    weights = [f32(weight) for weight in weights]
    got = weighted_sum(rows, weights, 1.25).float().tolist()
    for i in range(48):
        total = 0.0
        for row, weight in zip(rows, weights, strict=True):
            total = f32(total + f32(weight * row[i].float().item()))
        assert f32_bits(got[i]) == f32_bits(ROUND[dtype](f32(total * 1.25)))


@pytest.mark.parametrize("hidden", [8, 16, 32, 40, 4096])
def test_products_are_rounded_before_they_are_added(hidden):
    """(1 + 2^-12)^2 - (1 + 2^-11) is 2^-24, and zero once the product was rounded: a fused multiply-add shows."""
    weight = 1 + 2**-12
    first = torch.full((hidden,), -(1 + 2**-11))
    second = torch.full((hidden,), weight)
    assert (weighted_sum([first, second], [1.0, weight]) == 0.0).all()
    fused = first.double() + weight * second.double()
    assert (fused.float() == 2**-24).all(), "the input tells the two apart"


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_of_special_values(dtype):
    smallest = torch.finfo(dtype).smallest_normal / 4
    special = [0.0, -0.0, smallest, -smallest, torch.finfo(dtype).max, math.inf, -math.inf, math.nan]
    one = torch.tensor(special * 8).to(dtype)
    other = torch.tensor([value for value in special for _ in range(8)]).to(dtype)
    for weights in ([1.0, 1.0], [-1.0, 0.5], [0.0, 2.0], [1e-30, 1e30], [math.inf, 1.0], [math.nan, 0.0]):
        for factor in (1.0, -1.0, 0.0, math.inf, math.nan, 1e-38):
            assert_same(weighted_sum([one, other], weights, factor), in_torch([one, other], weights, factor))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_begins_with_plus_zero(dtype):
    row = torch.full((40,), -0.0, dtype=dtype)
    assert_same(weighted_sum([row], [1.0]), torch.zeros(40, dtype=dtype))
    assert_same(weighted_sum([row], [1.0], factor=-1.0), torch.full((40,), -0.0, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_reads_no_row(dtype):
    out = with_canary(40, dtype)
    core.weighted_sum(name_of(dtype), out.data_ptr(), [0, 0], [1.0, 1.0], 40, math.nan, True)
    assert_same(checked(out, 40), torch.zeros(40, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_row_gives_plus_zero(dtype):
    out = with_canary(40, dtype)
    core.weighted_sum(name_of(dtype), out.data_ptr(), [], [], 40)
    assert_same(checked(out, 40), torch.zeros(40, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_lie_anywhere(dtype):
    """Aligned to their elements and to nothing else, and the last one ends with its memory."""
    rows, weights = wild_rows(4, 3, 1000, dtype)
    moved = []
    for shift, row in enumerate(rows, start=1):
        memory = torch.full((1000 + shift,), math.nan, dtype=dtype)
        memory[shift:] = row
        moved.append(memory[shift:])
    assert_same(weighted_sum(moved, weights), in_torch(rows, weights))


def test_as_many_weights_as_rows():
    with pytest.raises(ValueError, match="weights: one a row"):
        core.weighted_sum("float32", 0, [0], [], 8)


# ---- copies ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("copy", ["copy_row", "stream_row"])
@pytest.mark.parametrize("to_shift", [0, 16, 24, 63])
@pytest.mark.parametrize("from_shift", [0, 8, 33])
def test_copies_copy(copy, to_shift, from_shift):
    g = torch.Generator().manual_seed(1)
    for num_bytes in (0, 1, 16, 63, 64, 65, 127, 128, 4096, 14336, 14352, 100_001):
        source = torch.randint(0, 256, (num_bytes + from_shift,), dtype=torch.uint8, generator=g)
        memory = torch.full((num_bytes + 256,), 0x5A, dtype=torch.uint8)
        first = -memory.data_ptr() % 64 + to_shift
        getattr(core, copy)(memory.data_ptr() + first, source.data_ptr() + from_shift, num_bytes)
        assert torch.equal(memory[first : first + num_bytes], source[from_shift:])
        assert (memory[:first] == 0x5A).all() and (memory[first + num_bytes :] == 0x5A).all()
