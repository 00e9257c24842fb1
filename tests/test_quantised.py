"""Rows that travel quantised, here or by the caller, and weights applied by the experts: against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch

from fault_a2a import reference
from fault_a2a.buffer import Buffer
from fault_a2a.config import Config
from fault_a2a.testing.virtual import VirtualRanks
from tests.groups import name_of
from tests.rig import Checker, Work, raised
from tests.test_conformance import RoutedWork, config_of, conform

FP8 = torch.float8_e4m3fn


pytestmark = pytest.mark.usefixtures("one_thread")


GRID = list(
    itertools.product(
        (torch.bfloat16, torch.float16, torch.float32), ("batched", "packed"), (torch.float32, torch.int32), (1, 2)
    )
)


@pytest.mark.parametrize(("dtype", "recv_format", "scale_dtype", "halves"), GRID, ids=name_of)
@pytest.mark.parametrize("dies", [False, True])
def test_quantised_on_the_way_out(
    dtype: torch.dtype, recv_format: str, scale_dtype: torch.dtype, halves: int, dies: bool
) -> None:
    """hidden 200: a whole block and a short one; UE8M0 bytes fill half of an int32."""
    number = GRID.index((dtype, recv_format, scale_dtype, halves))
    config = config_of(
        (dtype, recv_format, ("owner", "expert")[number % 2], "drop"),
        hidden=200,
        dispatch_dtype=FP8,
        scale_dtype=scale_dtype,
        num_max_tokens_per_rank=12,
        num_chunk_tokens=12 // halves**2,
        weights_at=("owner", "expert")[number // 2 % 2],
    )
    assert config.num_scales == (2 if scale_dtype == torch.float32 else 1)
    work = RoutedWork(config, 3, seed=number)
    with VirtualRanks(3, config, poison=True) as ranks:
        conform(ranks, work, *((1, "dispatch.rows_sent") if dies else ()))


@pytest.mark.parametrize("reduce", ["owner", "expert"])
@pytest.mark.parametrize("on_lost", ["drop", "renormalize"])
@pytest.mark.parametrize("num_chunk_tokens", [6, 2])
def test_weights_at_the_expert(reduce: str, on_lost: str, num_chunk_tokens: int) -> None:
    formats = (torch.float32, "batched", reduce, on_lost)
    config = config_of(formats, weights_at="expert", num_chunk_tokens=num_chunk_tokens)
    with VirtualRanks(4, config, poison=True) as ranks:
        conform(ranks, RoutedWork(config, 4, seed=5), victim=2, phase="dispatch.rows_sent")


# --- rows that come quantised


@pytest.mark.parametrize(
    ("dispatch_dtype", "scale_dtype", "num_scales"),
    [
        (FP8, torch.float32, 2),  # as this library would make them
        (FP8, torch.float32, 1),  # one a row
        (FP8, torch.float32, 13),
        (torch.int8, torch.float16, 3),
        (torch.uint8, torch.uint8, 25),
        (torch.float8_e5m2, torch.bfloat16, 5),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("recv_format", ["batched", "packed"])
def test_rows_that_come_quantised(
    dispatch_dtype: torch.dtype, scale_dtype: torch.dtype, num_scales: int, recv_format: str
) -> None:
    """Payload and scales arrive as they are, whatever their bits mean."""
    config = config_of(
        (torch.bfloat16, recv_format, "owner", "drop"),
        hidden=200,
        dispatch_dtype=dispatch_dtype,
        scale_dtype=scale_dtype,
        num_scales=num_scales,
    )
    work = Work(config, 3)

    def bits(rank: int, count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        generator = torch.Generator().manual_seed(rank)
        return torch.randint(256, [count, width * dtype.itemsize], generator=generator, dtype=torch.uint8).view(dtype)

    with VirtualRanks(3, config, poison=True) as ranks:

        def one(buffer: Buffer) -> None:
            _, idx, weights = work.tokens(buffer.rank, 1)
            x = bits(buffer.rank, len(idx), 200, dispatch_dtype)
            scales = bits(buffer.rank + 10, len(idx), num_scales, scale_dtype)
            received, handle = buffer.dispatch(x, idx, weights, scales)
            sources = handle.sources().long()
            rows = received.x.reshape(-1, 200)[sources[:, 0]]
            got_scales = received.scales.reshape(-1, num_scales)[sources[:, 0]]
            for src in range(3):
                mine = sources[:, 2] == src
                sent = bits(src, len(idx), 200, dispatch_dtype)[sources[mine, 3]]
                sent_scales = bits(src + 10, len(idx), num_scales, scale_dtype)[sources[mine, 3]]
                assert torch.equal(rows[mine].view(torch.uint8), sent.view(torch.uint8))
                assert torch.equal(got_scales[mine].view(torch.uint8), sent_scales.view(torch.uint8))
            assert len(sources) > 0
            buffer.combine(torch.zeros(received.x.shape, dtype=config.dtype), handle)

        raised(ranks.run(one))


def test_both_ways_in_one_round() -> None:
    """One rank hands over bfloat16, another what it quantised itself: the receiver sees no difference."""
    config = config_of((torch.bfloat16, "packed", "owner", "drop"), hidden=256, dispatch_dtype=FP8)
    work = Work(config, 2)
    with VirtualRanks(2, config, poison=True) as ranks:

        def one(buffer: Buffer) -> list[str]:
            checker = Checker(buffer, work)
            x, idx, weights = work.tokens(buffer.rank, 1)
            scales = None
            if buffer.rank == 1:
                x, scales = reference.quantize_1x128(x, "float32")
            received, handle = buffer.dispatch(x, idx, weights, scales)
            checker.check_received(received, handle, 1)
            checker.combine(received, handle, 1)
            return checker.tally.corrupt

        assert raised(ranks.run(one)) == [[], []]


# --- misuse


def test_refusals() -> None:
    config = config_of(hidden=200, dispatch_dtype=FP8)
    plain = config_of(hidden=200)
    work = Work(config, 1)
    x, idx, weights = work.tokens(0, 1)
    q, scales = reference.quantize_1x128(x, "float32")
    with VirtualRanks(1, config) as ranks:
        buffer = ranks.buffers[0]
        with pytest.raises(ValueError, match=r"^scales is missing"):
            buffer.dispatch(q, idx, weights)
        with pytest.raises(ValueError, match=r"^scales belongs"):
            buffer.dispatch(x, idx, weights, scales)
        with pytest.raises(TypeError, match=r"^scales is torch\.float16"):
            buffer.dispatch(q, idx, weights, scales.half())
        with pytest.raises(ValueError, match=r"^scales has shape"):
            buffer.dispatch(q, idx, weights, scales[:, :1].contiguous())
        with pytest.raises(TypeError, match=r"^x is torch\.int8"):
            buffer.dispatch(q.view(torch.int8), idx, weights, scales)
        received, handle = buffer.dispatch(x, idx, weights)
        with pytest.raises(TypeError, match=r"^y is"):
            buffer.combine(received.x, handle)
        buffer.abandon(handle)
    with VirtualRanks(1, plain) as ranks, pytest.raises(ValueError, match=r"^scales belongs"):
        ranks.buffers[0].dispatch(x, idx, weights, scales)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"num_scales": 2}, ValueError),
        ({"num_scales": 0, "dispatch_dtype": FP8}, ValueError),
        ({"dispatch_dtype": torch.bfloat16}, ValueError),
        ({"dispatch_dtype": "fp8"}, TypeError),
        ({"scale_dtype": 4, "dispatch_dtype": FP8}, TypeError),
        ({"dtype": FP8}, ValueError),
        ({"weights_at": "router"}, ValueError),
    ],
)
def test_config_refuses(change: dict, error: type) -> None:
    with pytest.raises(error, match=rf"^{next(iter(change))}"):
        Config(**{"num_experts": 8, "hidden": 256, "num_topk": 2, "num_max_tokens_per_rank": 4, **change})
