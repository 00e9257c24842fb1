"""Lent memory: the same pages again when nobody holds them, and never while somebody does."""

from __future__ import annotations

import pytest
import torch

from fault_a2a import Buffer, Config, lent_memory
from fault_a2a.lent_memory import ALIGNMENT, MAX_NUM_KEPT, LentMemory
from fault_a2a.testing import VirtualRanks


@pytest.fixture(autouse=True)
def _small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lent_memory, "MIN_BYTES", 64)


def test_used_again() -> None:
    memory = LentMemory([3, 5, 7], torch.bfloat16)
    places = set()
    for _ in range(5):
        tensor = memory.lend()
        assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((3, 5, 7), torch.bfloat16, True)
        assert tensor.data_ptr() % ALIGNMENT == 0
        places.add(tensor.data_ptr())
        tensor.fill_(float("nan"))
        del tensor
    assert len(places) == 1


@pytest.mark.parametrize("hold", [lambda t: t, lambda t: t[1:], lambda t: t.view(-1), lambda t: t.untyped_storage()])
def test_not_while_anything_refers_to_it(hold) -> None:
    memory = LentMemory([4, 8], torch.float32)
    first = memory.lend()
    place, held = first.data_ptr(), hold(first)
    del first
    others = [memory.lend() for _ in range(4)]
    assert place not in [other.data_ptr() for other in others]
    assert len({other.data_ptr() for other in others}) == 4
    del held
    assert memory.lend().data_ptr() == place


def test_keeps_few() -> None:
    memory = LentMemory([4, 8], torch.float32)
    tensors = [memory.lend() for _ in range(10)]
    assert memory._idle == []
    tensors.clear()
    assert len(memory._idle) == MAX_NUM_KEPT


def test_small_and_empty_ones_are_torch_s_own() -> None:
    for shape in ([0, 8], [1, 8], [0]):
        memory = LentMemory(shape, torch.bfloat16)
        assert memory.lend().shape == torch.Size(shape)
        assert memory._idle == []


def test_outlives_the_lender() -> None:
    tensor = LentMemory([64, 64], torch.float32).lend()
    tensor.fill_(1.5)
    LentMemory([64, 64], torch.float32).lend().fill_(2.5)
    assert bool((tensor == 1.5).all())


# -- the buffer's memory for the experts' output

FORMATS = [("batched", "cpu"), ("packed", "cpu"), ("batched", "cuda-host")]


def rounds_into(buffer: Buffer, num_rounds: int, hook: bool) -> list[int]:
    """Experts that double, into lent memory that is poisoned first. Returns where each round's output lay."""
    draw = torch.Generator().manual_seed(buffer.rank)
    places = []
    for _ in range(num_rounds):
        x = torch.randn([4, 16], generator=draw).bfloat16()
        topk_idx = torch.stack([torch.randperm(6, generator=draw)[:2] for _ in range(4)])
        received, handle = buffer.dispatch(x, topk_idx, torch.full([4, 2], 0.5))
        y = buffer.empty_expert_output()
        assert y.shape == torch.Size(buffer.recv_shape) and y.dtype == buffer.config.dtype and y.is_contiguous()
        y.fill_(float("nan"))
        for row, *_ in handle.sources().tolist():
            y.view(-1, 16)[row] = received.x.reshape(-1, 16)[row] * 2
        places.append(y.data_ptr())
        if hook:
            out, _, receive = buffer.combine(y, handle, return_recv_hook=True)
            del y
            assert buffer.empty_expert_output().data_ptr() != places[-1], "the open round still has it"
            receive()
        else:
            out, _ = buffer.combine(y, handle)
            del y
        assert torch.equal(out, 2 * x), "two halves of two doubled rows, and nothing of the poison"
    return places


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize(("recv_format", "backend"), FORMATS)
def test_experts_write_into_the_same_pages_again(recv_format: str, backend: str, hook: bool) -> None:
    config = Config(
        num_experts=6, hidden=16, num_topk=2, num_max_tokens_per_rank=4, recv_format=recv_format, backend=backend
    )
    with VirtualRanks(3, config) as ranks:
        for places in ranks.run(lambda buffer: rounds_into(buffer, 5, hook)):
            assert len(set(places)) <= MAX_NUM_KEPT


@pytest.mark.usefixtures("one_thread")
def test_the_output_is_of_the_payload_s_type_where_rows_come_quantised() -> None:
    config = Config(
        num_experts=4, hidden=128, num_topk=2, num_max_tokens_per_rank=4, dispatch_dtype=torch.float8_e4m3fn
    )
    with VirtualRanks(2, config) as ranks:
        for dtype in ranks.run(lambda buffer: buffer.empty_expert_output().dtype):
            assert dtype == torch.bfloat16
