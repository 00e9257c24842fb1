"""What ranks of an engine do while others come: layers of two shapes, step after step, through ``RankBuffers``."""

from __future__ import annotations

import torch

from fault_a2a.errors import ConstructError, JoinError
from fault_a2a.group import Group
from fault_a2a.integrations.rank_buffers import LayerShape, RankBuffers
from tests.processes import Here

DELIVERED, UNROUTABLE = 1, 3
SHAPES = [
    LayerShape(hidden, num_local_experts=1, num_topk=4, num_max_tokens=2, dtype=torch.bfloat16) for hidden in (16, 24)
]
FAST = {"construct_timeout_ms": 20_000, "stall_ms": 10_000}


def buffers_of(here: Here, **timeouts: int) -> RankBuffers:
    num_ranks = here.num_ranks if here.joins else here.num_founders
    group = Group(here.store, here.rank, num_ranks)
    return RankBuffers(group, max_num_ranks=4, joins=here.joins, **{**FAST, **timeouts})


def layer(buffers: RankBuffers, shape: LayerShape) -> list[int]:
    """The codes of the choices of one token, which asks for the expert of each of four ranks."""
    x = torch.full([1, shape.hidden], float(buffers.rank + 1), dtype=shape.dtype)
    received, opened, hook = buffers.dispatch(shape, x, torch.arange(4)[None], torch.ones([1, 4]))
    hook()
    out = torch.empty_like(x)
    _, hook = opened.combine(received.x, out)
    hook()
    assert buffers.newest_outcome is not None
    codes: list[int] = buffers.newest_outcome.codes[0].tolist()
    if not buffers.alone:
        assert out[0, 0] == (buffers.rank + 1) * codes.count(DELIVERED), f"rank {buffers.rank}: {out[0, 0]} of {codes}"
    return codes


def step(buffers: RankBuffers, shapes: list[LayerShape]) -> list[list[int]]:
    buffers.begin_step()
    return [layer(buffers, shape) for shape in shapes]


def expected_ones(here: Here) -> list[list[list[int]]]:
    """Two founders; two more come, whom all wait for at the same step start. The codes of all steps."""
    buffers, codes = buffers_of(here), []
    if here.joins:
        layer(buffers, SHAPES[1])  # alone
    else:
        codes += [step(buffers, SHAPES) for _ in range(2)]
        here.say("ran")
        here.hear()
        buffers.expect([2, 3])
    codes += [step(buffers, SHAPES) for _ in range(3)]
    here.say("done")
    here.hear()
    buffers.close()
    return codes


def an_unexpected_one(here: Here, shapes: list[LayerShape]) -> tuple[list[list[int]], list[int]] | str:
    """Rank 2 was killed; a process that nobody waits for takes its place while the others go on.

    The last codes, and who was found to be gone, each time that one was.
    """
    buffers = buffers_of(here, **({"construct_timeout_ms": 1500} if here.joins and len(shapes) > 1 else {}))
    codes: list[list[int]] = []
    gone: list[int] = []
    first = True
    while first or buffers.all[0].num_rounds <= here.board.last_round[0]:
        try:
            codes = step(buffers, shapes)
        except ConstructError as error:
            here.say("refused")
            return str(error)
        gone += buffers.acknowledge()
        if first:
            here.say("ran")
        first = False
        here.board.begun[here.rank] = buffers.all[0].num_rounds
    here.say("done")
    here.hear()
    buffers.close()
    return codes, gone


def one_that_does_not_come(here: Here) -> list[str]:
    """Two founders wait for a rank of which nothing is heard: not for ever, and they go on without it."""
    buffers, wrong = buffers_of(here, stall_ms=1000), []
    step(buffers, SHAPES[:1])
    buffers.expect([2])
    try:
        step(buffers, SHAPES[:1])
        wrong.append("went on as if it had come")
    except JoinError as error:
        if "ranks [2] were expected at this step start and did not come" not in str(error):
            wrong.append(str(error))
    if step(buffers, SHAPES[:1]) != [[DELIVERED, DELIVERED, UNROUTABLE, UNROUTABLE]]:
        wrong.append("the next step is not whole")
    here.say("done")
    here.hear()
    buffers.close()
    return wrong
