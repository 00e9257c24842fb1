"""The reference against an oracle that shares nothing with it: python loops, and rounding by integer arithmetic."""

from __future__ import annotations

import itertools
import math
import random
import struct

import pytest
import torch

import fault_a2a.reference as reference
from fault_a2a.placement import Placement

BF16, F32 = torch.bfloat16, torch.float32


# ---- the oracle -----------------------------------------------------------------------------------------------------
def f32_bits(value: float) -> int:
    """Nearest float32, as bits. Python computes in double: for one +, * or / of float32s that double-rounds safely."""
    try:
        return struct.unpack("<I", struct.pack("<f", value))[0]
    except OverflowError:
        return 0xFF800000 if value < 0 else 0x7F800000


def f32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<I", f32_bits(value)))[0]


def divide(a: float, b: float) -> float:
    if b == 0:
        return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1, b)
    return f32(a / b)


def bf16(value: float) -> float:
    """Round a float32 to bfloat16, ties to even, by integer arithmetic on its bits."""
    bits = f32_bits(value)
    if math.isnan(value):
        return value
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def oracle_combine(rows, topk_idx, weights, delivered, *, reduce, expert_rank, on_lost, round_to):
    num_tokens, num_topk, hidden = len(rows), len(topk_idx[0]) if topk_idx else 0, len(rows[0][0]) if rows else 0
    out = []
    for t in range(num_tokens):
        taken = [k for k in range(num_topk) if topk_idx[t][k] != -1 and delivered[t][k]]
        asked = [k for k in range(num_topk) if topk_idx[t][k] != -1]
        given_weight = wanted_weight = 0.0
        for k in taken:
            given_weight = f32(given_weight + weights[t][k])
        for k in asked:
            wanted_weight = f32(wanted_weight + weights[t][k])
        line = []
        for h in range(hidden):
            if reduce == "owner":
                groups = [taken]
            else:
                ranks = sorted({expert_rank[topk_idx[t][k]] for k in taken})
                groups = [[k for k in taken if expert_rank[topk_idx[t][k]] == rank] for rank in ranks]
            sums = []
            for group in groups:
                acc = 0.0
                for k in group:
                    acc = f32(acc + f32(weights[t][k] * rows[t][k][h]))
                sums.append(acc)
            if reduce == "owner":
                total = sums[0]
            else:
                total = 0.0
                for partial in sums:
                    total = f32(total + round_to(partial))
            if on_lost == "renormalize" and taken != asked:
                total = 0.0 if given_weight == 0 else f32(total * divide(wanted_weight, given_weight))
            line.append(round_to(total))
        out.append(line)
    return out


