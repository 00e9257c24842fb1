"""What the ranks of an engine tell each other on their group's store, so that new ones find the buffers that run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from fault_a2a.errors import JoinError
from fault_a2a.group import LONGEST_PAUSE_S, Group

if TYPE_CHECKING:
    from fault_a2a.integrations.rank_buffers import LayerShape


@dataclass(frozen=True)
class Running:
    """The buffers of a group that runs.

    Attributes:
        num_ranks: ranks that there is room for.
        shapes: of its buffers, in the order in which they were made; each as fields of a ``LayerShape``.
    """

    num_ranks: int
    shapes: list[dict[str, Any]]


def tell_running(group: Group, num_ranks: int, shapes: Iterable[LayerShape]) -> None:
    texts = [{**asdict(shape), "dtype": str(shape.dtype).removeprefix("torch.")} for shape in shapes]
    group.store.set(_key(group, "running", group.rank), json.dumps({"num_ranks": num_ranks, "shapes": texts}))


def find_running(group: Group, num_ranks: int, deadline: float) -> Running:
    """What a member has told. Blocks until one has, at most until ``deadline``.

    Raises:
        JoinError: none did.
    """
    keys = [_key(group, "running", rank) for rank in range(num_ranks) if rank != group.rank]
    while True:
        try:
            told = next((group.store.get(key) for key in keys if group.store.check([key])), None)
        except RuntimeError as error:  # the store's own errors are
            raise JoinError(f"group '{group.name}' lost its store while a rank joined ({error}).") from error
        if told is not None:
            fields = json.loads(bytes(told).decode())
            shapes = [{**shape, "dtype": getattr(torch, shape["dtype"])} for shape in fields["shapes"]]
            return Running(fields["num_ranks"], shapes)
        if time.monotonic() >= deadline:
            raise JoinError(
                f"nobody of group '{group.name}' has told of its buffers on this store; its members must have run a "
                "layer, and have been told of a store that they do not share with the newcomer (stage_ep_size)"
            )
        time.sleep(LONGEST_PAUSE_S)


def tell_expected(group: Group, expected: list[tuple[str, int, int]]) -> None:
    """For whom this rank waits at its next step start: (shape, rank, the life that it had before) each.

    Newcomers read it too: of several, the first that is in is a member at whose step start the next one comes in.
    """
    group.store.set(_key(group, "expects", group.rank), json.dumps(expected))


def find_expected(group: Group, ranks: Iterable[int]) -> set[tuple[str, int, int]]:
    """What the others of ``ranks`` have told of that, each the last time."""
    found = _find(group, "expects", (rank for rank in ranks if rank != group.rank))
    return {(shape, rank, former) for expected in found.values() for shape, rank, former in expected}


def tell_return(group: Group, incarnations: list[int]) -> None:
    """This rank was left out, lives, and comes back at the next step start. ``incarnations``: of the lives it lost."""
    group.store.set(_key(group, "returns", group.rank), json.dumps(incarnations))


def find_returns(group: Group, ranks: Iterable[int]) -> dict[int, list[int]]:
    """Of those of ``ranks`` that have ever told so: the lives that they lost, the last time that they did."""
    return _find(group, "returns", ranks)


def _find(group: Group, what: str, ranks: Iterable[int]) -> dict[int, Any]:
    found = {}
    try:
        for rank in ranks:
            key = _key(group, what, rank)
            if group.store.check([key]):
                found[rank] = json.loads(bytes(group.store.get(key)).decode())
    except RuntimeError:  # a store that is gone says nothing of anybody; who needs it will say so
        return {}
    return found


def _key(group: Group, *parts: object) -> str:
    return "/".join(["fault_a2a", group.name, "engine", *map(str, parts)])
