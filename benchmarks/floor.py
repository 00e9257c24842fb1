"""The bytes that a round must move through memory, and how long that takes at the machine's own copy rate."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .work import Shape, routing

FORMULA = (
    "bytes read + written, row = hidden x itemsize, over all ranks: send 2 D row, expand (D + C) row, return (C + R) "
    "row, sum (R + T) row; D = (token, destination rank) pairs, C = (token, choice) pairs, T = tokens, R = C for "
    "reduce=owner and D for reduce=expert; row headers, counts and signals are not counted"
)


@dataclass(frozen=True)
class Traffic:
    """Bytes read plus bytes written by all ranks together in one round, per hop; experts not counted."""

    send_bytes: int
    expand_bytes: int
    return_bytes: int
    sum_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.send_bytes + self.expand_bytes + self.return_bytes + self.sum_bytes


def traffic(shape: Shape, expert_rank: list[int], seed: int) -> Traffic:
    """Of the round whose tokens follow from ``seed``, routing included."""
    num_choices, num_pairs = shape.ranks * shape.tokens * shape.topk, 0
    rank_of = torch.tensor(expert_rank)
    for rank in range(shape.ranks):
        is_sent = torch.zeros(shape.tokens, shape.ranks, dtype=torch.bool)
        is_sent.scatter_(1, rank_of[routing(shape, rank, seed)], True)
        num_pairs += int(is_sent.sum())
    num_returned = num_choices if shape.reduce == "owner" else num_pairs
    num_tokens, row = shape.ranks * shape.tokens, shape.row_bytes
    return Traffic(
        send_bytes=2 * num_pairs * row,
        expand_bytes=(num_pairs + num_choices) * row,
        return_bytes=(num_choices + num_returned) * row,
        sum_bytes=(num_returned + num_tokens) * row,
    )


def floor_us(total_bytes: int, copied_bytes_per_s: float) -> float:
    """A copy reads and writes each byte, so a machine that copies B bytes a second moves 2 B."""
    return total_bytes / (2 * copied_bytes_per_s) * 1e6