def assert_same_bits(actual: torch.Tensor, expected: list, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    for t, line in enumerate(expected):
        for h, value in enumerate(line):
            got = actual[t, h].float().item()
            if math.isnan(value):
                assert math.isnan(got), (t, h, got)
            else:
                assert f32_bits(got) == f32_bits(value), (t, h, got, value)


def random_routing(generator, num_tokens, num_topk, num_experts, p_none=0.15):
    """Distinct experts per token, some choices empty."""
    chosen = torch.stack([torch.randperm(num_experts, generator=generator)[:num_topk] for _ in range(num_tokens)])
    return torch.where(torch.rand(chosen.shape, generator=generator) < p_none, -1, chosen)


def random_case(seed, dtype, num_tokens=6, num_topk=4, hidden=9, num_experts=8, p_lost=0.3):
    """Rows of wildly different size, so that the order and the number of roundings show."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.randint(-12, 12, (num_tokens, num_topk, hidden), generator=g).float())
    rows = (torch.randn(num_tokens, num_topk, hidden, generator=g) * scale).to(dtype)
    topk_idx = random_routing(g, num_tokens, num_topk, num_experts)
    weights = torch.rand(num_tokens, num_topk, generator=g)
    delivered = torch.rand(num_tokens, num_topk, generator=g) >= p_lost
    return rows, topk_idx, weights, delivered


def check_combine(rows, topk_idx, weights, delivered, *, reduce, placement, on_lost):
    dtype = rows.dtype
    got = reference.combine(rows, topk_idx, weights, delivered, reduce=reduce, placement=placement, on_lost=on_lost)
    want = oracle_combine(
        rows.float().tolist(),
        topk_idx.tolist(),
        weights.tolist(),
        delivered.tolist(),
        reduce=reduce,
        expert_rank=placement.expert_rank,
        on_lost=on_lost,
        round_to=bf16 if dtype == BF16 else f32,
    )
    assert_same_bits(got, want, dtype)
    return got


# ---- rounding -------------------------------------------------------------------------------------------------------
def test_torch_rounds_to_bfloat16_as_integers_do():
    """Every class of float32: denormal, tie, largest finite, infinite."""
    random_bits = random.Random(7)
    patterns = [sign | high << 16 | low for sign in (0, 1 << 31) for high in range(0, 0x7F80, 37) for low in LOW_HALVES]
    patterns += [random_bits.getrandbits(32) for _ in range(2000)]
    values = [struct.unpack("<f", struct.pack("<I", bits))[0] for bits in patterns]
    values = [value for value in values if not math.isnan(value)]
    rounded = torch.tensor(values, dtype=F32).to(BF16).float().tolist()
    assert [f32_bits(value) for value in rounded] == [f32_bits(bf16(value)) for value in values]


LOW_HALVES = (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)


def test_torch_rounds_multiply_and_add_separately():
    """The reference relies on it: a fused multiply-add gives other bits on this very input."""
    g = torch.Generator().manual_seed(1)
    acc, row, weight = torch.randn(4, 999, generator=g), torch.randn(4, 999, generator=g), torch.rand(4, 1, generator=g)
    got = acc + weight * row
    fused = (acc.double() + weight.double() * row.double()).float()
    want = [
        [f32(a + f32(w[0] * r)) for a, r in zip(*line, strict=True)]
        for *line, w in zip(acc.tolist(), row.tolist(), weight.tolist(), strict=True)
    ]
    assert_same_bits(got, want, F32)
    assert (got != fused).any(), "the input tells the two apart"


# ---- combine --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("dtype", "reduce", "on_lost"),
    list(itertools.product([BF16, F32], ["owner", "expert"], ["drop", "renormalize"])),
)
def test_combine_against_the_oracle(seed, dtype, reduce, on_lost):
    rows, topk_idx, weights, delivered = random_case(seed, dtype)
    placement = Placement([3, 0, 1, 1, 0, 2, 2, 1], 4)
    check_combine(rows, topk_idx, weights, delivered, reduce=reduce, placement=placement, on_lost=on_lost)


@pytest.mark.parametrize("num_topk", [1, 2, 32])
def test_combine_at_the_edges_of_topk(num_topk):
    rows, topk_idx, weights, delivered = random_case(5, BF16, num_topk=num_topk, num_experts=40, hidden=8)
    for reduce, on_lost in itertools.product(["owner", "expert"], ["drop", "renormalize"]):
        placement = Placement.contiguous(40, 5)
        check_combine(rows, topk_idx, weights, delivered, reduce=reduce, placement=placement, on_lost=on_lost)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_lost_rows_are_not_looked_at(dtype):
    """0 * NaN is NaN: a lost row must be skipped, not weighted with zero."""
    rows, topk_idx, weights, delivered = random_case(11, dtype)
    poisoned = rows.clone()
    poisoned[~delivered | (topk_idx == -1)] = math.nan
    placement = Placement.contiguous(8, 3)
    for reduce, on_lost in itertools.product(["owner", "expert"], ["drop", "renormalize"]):
        options = {"reduce": reduce, "placement": placement, "on_lost": on_lost}
        clean = check_combine(rows, topk_idx, weights, delivered, **options)
        assert (
            reference.same_bits(reference.combine(poisoned, topk_idx, weights, delivered, **options), clean).all()
            and not clean.isnan().any()
        )


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_delivered_nan_and_infinity_arrive(dtype):
    rows, topk_idx, weights, delivered = random_case(12, dtype)
    delivered[:] = True
    topk_idx = topk_idx.where(topk_idx != -1, torch.arange(4))  # distinct enough: combine asks for no distinctness
    rows[0, 1, 2], rows[1, 0, 3], rows[2, 0, 4], rows[2, 3, 4] = math.nan, math.inf, math.inf, -math.inf
    placement = Placement.contiguous(8, 3)
    for reduce in ("owner", "expert"):
        out = check_combine(rows, topk_idx, weights, delivered, reduce=reduce, placement=placement, on_lost="drop")
        assert out[0, 2].isnan() and out[1, 3] == math.inf and out[2, 4].isnan() and out.isnan().sum() == 2


def test_negative_zero():
    """The sum starts at +0.0, so even a lone -0.0 row comes out as +0.0; a tiny negative rounds to -0.0 in bfloat16."""
    topk_idx, weights, delivered = torch.tensor([[0, 1]]), torch.ones(1, 2), torch.tensor([[True, True]])
    placement = Placement([0, 1], 2)
    for reduce, dtype in itertools.product(["owner", "expert"], [BF16, F32]):
        rows = torch.full((1, 2, 8), -0.0, dtype=dtype)
        out = check_combine(rows, topk_idx, weights, delivered, reduce=reduce, placement=placement, on_lost="drop")
        assert not out.signbit().any()
    tiny = torch.full((1, 2, 8), -1e-40, dtype=BF16)
    weights = torch.full((1, 2), 1e-5)
    out = check_combine(tiny, topk_idx, weights, delivered, reduce="owner", placement=placement, on_lost="drop")
    assert out.signbit().all() and (out == 0).all()


@pytest.mark.parametrize("reduce", ["owner", "expert"])
def test_renormalize(reduce):
    placement = Placement([0, 0, 1, 2], 3)
    rows = torch.tensor([[[1.0] * 8, [10.0] * 8, [100.0] * 8]]).repeat(6, 1, 1)
    topk_idx = torch.tensor([[0, 2, 3], [0, 2, 3], [0, -1, 3], [0, 2, 3], [0, 2, 3], [-1, -1, -1]])
    weights = torch.tensor([[0.25, 0.25, 0.5]] * 3 + [[0.0, 0.5, 0.5], [1.0, -1.0, 0.5], [0.3, 0.3, 0.4]])
    delivered = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 0, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    out = check_combine(rows, topk_idx, weights, delivered, reduce=reduce, placement=placement, on_lost="renormalize")
    assert out[0, 0] == 52.75, "nothing lost, nothing scaled"
    assert out[1, 0] == f32(50.25 * f32(1.0 / 0.75)), "one lost"
    assert out[2, 0] == 50.25, "no expert is not a lost expert"
    for token, why in ((3, "delivered weights sum to zero"), (4, "they cancel"), (5, "no choice at all")):
        assert (out[token] == 0).all() and not out[token].signbit().any(), why
    none_came = torch.zeros_like(delivered)
    rows[:] = math.nan
    out = reference.combine(
        rows, topk_idx, weights, none_came, reduce=reduce, placement=placement, on_lost="renormalize"
    )
    assert (out == 0).all() and not out.signbit().any()


def test_renormalize_leaves_bits_alone_when_all_arrived_even_if_the_weights_cancel():
    rows, topk_idx, weights, delivered = random_case(3, F32, p_lost=0.0)
    topk_idx[0] = torch.arange(4)
    weights[0] = torch.tensor([1.0, -1.0, 0.5, -0.5])
    args = (rows, topk_idx, weights, delivered)
    assert reference.combine(*args)[0].all()
    assert reference.same_bits(reference.combine(*args, on_lost="renormalize"), reference.combine(*args)).all()


def test_codes_and_bools_mean_the_same():
    rows, topk_idx, weights, _ = random_case(4, F32)
    codes = torch.randint(0, 4, topk_idx.shape, dtype=torch.uint8)
    by_codes = reference.combine(rows, topk_idx, weights, codes)
    assert reference.same_bits(by_codes, reference.combine(rows, topk_idx, weights, codes == 1)).all()


def test_reduce_expert_rounds_what_travels():
    """1 + 2^-9 + 2^-9 on two ranks: the partial sum loses what the owner's float32 sum would keep."""
    rows = torch.tensor([1.0, 2**-9, 2**-9, 2**-8]).view(1, 4, 1).expand(1, 4, 8).to(BF16)
    topk_idx, weights, delivered = torch.arange(4)[None], torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool)
    options = {"placement": Placement([0, 0, 0, 1], 2), "on_lost": "drop"}
    by_owner = check_combine(rows, topk_idx, weights, delivered, reduce="owner", **options)
    by_expert = check_combine(rows, topk_idx, weights, delivered, reduce="expert", **options)
    assert by_owner[0, 0] == 1.0078125 and by_expert[0, 0] == 1.0


