"""Lent memory: the same pages again when nobody holds them, and never while somebody does."""

from __future__ import annotations

import pytest
import torch

from fault_a2a import lent_memory
from fault_a2a.lent_memory import ALIGNMENT, MAX_NUM_KEPT, LentMemory


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
