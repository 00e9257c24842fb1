"""Which rank holds which expert, and where among that rank's own experts."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_NUM_RANKS = 1024
MAX_NUM_EXPERTS = 65536


@dataclass(frozen=True)
class Placement:
    """A map from every expert to the one rank that holds it.

    Args:
        expert_rank: rank of each expert, ``expert_rank[e]`` in ``0 .. num_ranks - 1``; any order, a rank may hold none.
        num_ranks: size of the group, 1 to 1024.

    Attributes:
        expert_local: ``expert_local[e]`` is the place of expert ``e`` among the experts of its rank, which stand in
            ascending order of their global number. It is the first index of a batched ``recv.x``.

    Raises:
        TypeError: an entry or ``num_ranks`` is not a whole number.
        ValueError: no experts, too many of them, ``num_ranks`` out of range, or a rank that does not exist.
    """

    expert_rank: tuple[int, ...]
    num_ranks: int
    expert_local: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _local_experts: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)

    def __init__(self, expert_rank: Sequence[int], num_ranks: int) -> None:
        num_ranks = _checked_num_ranks(num_ranks)
        ranks = _checked_expert_rank(expert_rank, num_ranks)
        local_experts: list[list[int]] = [[] for _ in range(num_ranks)]
        expert_local = []
        for expert, rank in enumerate(ranks):
            expert_local.append(len(local_experts[rank]))
            local_experts[rank].append(expert)
        object.__setattr__(self, "expert_rank", ranks)
        object.__setattr__(self, "num_ranks", num_ranks)
        object.__setattr__(self, "expert_local", tuple(expert_local))
        object.__setattr__(self, "_local_experts", tuple(tuple(experts) for experts in local_experts))

    @classmethod
    def contiguous(cls, num_experts: int, num_ranks: int) -> Placement:
        """Blocks of neighbouring experts, as even as can be; the first ``num_experts % num_ranks`` ranks hold one more.

        Raises what the constructor raises.
        """
        num_ranks = _checked_num_ranks(num_ranks)
        per_rank, remainder = divmod(as_whole_number("num_experts", num_experts), num_ranks)
        block_sizes = [per_rank + (rank < remainder) for rank in range(num_ranks)]
        return cls([rank for rank, size in enumerate(block_sizes) for _ in range(size)], num_ranks)

    @property
    def num_experts(self) -> int:
        """Number of experts in the whole group."""
        return len(self.expert_rank)

    @property
    def max_local_experts(self) -> int:
        """The largest number of experts that one rank holds; windows are sized by it."""
        return max(len(experts) for experts in self._local_experts)

    def local_experts(self, rank: int) -> tuple[int, ...]:
        """Global numbers of the experts that ``rank`` holds, ascending: the order of ``recv.x``."""
        if not 0 <= rank < self.num_ranks:
            raise ValueError(
                f"rank: {rank} is not in this group; pass a rank from 0 to {self.num_ranks - 1} (num_ranks - 1)."
            )
        return self._local_experts[rank]

    def num_local_experts(self, rank: int) -> int:
        """How many experts ``rank`` holds; zero is allowed."""
        return len(self.local_experts(rank))


def as_whole_number(name: str, value: object) -> int:
    """The value as an int (numpy's and torch's whole numbers too); a bool is a mistake, not a number."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise TypeError(f"{name}: expected a whole number, got {value!r} ({type(value).__name__}); pass an int.")


def _checked_num_ranks(num_ranks: int) -> int:
    num_ranks = as_whole_number("num_ranks", num_ranks)
    if not 1 <= num_ranks <= MAX_NUM_RANKS:
        raise ValueError(f"num_ranks: {num_ranks} is out of range; pass 1 to {MAX_NUM_RANKS}.")
    return num_ranks


def _checked_expert_rank(expert_rank: Sequence[int], num_ranks: int) -> tuple[int, ...]:
    ranks = tuple(as_whole_number(f"expert_rank[{expert}]", rank) for expert, rank in enumerate(expert_rank))
    if not 1 <= len(ranks) <= MAX_NUM_EXPERTS:
        raise ValueError(f"expert_rank: {len(ranks)} experts; pass the rank of each of 1 to {MAX_NUM_EXPERTS} experts.")
    for expert, rank in enumerate(ranks):
        if not 0 <= rank < num_ranks:
            raise ValueError(
                f"expert_rank[{expert}]: rank {rank} is not in a group of {num_ranks}; "
                f"pass ranks from 0 to {num_ranks - 1} (num_ranks - 1)."
            )
    return ranks