def test_combine_of_no_tokens():
    out = reference.combine(torch.zeros(0, 4, 8), *(torch.zeros(0, 4, dtype=d) for d in (torch.int64, F32, torch.bool)))
    assert out.shape == (0, 8)


def test_combine_refusals():
    rows, topk_idx, weights, delivered = random_case(4, F32)
    for options, name in [
        ({"reduce": "x"}, "reduce"),
        ({"on_lost": "x"}, "on_lost"),
        ({"reduce": "expert"}, "placement"),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: .*; ?pass"):
            reference.combine(rows, topk_idx, weights, delivered, **options)


# ---- outcome --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_outcome_codes(dtype):
    placement = Placement([0, 1, 2, 3, 0], 4)
    topk_idx = torch.tensor([[0, 1, -1], [2, 3, 4], [-1, -1, -1]], dtype=dtype)
    codes = reference.outcome_codes(topk_idx, placement, (1, 1, 0, 1), lost_ranks={3, 2})
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [[1, 1, 0], [3, 2, 1], [0, 0, 0]], "a rank outside the view is unroutable, not lost"


# ---- dispatch -------------------------------------------------------------------------------------------------------
def oracle_dispatch(xs, topk_idxs, expert_rank, rank, delivered_srcs):
    """[(local expert, src, token, choice, row)] in the order of the rows."""
    local_experts = [expert for expert, holder in enumerate(expert_rank) if holder == rank]
    found = []
    for local, expert in enumerate(local_experts):
        for src in range(len(xs)):
            if src not in delivered_srcs:
                continue
            for token, choices in enumerate(topk_idxs[src].tolist()):
                found += [(local, src, token, k, xs[src][token].tolist()) for k, e in enumerate(choices) if e == expert]
    return found, len(local_experts)


@pytest.mark.parametrize("recv_format", ["batched", "packed"])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("delivered_srcs", [{0, 1, 2, 3}, {3, 0}, {2}, set()])
def test_dispatch_against_the_oracle(recv_format, dtype, delivered_srcs):
    g = torch.Generator().manual_seed(2)
    sizes = [5, 0, 7, 3]
    xs = [torch.randn(size, 8, generator=g).to(dtype) for size in sizes]
    topk_idxs = [random_routing(g, size, 3, 6) if size else torch.zeros(0, 3, dtype=torch.int64) for size in sizes]
    placement = Placement([1, 3, 1, 0, 1, 3], 4)
    for rank in range(4):
        given = [x if src in delivered_srcs or src == 0 else None for src, x in enumerate(xs)]
        recv = reference.dispatch(given, topk_idxs, placement, rank, delivered_srcs, recv_format, 7)
        want, num_local = oracle_dispatch(xs, topk_idxs, placement.expert_rank, rank, delivered_srcs)
        assert (
            recv.x.dtype == dtype and recv.num_tokens.dtype == recv.offsets.dtype == recv.sources.dtype == torch.int32
        )
        counts = [sum(line[0] == local for line in want) for local in range(num_local)]
        assert recv.num_tokens.tolist() == counts
        assert recv.offsets.tolist() == [sum(counts[:local]) for local in range(num_local + 1)]
        assert recv.x.shape == ((num_local, 28, 8) if recv_format == "batched" else (len(want), 8))
        flat = recv.x.reshape(-1, 8)
        places = {}
        for line, (local, src, token, choice, row) in zip(recv.sources.tolist(), want, strict=True):
            assert line[1:] == [local, src, token, choice]
            assert flat[line[0]].tolist() == row
            places.setdefault(local, []).append(line[0])
        for local, rows in places.items():
            first = local * 28 if recv_format == "batched" else recv.offsets[local].item()
            assert rows == list(range(first, first + len(rows))), "an expert's rows stand together from its first place"


def test_dispatch_refusals():
    x, topk_idx, placement = torch.zeros(1, 8), torch.zeros(1, 1, dtype=torch.int64), Placement([0], 1)
    with pytest.raises(ValueError, match=r"^num_max_tokens_per_rank"):
        reference.dispatch([x], [topk_idx], placement, 0, {0}, "batched")
    with pytest.raises(ValueError, match=r"^recv_format"):
        reference.dispatch([x], [topk_idx], placement, 0, {0}, "ragged")


# ---- the layer ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reduce", ["owner", "expert"])
def test_layer_equals_the_way_through_dispatch_and_combine(reduce):
    """Rank by rank through the verbs, or at once: the same bits, with and without a lost rank."""
    g = torch.Generator().manual_seed(9)
    num_ranks, hidden, num_experts = 3, 8, 7
    placement = Placement.contiguous(num_experts, num_ranks)
    scale = torch.randn(num_experts, hidden, generator=g)
    xs = [torch.randn(size, hidden, generator=g).to(BF16) for size in (4, 0, 6)]
    topk_idxs = [random_routing(g, len(x), 3, num_experts) if len(x) else torch.zeros(0, 3).long() for x in xs]
    weights = [torch.rand(idx.shape, generator=g) for idx in topk_idxs]

    def expert_rows(expert, x):
        return (x.float() * scale[expert]).to(x.dtype)

    for lost_ranks in (set(), {1}):
        rows = [torch.full((*idx.shape, hidden), math.nan, dtype=BF16) for idx in topk_idxs]
        for rank in set(range(num_ranks)) - lost_ranks:
            recv = reference.dispatch(xs, topk_idxs, placement, rank, range(num_ranks), "packed")
            for row, local, src, token, choice in recv.sources.tolist():
                expert = placement.local_experts(rank)[local]
                rows[src][token, choice] = expert_rows(expert, recv.x[row : row + 1])[0]
        for src, (x, idx, weight) in enumerate(zip(xs, topk_idxs, weights, strict=True)):
            codes = reference.outcome_codes(idx, placement, [1] * num_ranks, lost_ranks)
            options = {"reduce": reduce, "placement": placement, "on_lost": "renormalize"}
            got = reference.combine(rows[src], idx, weight, codes, **options)
            want = reference.moe_layer(x, idx, weight, expert_rows, codes=codes, **options)
            assert reference.same_bits(got, want).all()
            if not lost_ranks:
                assert reference.same_bits(reference.moe_layer(x, idx, weight, expert_rows, **options), want).all()


# ---- comparison -----------------------------------------------------------------------------------------------------
def test_same_bits():
    a = torch.tensor([0.0, 1.0, math.nan, math.nan, math.inf])
    b = torch.tensor([-0.0, 1.0, -math.nan, 1.0, math.inf])
    for dtype in (F32, BF16):
        assert reference.same_bits(a.to(dtype), b.to(dtype)).tolist() == [False, True, True, False, True]
    assert reference.same_bits(torch.zeros(2, 8)[:, ::2], torch.zeros(2, 4)).all(), "any stride"
    with pytest.raises(ValueError, match=r"^actual: .*; pass"):
        reference.same_bits(a, a.to(BF16))
