"""How the cost of an agreement grows: at most by the number of peers, for each rank."""

from __future__ import annotations

import functools
import json

import pytest

from tests.ballots import run

SIZES = (8, 32, 96, 256)


@functools.cache
def growth() -> dict[int, dict[str, float]]:
    done = run("agreement_growth", *map(str, SIZES))
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    return {row["ranks"]: row for row in map(json.loads, done.stdout.splitlines())}


def test_messages_of_a_rank_grow_at_most_with_its_peers() -> None:
    rows = growth()
    for key in ("page_looks", "record_reads", "record_bytes", "rings"):
        first = rows[SIZES[0]][key] / (SIZES[0] - 1)
        for size in SIZES[1:]:
            # A quarter of room: in the smallest group the one that died is a larger part of all.
            assert rows[size][key] / (size - 1) <= 1.25 * first, f"{key} of {size} ranks"


def test_what_a_rank_stores_does_not_grow() -> None:
    rows = growth()
    for key in ("stores", "stored_bytes", "turns"):
        assert len({rows[size][key] for size in SIZES}) == 1, key


def test_rows_of_accusations_are_the_one_thing_that_grows_faster() -> None:
    """Every turn reads them whole. Were this to become linear, docs/measured.md would have to say so."""
    rows = growth()
    for size in SIZES:
        assert rows[size]["accusation_words"] == rows[size]["turns"] * size * (size - 1)


@pytest.mark.parametrize("size", ["1", "1025"])
def test_a_group_that_cannot_be_is_refused(size: str) -> None:
    done = run("agreement_growth", size)
    assert done.returncode == 2 and "give 2 to 1024" in done.stderr
