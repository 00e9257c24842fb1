"""Combine with what its caller brings: memory for the sums, and weights that were not known at the dispatch."""

from typing import Any

import pytest
import torch

from fault_a2a import Buffer, Config, reference
from fault_a2a.testing import VirtualRanks

pytestmark = pytest.mark.usefixtures("one_thread")
NUM_RANKS, NUM_TOKENS = 3, 5


def config_of(**changes: Any) -> Config:
    fields: dict[str, Any] = {"num_experts": 6, "hidden": 16, "num_topk": 2, "num_max_tokens_per_rank": NUM_TOKENS}
    return Config(**(fields | changes))


def inputs(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(rank)
    x = torch.randn([NUM_TOKENS, 16], generator=draw).bfloat16()
    topk_idx = torch.stack([torch.randperm(6, generator=draw)[:2] for _ in range(NUM_TOKENS)])
    return x, topk_idx, torch.rand([NUM_TOKENS, 2], generator=draw)


def expected(rank: int) -> torch.Tensor:
    """Experts that return their rows: what their weighted sum must be, to the bit."""
    x, _, weights = inputs(rank)
    total = torch.zeros([NUM_TOKENS, 16])
    for k in range(2):
        total = total + weights[:, k : k + 1] * x.float()
    return total.bfloat16()


@pytest.mark.parametrize("backend", ["cpu", "cuda-host"])
@pytest.mark.parametrize("hook", [False, True])
def test_sums_go_where_the_caller_wants_them_with_the_weights_it_brings(hook: bool, backend: str) -> None:
    def work(buffer: Buffer) -> bool:
        x, topk_idx, weights = inputs(buffer.rank)
        received, handle = buffer.dispatch(x, topk_idx, torch.full_like(weights, 7.0))
        mine = torch.full_like(x, torch.nan)
        if hook:
            out, _, receive = buffer.combine(received.x, handle, out=mine, topk_weights=weights, return_recv_hook=True)
            receive()
        else:
            out, _ = buffer.combine(received.x, handle, out=mine, topk_weights=weights)
        return out is mine and bool(reference.same_bits(mine, expected(buffer.rank)).all())

    with VirtualRanks(NUM_RANKS, config_of(backend=backend)) as ranks:
        assert ranks.run(work) == [True] * NUM_RANKS


@pytest.mark.parametrize(
    ("changes", "brought", "message"),
    [
        ({}, {"out": torch.empty([NUM_TOKENS, 8], dtype=torch.bfloat16)}, r"out has shape \[5, 8\]"),
        ({}, {"out": torch.empty([NUM_TOKENS, 16])}, "out is torch.float32"),
        ({}, {"topk_weights": torch.empty([NUM_TOKENS, 3])}, r"topk_weights has shape \[5, 3\]"),
        ({"reduce": "expert"}, {"topk_weights": torch.empty([NUM_TOKENS, 2])}, "come too late"),
        ({"weights_at": "expert"}, {"topk_weights": torch.empty([NUM_TOKENS, 2])}, "come too late"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_sent(changes: Any, brought: Any, message: str) -> None:
    def work(buffer: Buffer) -> None:
        received, handle = buffer.dispatch(*inputs(buffer.rank))
        with pytest.raises((ValueError, TypeError), match=message):
            buffer.combine(received.x, handle, **brought)
        buffer.combine(received.x, handle)  # the round is as it was

    with VirtualRanks(NUM_RANKS, config_of(**changes)) as ranks:
        assert ranks.run(work) == [None] * NUM_RANKS


def one_element_further(tensor: torch.Tensor) -> torch.Tensor:
    """The same, contiguous as before, in memory that begins at an odd element."""
    moved = torch.empty([tensor.numel() + 1], dtype=tensor.dtype)[1:].view(tensor.shape)
    return moved.copy_(tensor)


@pytest.mark.parametrize(
    ("backend", "reduce", "refused"),
    [
        ("cpu", "expert", ()),
        ("cuda-host", "owner", ("out",)),
        ("cuda-host", "expert", ("out", "y")),
    ],
)
def test_what_kernels_move_by_16_bytes_must_be_aligned(backend: str, reduce: Any, refused: tuple[str, ...]) -> None:
    """On a GPU a misaligned access ends CUDA for the whole process."""

    def work(buffer: Buffer) -> bool:
        received, handle = buffer.dispatch(*inputs(buffer.rank))
        out = torch.full([NUM_TOKENS, 16], torch.nan, dtype=torch.bfloat16)
        given = {"y": received.x, "out": out}
        for name in refused:
            wrong = {**given, name: one_element_further(given[name])}
            with pytest.raises(
                ValueError, match=rf"{name} begins at .* multiple of 16 bytes .*; give {name}\.clone\(\)"
            ):
                buffer.combine(wrong["y"], handle, out=wrong["out"])
        fine = {name: tensor if name in refused else one_element_further(tensor) for name, tensor in given.items()}
        out, _ = buffer.combine(fine["y"], handle, out=fine["out"])
        return reduce == "expert" or bool(reference.same_bits(out, expected(buffer.rank)).all())

    with VirtualRanks(NUM_RANKS, config_of(backend=backend, reduce=reduce)) as ranks:
        assert ranks.run(work) == [True] * NUM_RANKS


@pytest.mark.parametrize("backend", ["cpu", "cuda-host"])
def test_what_is_lost_is_counted(backend: str) -> None:
    def work(buffer: Buffer) -> tuple[int, int, int]:
        lost = unroutable = 0
        for _ in range(3):
            received, handle = buffer.dispatch(*inputs(buffer.rank))
            _, outcome = buffer.combine(received.x, handle)
            lost += int((outcome.codes == reference.LOST).sum())
            unroutable += int((outcome.codes == reference.UNROUTABLE).sum())
        stats = buffer.core.stats()
        assert (stats["num_lost"], stats["num_unroutable"]) == (lost, unroutable)
        return buffer.rank, lost, unroutable

    with VirtualRanks(NUM_RANKS, config_of(backend=backend)) as ranks:
        ranks.buffers[2].arm("dispatch.wait", 2, "crash")  # its rows are out, its answers are not
        results = [result for result in ranks.run(work) if isinstance(result, tuple)]
        assert len(results) == 2
        assert sum(lost + unroutable for _, lost, unroutable in results) > 0
