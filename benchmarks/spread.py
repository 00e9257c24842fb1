"""What a list of times says: median, 95th percentile, quartiles, and how sure a median ratio is."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Of ``count`` samples, in their unit."""

    count: int
    least: float
    p25: float
    median: float
    p75: float
    p95: float
    most: float


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest sample that at least ``percent`` of the samples do not exceed (nearest rank, nothing interpolated).

    Raises:
        ValueError: there are no samples.
    """
    if not values:
        raise ValueError("values: a percentile of nothing; measure at least once")
    ordered = sorted(values)
    return ordered[max(math.ceil(percent * len(ordered) / 100), 1) - 1]


def spread(values: Sequence[float]) -> Spread:
    """Raises ``ValueError`` when there are no samples."""
    p25, p75, p95 = (percentile(values, percent) for percent in (25, 75, 95))
    return Spread(len(values), min(values), p25, statistics.median(values), p75, p95, max(values))


@dataclass(frozen=True)
class Interval:
    """The median of a sample, and where it lies with 95 % confidence."""

    low: float
    median: float
    high: float


def bootstrap_median(blocks: Sequence[Sequence[float]], seed: int, num_resamples: int = 4000) -> Interval:
    """The 95 % percentile-bootstrap interval of the median; the same ``seed`` gives the same interval.

    Samples of one block share what changed between blocks, so blocks are drawn first and samples within each second.

    Give it the ratios of pairs, never two lists of times: the two halves of a pair saw the same load, and a ratio of
    two medians would let a drift of the machine's speed pass for a difference.

    Raises:
        ValueError: there are no samples.
    """
    if not blocks or not all(blocks):
        raise ValueError("blocks: the median of nothing; measure at least one pair in each block")
    chance = random.Random(seed)
    medians = []
    for _ in range(num_resamples):
        drawn = chance.choices(blocks, k=len(blocks))
        medians.append(statistics.median([value for block in drawn for value in chance.choices(block, k=len(block))]))
    together = [value for block in blocks for value in block]
    return Interval(percentile(medians, 2.5), statistics.median(together), percentile(medians, 97.5))
