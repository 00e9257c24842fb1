"""Operators around the verbs: against loops that say what they mean, under torch's checks, and in Triton's interpreter.

Shapes are as small as they can be: an interpreted program takes milliseconds. Nothing here was run on a GPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fault_a2a.row_ops  # noqa: F401  registers the operators
from fault_a2a import reference
from fault_a2a.reference import same_bits
from tests.test_conformance import AWKWARD

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, which interprets, has an opinion on infinities
]

BF16, F16, F32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
OPS = torch.ops.fault_a2a
INF, NAN = math.inf, math.nan
NONE = torch.iinfo(torch.int32).min


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    return tuple(result) if isinstance(result, tuple) else (result,)


def check_same(got: Any, want: Any) -> None:
    for one, other in zip(as_tuple(got), as_tuple(want), strict=True):
        if one.dtype == E4M3:
            one, other = one.view(torch.uint8), other.view(torch.uint8)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        differs = (~same_bits(one, other)).nonzero()
        assert not len(differs), f"{len(differs)} elements differ, first at {differs[0].tolist()}"


# --- what they mean


def routed(
    scores: torch.Tensor, replicas: list[list[int]], ranks: list[int], active: list[int], num_topk: int, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routing, a choice at a time."""
    out = torch.empty(len(scores), num_topk, dtype=torch.int64)
    weights = torch.empty(len(scores), num_topk)
    for token, line in enumerate(scores.tolist()):
        best = sorted(
            range(len(line)), key=lambda e: (not math.isnan(line[e]), 0.0 if line[e] != line[e] else -line[e], e)
        )
        for k, logical in enumerate(best[:num_topk]):
            live = [
                p for p in replicas[logical] if 0 <= p < len(ranks) and 0 <= ranks[p] < len(active) and active[ranks[p]]
            ]
            out[token, k] = live[(first + token) % len(live)] if live else -1
            weights[token, k] = scores[token, logical]
    return out, weights


REPLICAS = [[0, 5, -1], [1, -1, -1], [NONE, 2, 6], [-1, -1, -1], [3, 9, -1], [4, -1, 7]]  # 9 names no expert
RANKS = [0, 0, 1, 1, 2, 2, 0, 7]  # expert 7 is on no rank
VIEWS = [[1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 0, 0]]


def scores_of(num_tokens: int, seed: int = 0) -> torch.Tensor:
    scores = torch.randn(num_tokens, len(REPLICAS), generator=seeded(seed))
    awkward = torch.tensor(
        [[0.0, -0.0, 0.0, -0.0, -INF, INF], [NAN, 1.0, NAN, INF, -NAN, -1.0], [1.0, 2.0, 2.0, 2.0, 1.0, 1e-40]]
    )
    return torch.cat([scores, awkward])


def route_arguments(active: list[int], num_tokens: int = 2) -> tuple[Any, ...]:
    tensors = (torch.tensor(one, dtype=torch.int32) for one in (REPLICAS, RANKS, active))
    return (scores_of(num_tokens), *tensors, 3, 4)


@pytest.mark.parametrize("active", VIEWS, ids=str)
def test_route(active: list[int]) -> None:
    scores = scores_of(8)
    for first in (0, 5):
        tensors = (torch.tensor(one, dtype=torch.int32) for one in (REPLICAS, RANKS, active))
        check_same(OPS.route(scores, *tensors, 4, first), routed(scores, REPLICAS, RANKS, active, 4, first))


def test_a_dead_rank_is_routed_around_and_what_only_it_held_is_unroutable() -> None:
    arguments = list(route_arguments([1, 1, 1]))
    whole, weights = OPS.route(*arguments)
    arguments[3] = torch.tensor([1, 0, 1], dtype=torch.int32)
    degraded, same_weights = OPS.route(*arguments)
    on_rank_1 = torch.tensor([rank == 1 for rank in RANKS])[whole.clamp(min=0)] & (whole >= 0)
    assert (degraded[on_rank_1] != whole[on_rank_1]).all() and torch.equal(weights.isnan(), same_weights.isnan())
    held = [{p for p in line if 0 <= p < len(RANKS)} for line in REPLICAS]
    assert {2, 6} in held and 3 not in degraded and 2 not in degraded and (degraded == -1).any()


CHOICES = torch.tensor([[2, 0, -1], [5, 2, 2], [-1, -1, -1], [1, 0, 6], [3, -7, 2]])  # 6 and -7 name no expert


