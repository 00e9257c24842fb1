"""The buffers of one rank as an engine sees them: faults and their acknowledgement, ranks left out, open rounds."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fault_a2a import Group
from fault_a2a.integrations.rank_buffers import LayerShape, OpenLayer, RankBuffers
from fault_a2a.testing.virtual import LocalFabric, run_threads

pytestmark = pytest.mark.usefixtures("one_thread")
NUM_RANKS, HIDDEN = 3, 16
SHAPE = LayerShape(HIDDEN, num_local_experts=2, num_topk=2, num_max_tokens=4, dtype=torch.bfloat16)
TOPK_IDX = torch.tensor([[0, 4], [1, 5], [2, 4], [3, 5]])  # experts 4 and 5 stand on rank 2


class Ranks:
    """Virtual ranks, each with its ``RankBuffers``."""

    def __init__(self, **timeouts: Any) -> None:
        store, fabrics = dist.HashStore(), [LocalFabric() for _ in range(2)]

        class FabricOfEachBuffer:
            """A fabric serves one buffer of each rank; the second buffer of a rank gets the second."""

            def __init__(self) -> None:
                self._next = iter(fabrics)

            def of(self, fields: dict[str, Any]) -> Any:
                return next(self._next).of(fields)

        self.all = [
            RankBuffers(Group(store, rank, NUM_RANKS, fabric=FabricOfEachBuffer()), **timeouts)
            for rank in range(NUM_RANKS)
        ]

    def run(self, work: Callable[[RankBuffers], Any], ranks: Any = range(NUM_RANKS)) -> list[Any]:
        return run_threads([partial(work, self.all[rank]) for rank in ranks])

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.run(RankBuffers.close)


def begin(buffers: RankBuffers, shape: LayerShape = SHAPE) -> tuple[torch.Tensor, OpenLayer]:
    x = torch.full([4, shape.hidden], float(buffers.rank + 1), dtype=torch.bfloat16)
    received, opened, hook = buffers.dispatch(shape, x, TOPK_IDX, torch.ones([4, 2]))
    hook()
    return received.x, opened


def layer(buffers: RankBuffers, shape: LayerShape = SHAPE) -> torch.Tensor:
    rows, opened = begin(buffers, shape)
    out = torch.empty([4, shape.hidden], dtype=torch.bfloat16)
    _, hook = opened.combine(rows, out)
    hook()
    return out


def crash(buffers: RankBuffers) -> None:
    (buffer,) = buffers.all
    buffer.arm("dispatch.half_signalled", buffer.num_rounds, "crash")


def test_a_fault_is_new_once_and_the_rank_stays_gone() -> None:
    with Ranks() as ranks:
        ranks.run(layer)
        assert [one.gone() for one in ranks.all] == [(0, 0, 0)] * 3
        assert not any(one.has_fault() for one in ranks.all)
        crash(ranks.all[2])
        run_threads([partial(layer, one) for one in ranks.all[:2]] + [partial(_dies, ranks.all[2])])
        ranks.run(layer, (0, 1))
        for one in ranks.all[:2]:
            assert one.gone() == (0, 0, 1) and one.mask_status() == [0, 0, 1]
            assert one.has_fault()
            assert one.acknowledge() == [2]
            assert not one.has_fault() and one.acknowledge() == []
            assert one.gone() == (0, 0, 1)
        ranks.run(layer, (0, 1))  # unroutable is no news either
        assert not any(one.has_fault() for one in ranks.all[:2])


def _dies(buffers: RankBuffers) -> None:
    with pytest.raises(RuntimeError):
        layer(buffers)


def test_a_lost_choice_is_a_fault_even_if_everybody_stays() -> None:
    class Lossy(RankBuffers):
        """As after a round in which a suspicion was lifted again."""

        lost = 0

        @property
        def num_lost(self) -> int:
            return self.lost

    buffers = Lossy(Group(dist.HashStore(), 0, 1))
    assert not buffers.has_fault()
    buffers.lost = 3
    assert buffers.has_fault() and buffers.acknowledge() == []
    assert not buffers.has_fault()


def test_a_rank_that_runs_no_more_layers_is_left_out_and_no_fault() -> None:
    with Ranks() as ranks:
        ranks.run(layer)
        for one in ranks.all[:2]:
            one.leave_out(2)
        # It lives and beats; the others' patience would last for half a minute.
        outs = ranks.run(layer, (0, 1)) and ranks.run(layer, (0, 1))
        for one, out in zip(ranks.all[:2], outs, strict=True):
            assert one.gone() == (0, 0, 1) and one.left_out == [2]
            assert not one._newly_gone(), "it was meant to go"
            assert out[0, 0] == one.rank + 1, "expert 0 is there, expert 4 is not"


def test_rounds_that_an_exception_left_open_are_closed() -> None:
    with Ranks() as ranks:
        ranks.run(layer)

        def fail_twice(buffers: RankBuffers) -> str:
            begin(buffers)
            begin(buffers)
            try:
                begin(buffers)
            except RuntimeError as error:
                return str(error)
            return ""

        assert all("two rounds are open" in said for said in ranks.run(fail_twice))
        assert ranks.run(RankBuffers.abandon_open) == [2] * 3
        assert ranks.run(RankBuffers.abandon_open) == [0] * 3
        for one, out in zip(ranks.all, ranks.run(layer), strict=True):
            assert torch.equal(out, torch.full_like(out, 2.0 * (one.rank + 1)))


def test_layers_of_one_shape_share_a_buffer_and_others_do_not() -> None:
    other = LayerShape(HIDDEN * 2, num_local_experts=2, num_topk=2, num_max_tokens=4, dtype=torch.float32)
    with Ranks() as ranks:
        ranks.run(layer)
        ranks.run(layer)
        assert [len(one.all) for one in ranks.all] == [1] * 3
        x = torch.ones([4, HIDDEN * 2])

        def of_the_other(buffers: RankBuffers) -> torch.Tensor:
            received, opened, hook = buffers.dispatch(other, x, TOPK_IDX, torch.ones([4, 2]))
            hook()
            out = torch.empty_like(x)
            _, hook = opened.combine(received.x, out)
            hook()
            return out

        assert all(torch.equal(out, 2 * x) for out in ranks.run(of_the_other))
        assert [len(one.all) for one in ranks.all] == [2] * 3
