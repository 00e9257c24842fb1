"""Groups as engines bring them: registered with torch.distributed, stateless, or no more than a store and a number."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch.distributed as dist

from fault_a2a.group import as_group


@dataclass
class StoreAndNumber:
    """What engines carry beside their process groups."""

    store: Any
    rank: int = 1
    world_size: int = 3


def test_a_store_and_a_number_are_a_group() -> None:
    store = dist.HashStore()
    group = as_group(StoreAndNumber(store))
    assert (group.store, group.rank, group.num_ranks) == (store, 1, 3)


def test_a_process_group_that_nobody_registered_brings_its_own_store() -> None:
    store = dist.HashStore()
    process_group = dist.ProcessGroup(store, 0, 1)
    process_group._set_group_name("somebody's")
    group = as_group(process_group)
    group.store.set("key", "value")
    assert (group.rank, group.num_ranks) == (0, 1)
    assert store.get("key") == b"value"


def test_what_is_no_group_is_said_to_be_none() -> None:
    with pytest.raises(TypeError, match=r"give a fault_a2a\.Group, a torch\.distributed process group, or an object"):
        as_group(StoreAndNumber(store="a store"))