def permuted(x: torch.Tensor, idx: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...]:
    """Expert by expert, token by token."""
    rows, offsets, positions = [], [0], torch.full(idx.shape, -1, dtype=torch.int32)
    for expert in range(num_experts):
        for token, k in itertools.product(*map(range, idx.shape)):
            if idx[token, k] == expert:
                positions[token, k] = len(rows)
                rows.append(x[token])
        offsets.append(len(rows))
    rows += [torch.zeros_like(x[0])] * (idx.numel() - len(rows))
    return torch.stack(rows), torch.tensor(offsets, dtype=torch.int32), positions


def rows_of(num_rows: int, hidden: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    x = torch.randn(num_rows, hidden, generator=seeded(seed)) * 4
    places = torch.randint(len(AWKWARD), x.shape, generator=seeded(seed + 1))
    return torch.where(torch.rand(x.shape, generator=seeded(seed + 2)) < 0.2, AWKWARD[places], x).to(dtype)


@pytest.mark.parametrize("dtype", [BF16, F32, torch.int8])
def test_permute_and_back(dtype: torch.dtype) -> None:
    x = rows_of(5, 6, F32).nan_to_num(1.0, 2.0, 3.0).to(dtype)
    for idx in (CHOICES, CHOICES.int()):
        rows, offsets, positions = OPS.permute(x, idx, 6)
        check_same((rows, offsets, positions), permuted(x, idx, 6))
        names_one = (idx >= 0) & (idx < 6)
        back = OPS.unpermute(rows, positions)
        check_same(back, torch.where(names_one[..., None], x[:, None].expand(-1, 3, -1), torch.zeros_like(x[:, None])))


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_weighted_reduce_is_the_sum_that_combine_makes(dtype: torch.dtype) -> None:
    x, weights = rows_of(5, 16, dtype), torch.randn(5, 3, generator=seeded(3))
    rows, _, positions = OPS.permute(x, CHOICES, 6)
    got = OPS.weighted_reduce(rows, positions, weights)
    chosen = x[:, None].expand(-1, 3, -1)
    check_same(got, reference.combine(chosen, CHOICES, weights, positions >= 0))
    beyond = torch.full_like(positions, len(rows))  # a row that is not there adds nothing
    check_same(OPS.weighted_reduce(rows, beyond, weights), torch.zeros_like(got))


@pytest.mark.parametrize("scale", ["float32", "ue8m0"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_casts_have_the_bits_of_the_reference(dtype: torch.dtype, scale: str) -> None:
    x = rows_of(4, 264, dtype)
    q, scales = OPS.quantize_1x128(x, scale)
    check_same((q, scales), reference.quantize_1x128(x, scale))
    wide = reference.dequantize_1x128(q, scales)
    check_same(OPS.dequantize_1x128(q, scales), wide)
    check_same(OPS.dequantize_1x128(q, scales, dtype), wide.to(dtype))


# --- Triton, interpreted: the same bits


def in_triton(name: str, *arguments: Any) -> Any:
    """The kernel of an operator, on CPU tensors."""
    import importlib

    target = pytest.importorskip(
        "fault_a2a.kernels.triton.target", reason="install triton==3.7.1", exc_type=ImportError
    )
    if not target.INTERPRETED:
        pytest.skip("its addresses are the CPU's")
    file = {"route": "ops_route", "quantize_1x128": "ops_quantize", "dequantize_1x128": "ops_quantize"}
    kernels = importlib.import_module(f"fault_a2a.kernels.triton.{file.get(name, 'ops_permute')}")
    return getattr(kernels, name)(*arguments)


@pytest.mark.parametrize("active", VIEWS[1:3], ids=str)
def test_route_in_triton(active: list[int]) -> None:
    arguments = route_arguments(active)
    check_same(in_triton("route", *arguments), reference.route(*arguments))


@pytest.mark.parametrize(
    ("dtype", "hidden"), [(BF16, 8), (F32, 3), (torch.int8, 1040)], ids=["words", "bytes", "several blocks of bytes"]
)
def test_permute_and_back_in_triton(dtype: torch.dtype, hidden: int) -> None:
    x = rows_of(5, hidden, F32).nan_to_num(1.0, 2.0, 3.0).to(dtype)
    idx = CHOICES.int() if dtype == F32 else CHOICES
    got = in_triton("permute", x, idx, 6)
    check_same(got, reference.permute(x, idx, 6))
    positions = got[2].masked_fill(idx == 5, 99)  # a row that is not there
    check_same(in_triton("unpermute", got[0], positions), reference.unpermute(got[0], positions))


def test_permute_in_triton_of_more_than_a_block() -> None:
    """Choices and experts beyond what a program looks at together, and tokens that do not begin on a word."""
    idx = torch.randint(-1, 70, (66, 2), generator=seeded(5))
    x = torch.arange(66 * 8 + 2, dtype=torch.int16)[2:].view(66, 8).view(BF16)
    assert x.data_ptr() % 8 != 0
    check_same(in_triton("permute", x, idx, 70), reference.permute(x, idx, 70))


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_weighted_reduce_in_triton(dtype: torch.dtype) -> None:
    rows, weights = rows_of(7, 24, dtype), torch.randn(2, 3, generator=seeded(3))
    positions = torch.tensor([[6, -1, 0], [7, 2, 2]], dtype=torch.int32)
    check_same(
        in_triton("weighted_reduce", rows, positions, weights), reference.weighted_reduce(rows, positions, weights)
    )


@pytest.mark.parametrize("scale", ["float32", "ue8m0"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_casts_in_triton(dtype: torch.dtype, scale: str) -> None:
    """To the bit: the kernels round by integer arithmetic, so the interpreter's wrong fp8 cast (triton-lang/triton,
    issue 8322) and its truncation to bfloat16 never happen, and no tolerance is needed."""
    x = rows_of(2, 264, dtype)
    x[0, 128:256], x[1, :128] = 0, x[1, :128].nan_to_num(1.0, 2.0, 3.0)  # a block of zeros, a finite one
    want = reference.quantize_1x128(x, scale)
    check_same(in_triton("quantize_1x128", x, scale), want)
    check_same(in_triton("dequantize_1x128", *want, dtype), reference.dequantize_1x128(*want).to(dtype))


def test_every_e4m3_byte_and_every_exponent_in_triton() -> None:
    q = torch.arange(256, dtype=torch.uint8).view(E4M3).view(1, 256)
    scales = torch.tensor([[3.0e-5, 448.0]])
    check_same(in_triton("dequantize_1x128", q, scales), reference.dequantize_1x128(q, scales))
    exponents = torch.tensor([0, 1, 127, 255, 254, 2, 128, 0], dtype=torch.uint8).view(torch.int32).view(1, 2)
    q = torch.arange(896, dtype=torch.int32).to(torch.uint8).view(E4M3).view(1, 896)
    check_same(in_triton("dequantize_1x128", q, exponents), reference.dequantize_1x128(q, exponents))


# --- under torch's checks


def arguments_of(name: str) -> tuple[Any, ...]:
    x, weights = rows_of(5, 16, BF16).nan_to_num(1.0, 2.0, 3.0), torch.rand(5, 3, generator=seeded(1))
    permuted = reference.permute(x, CHOICES, 6)
    return {
        # No NaN, which a comparison of two calls takes for a difference.
        "route": (torch.rand(5, 6, generator=seeded(2)), *route_arguments([1, 0, 1])[1:]),
        "permute": (x, CHOICES, 6),
        "unpermute": (permuted.rows, permuted.positions),
        "weighted_reduce": (permuted.rows, permuted.positions, weights),
        "quantize_1x128": (x, "ue8m0"),
        "dequantize_1x128": (*reference.quantize_1x128(x), BF16),
    }[name]


NAMES = ["route", "permute", "unpermute", "weighted_reduce", "quantize_1x128", "dequantize_1x128"]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    utils = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if name == "dequantize_1x128":
        utils.remove("test_schema")  # it looks for changed arguments by a product, which torch does not have for fp8
    torch.library.opcheck(getattr(OPS, name).default, arguments_of(name), test_utils=utils)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_no_tokens_or_one(num_tokens: int) -> None:
    """Sizes that are special to compilers, and to kernels that get no rows."""
    x, idx = rows_of(num_tokens, 16, BF16), CHOICES[:num_tokens]
    scores, *tables = route_arguments([1, 0, 1])
    check_same(OPS.route(scores[:num_tokens], *tables), in_triton("route", scores[:num_tokens], *tables))
    rows, offsets, positions = OPS.permute(x, idx, 6)
    check_same((rows, offsets, positions), in_triton("permute", x, idx, 6))
    check_same(OPS.unpermute(rows, positions), in_triton("unpermute", rows, positions))
    weights = torch.ones(num_tokens, 3)
    assert OPS.weighted_reduce(rows, positions, weights).shape == (num_tokens, 16)
    q, scales = OPS.quantize_1x128(x)
    check_same((q, scales), in_triton("quantize_1x128", x))
    assert OPS.dequantize_1x128(q, scales).shape == (num_tokens, 16)


def layer(x: torch.Tensor, scores: torch.Tensor, tables: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Experts of this rank alone, rows there and back as fp8."""
    idx, weights = OPS.route(scores, *tables, 3)
    rows, _, positions = OPS.permute(x, idx, len(RANKS))
    q, scales = OPS.quantize_1x128(rows)
    return OPS.weighted_reduce(OPS.dequantize_1x128(q, scales, x.dtype), positions, weights)


def test_a_layer_compiles_for_any_number_of_tokens() -> None:
    tables = tuple(torch.tensor(one, dtype=torch.int32) for one in (REPLICAS, RANKS, [1, 0, 1]))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    try:
        for num_tokens in (4, 1, 7):
            scores = scores_of(num_tokens)[:num_tokens]
            x = rows_of(num_tokens, 16, BF16).nan_to_num(1.0, 2.0, 3.0)
            check_same(compiled(x, scores, tables), layer(x, scores, tables))
    finally:
        torch._dynamo.reset()


# --- refusals: the argument is named, and what to give

BAD: dict[str, tuple[str, Callable[[list[Any]], None], type[Exception], str]] = {
    "scores' dtype": (
        "route",
        lambda a: a.__setitem__(0, a[0].double()),
        TypeError,
        "scores is torch.float64; convert it",
    ),
    "replicas' shape": (
        "route",
        lambda a: a.__setitem__(1, a[1][:2]),
        ValueError,
        r"replicas has shape \[2, 3\]; give \[6",
    ),
    "no ranks": (
        "route",
        lambda a: a.__setitem__(3, a[3][:0]),
        ValueError,
        "the last size of active_mask is 0; give 1 to",
    ),
    "num_topk": ("route", lambda a: a.__setitem__(4, 7), ValueError, "num_topk is 7; give 1 to 6"),
    "first_token": ("route", lambda a: a.__setitem__(5, -1), ValueError, "first_token is -1; give 0 to"),
    "topk_idx' length": (
        "permute",
        lambda a: a.__setitem__(1, a[1][:3]),
        ValueError,
        r"topk_idx has shape \[3, 3\]; give \[5",
    ),
    "topk_idx' dtype": ("permute", lambda a: a.__setitem__(1, a[1].float()), TypeError, "topk_idx is torch.float32"),
    "num_experts": ("permute", lambda a: a.__setitem__(2, 0), ValueError, "num_experts is 0; give 1 to 65536"),
    "x's strides": (
        "permute",
        lambda a: a.__setitem__(0, a[0].t().contiguous().t()),
        ValueError,
        r"x is not contiguous",
    ),
    "positions' dtype": ("unpermute", lambda a: a.__setitem__(1, a[1].long()), TypeError, "positions is torch.int64"),
    "rows' device": (
        "unpermute",
        lambda a: a.__setitem__(1, a[1].to("meta")),
        ValueError,
        "positions is on meta and rows on",
    ),
    "rows' dtype": ("weighted_reduce", lambda a: a.__setitem__(0, a[0].double()), TypeError, "rows is torch.float64"),
    "weights' shape": (
        *("weighted_reduce", lambda a: a.__setitem__(2, a[2][:, :2].contiguous()), ValueError),
        r"topk_weights has shape \[5, 2\]; give \[5, 3\]",
    ),
    "scale": (
        "quantize_1x128",
        lambda a: a.__setitem__(1, "e8"),
        ValueError,
        'scale is "e8"; give "float32" or "ue8m0"',
    ),
    "scales' shape": (
        "dequantize_1x128",
        lambda a: a.__setitem__(1, a[1][:2]),
        ValueError,
        r"scales has shape \[2, 1\]",
    ),
    "dtype": (
        "dequantize_1x128",
        lambda a: a.__setitem__(2, E4M3),
        ValueError,
        "dtype is torch.float8_e4m3fn; give torch.b",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_misuse_is_named(what: str) -> None:
    name, spoil, error, text = BAD[what]
    arguments = list(arguments_of(name))
    spoil(arguments)
    with pytest.raises(error, match=text):
        getattr(OPS, name)(*arguments)
