"""Config, Placement and the errors: what they accept, what they refuse, and that each refusal names its field."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch

from fault_a2a import errors
from fault_a2a.config import Config
from fault_a2a.placement import Placement

GOOD = {"num_experts": 32, "hidden": 1024, "num_topk": 4, "num_max_tokens_per_rank": 64}


def test_defaults():
    config = Config(**GOOD)
    assert (config.dtype, config.recv_format, config.reduce, config.on_lost, config.agreement) == (
        torch.bfloat16,
        "batched",
        "owner",
        "drop",
        "windows",
    )
    assert config.hidden_bytes == 2048 and config.capacity(8) == 512
    assert (config.beat_ms, config.silence_ms, config.stall_ms, config.link_ms) == (10, 2000, 30000, 5000)


def test_config_is_frozen_and_hashable():
    config = Config(**GOOD, placement=[0] * 32)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden = 8
    assert hash(config) == hash(Config(**GOOD, placement=(0,) * 32)) and config == Config(**GOOD, placement=(0,) * 32)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"num_experts": 0}, ValueError),
        ({"num_experts": 1 << 17}, ValueError),
        ({"num_experts": 3.0}, TypeError),
        ({"hidden": 0}, ValueError),
        ({"hidden": 12}, ValueError),
        ({"hidden": 16392}, ValueError),
        ({"hidden": True}, TypeError),
        ({"num_topk": 0}, ValueError),
        ({"num_topk": 33}, ValueError),
        ({"num_topk": 5, "num_experts": 4}, ValueError),
        ({"num_max_tokens_per_rank": 0}, ValueError),
        ({"num_max_tokens_per_rank": 1 << 19}, ValueError),
        ({"num_chunk_tokens": 0}, ValueError),
        ({"num_chunk_tokens": 65}, ValueError),
        ({"num_chunk_tokens": 131072, "num_max_tokens_per_rank": 131072}, ValueError),
        ({"num_chunk_tokens": 1.5}, TypeError),
        ({"dtype": torch.int8}, ValueError),
        ({"dtype": "bf16"}, TypeError),
        ({"recv_format": "ragged"}, ValueError),
        ({"recv_format": None}, TypeError),
        ({"reduce": "rank"}, ValueError),
        ({"on_lost": "raise"}, ValueError),
        ({"agreement": "leader"}, ValueError),
        ({"placement": [0, 1]}, ValueError),
        ({"placement": 7}, TypeError),
        ({"placement": ["a"] * 32}, TypeError),
        ({"placement": Placement([0, 1], 2)}, ValueError),
        ({"beat_ms": 0}, ValueError),
        ({"silence_ms": 39}, ValueError),
        ({"silence_ms": 500.0}, TypeError),
        ({"stall_ms": 0}, ValueError),
        ({"link_ms": -1}, ValueError),
        ({"settle_ms": -1}, ValueError),
        ({"construct_timeout_ms": 0}, ValueError),
        ({"agreement_timeout_ms": 1 << 40}, ValueError),
        ({"num_spare_partitions": -1}, ValueError),
    ],
)
def test_refusals_name_the_field_and_the_next_step(change, error):
    field = next(iter(change))
    with pytest.raises(error, match=rf"^{field}") as caught:
        Config(**{**GOOD, **change})
    assert "; p" in str(caught.value) or ", or " in str(caught.value), "says what to pass"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_types_that_only_travel_say_so(dtype):
    with pytest.raises(ValueError, match=r"^dtype: .* pass torch.bfloat16.*dispatch_dtype="):
        Config(**GOOD, dtype=dtype)


@pytest.mark.parametrize("hidden", [8, 16, 7168, 16384])
@pytest.mark.parametrize("num_topk", [1, 8, 32])
def test_accepts_the_promised_shapes(hidden, num_topk):
    for dtype in (torch.bfloat16, torch.float32):
        config = Config(num_experts=256, hidden=hidden, num_topk=num_topk, num_max_tokens_per_rank=128, dtype=dtype)
        assert config.hidden_bytes % 16 == 0


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        ({"backend": "tpu"}, ValueError, "^backend"),
        ({"num_sms": 0}, ValueError, "^num_sms: 0 is out of range; pass 1 to 1024"),
        ({"num_sms": 1.5}, TypeError, "^num_sms"),
    ],
)
def test_who_runs_the_kernels(change, error, why):
    with pytest.raises(error, match=why):
        Config(**{**GOOD, **change})
    one, other = Config(**GOOD), Config(**{**GOOD, "backend": "cuda-host", "num_sms": 4})
    assert one.compared(2) == other.compared(2), "ranks of a group may differ in it"


def test_accepts_whole_numbers_of_other_libraries():
    np = pytest.importorskip("numpy")
    config = Config(**{**GOOD, "hidden": np.int64(64), "num_topk": torch.tensor(2)})
    assert type(config.hidden) is int and type(config.num_topk) is int


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(32, 8), (10, 4), (3, 7), (1, 1), (256, 5), (1024, 1024)])
def test_contiguous_blocks(num_experts, num_ranks):
    placement = Placement.contiguous(num_experts, num_ranks)
    sizes = [placement.num_local_experts(rank) for rank in range(num_ranks)]
    assert sum(sizes) == num_experts and max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True), "the first ranks hold one more"
    assert placement.max_local_experts == max(sizes)
    assert [e for rank in range(num_ranks) for e in placement.local_experts(rank)] == list(range(num_experts))


def test_any_map():
    placement = Placement([2, 0, 2, 2, 0], 4)
    assert [placement.local_experts(rank) for rank in range(4)] == [(1, 4), (), (0, 2, 3), ()]
    assert placement.expert_local == (0, 0, 1, 2, 1) and placement.num_experts == 5
    assert placement == Placement(torch.tensor([2, 0, 2, 2, 0]), 4)
    assert pickle.loads(pickle.dumps(placement)).local_experts(2) == (0, 2, 3)
    with pytest.raises(ValueError, match=r"^rank: 4"):
        placement.local_experts(4)


@pytest.mark.parametrize(
    ("expert_rank", "num_ranks", "error", "name"),
    [
        ([0, 2], 2, ValueError, r"expert_rank\[1\]"),
        ([-1], 2, ValueError, r"expert_rank\[0\]"),
        ([0.5], 2, TypeError, r"expert_rank\[0\]"),
        ([], 2, ValueError, "expert_rank"),
        ([0], 0, ValueError, "num_ranks"),
        ([0], 1025, ValueError, "num_ranks"),
        ([0], "2", TypeError, "num_ranks"),
    ],
)
def test_placement_refusals(expert_rank, num_ranks, error, name):
    with pytest.raises(error, match=f"^{name}.*; ?pass"):
        Placement(expert_rank, num_ranks)


def test_placement_for_a_group():
    assert Config(**GOOD).placement_for(8) == Placement.contiguous(32, 8)
    by_hand = Placement([e % 3 for e in range(32)], 3)
    assert Config(**GOOD, placement=by_hand).placement_for(3) is by_hand
    assert Config(**GOOD, placement=list(by_hand.expert_rank)).placement_for(3) == by_hand
    with pytest.raises(ValueError, match=r"^placement: made for 3 ranks, this group has 4; pass"):
        Config(**GOOD, placement=by_hand).placement_for(4)
    with pytest.raises(ValueError, match=r"^expert_rank\[2\]: rank 2 is not in a group of 2"):
        Config(**GOOD, placement=list(by_hand.expert_rank)).placement_for(2)
    with pytest.raises(ValueError, match=r"^num_ranks"):
        Config(**GOOD).placement_for(1025)


def test_rows_must_be_countable_in_an_int32():
    config = Config(num_experts=256, hidden=64, num_topk=1, num_max_tokens_per_rank=1 << 18)
    config.placement_for(64)
    with pytest.raises(ValueError, match=r"^num_max_tokens_per_rank: .*; pass at most 32767"):
        Config(num_experts=65536, hidden=64, num_topk=1, num_max_tokens_per_rank=1 << 18).placement_for(8)


@pytest.mark.parametrize(
    "kind",
    [errors.RankEvictedError, errors.QuorumLostError, errors.ConstructError, errors.JoinError, errors.ClosedError],
)
def test_errors_end_with_what_to_do_next(kind):
    error = kind("Rank 3 did not answer")
    assert isinstance(error, errors.FaultA2AError) and isinstance(error, RuntimeError)
    assert str(error) == f"Rank 3 did not answer. {kind.next_step}"
    assert str(pickle.loads(pickle.dumps(error))) == str(error), "the advice is not added twice"
    assert str(kind()) == kind.next_step
