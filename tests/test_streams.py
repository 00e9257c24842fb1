"""Batches longer than a window: streams of chunks against the reference, with deaths in the middle of them."""

from __future__ import annotations

import itertools

import pytest
import torch

from fault_a2a import reference
from fault_a2a.config import Config
from fault_a2a.core_fields import window_bytes
from fault_a2a.errors import ClosedError
from tests.groups import BACKENDS, GroupOf, each_on, group_on, on_every
from tests.rig import Checker, Tally, Work, raised, run_checked, suspicions_of, views_agree
from tests.scenarios import corrupt, lost_between_live, one_view_per_round
from tests.test_conformance import FORMATS, RoutedWork, config_of, conform

CHUNK_PHASES = ("dispatch.chunk", "dispatch.chunk_taken", "combine.chunk", "combine.chunk_taken")


pytestmark = pytest.mark.usefixtures("one_thread")

# --- all alive


@each_on(list(BACKENDS), "formats,num_chunk_tokens", zip(FORMATS, itertools.cycle([1, 3, 8]), strict=False))
def test_all_alive(group_of: GroupOf, formats: tuple, num_chunk_tokens: int) -> None:
    """Chunks of one token, chunks that do not divide the batch, and those that do."""
    config = config_of(formats, num_max_tokens_per_rank=24, num_chunk_tokens=num_chunk_tokens)
    with group_of(3, config) as ranks:
        tallies = conform(ranks, RoutedWork(config, 3, seed=1))
    assert sum(tally.lost + tally.unroutable for tally in tallies) == 0 < sum(tally.choices for tally in tallies)


@on_every
def test_one_rank_streams_to_itself(group_of: GroupOf) -> None:
    config = config_of(num_max_tokens_per_rank=30, num_chunk_tokens=4)
    with group_of(1, config) as ranks:
        conform(ranks, RoutedWork(config, 1, seed=2))


@pytest.mark.parametrize("group_of", ["cpu", "mixed", pytest.param("cuda-host", marks=pytest.mark.slow)], indirect=True)
def test_more_chunks_than_the_field_can_count(group_of: GroupOf) -> None:
    """A chunk's number has 8 bits; a stream of 300 chunks passes the end of the field."""
    config = config_of(num_max_tokens_per_rank=300, num_chunk_tokens=1, hidden=8)
    work = Work(config, 2)
    with group_of(2, config) as ranks:
        tallies = run_checked(ranks, work, 3)
        assert corrupt(tallies) + lost_between_live(ranks, work, tallies, set()) == []


@on_every
def test_short_batches_in_a_long_window(group_of: GroupOf) -> None:
    """Zero tokens, one, one chunk, and a stream, in one round."""
    config = config_of(num_max_tokens_per_rank=64, num_chunk_tokens=8)
    work = Work(config, 4, num_tokens=lambda rank, number: (0, 1, 8, 64)[(rank + number) % 4])
    with group_of(4, config) as ranks:
        tallies = run_checked(ranks, work, 8)
        assert corrupt(tallies) + lost_between_live(ranks, work, tallies, set()) == []


@on_every
def test_two_streams_open(group_of: GroupOf) -> None:
    config = config_of(num_max_tokens_per_rank=40, num_chunk_tokens=4)
    work = Work(config, 3)
    with group_of(3, config) as ranks:
        tallies = raised(ranks.run(lambda buffer: Checker(buffer, work).run_two_open(8)))
        assert corrupt(tallies) + lost_between_live(ranks, work, tallies, set()) == []


@on_every
def test_a_late_source_costs_nobody_else(group_of: GroupOf) -> None:
    """Rank 2 begins several link timeouts late. Until its claims are here nobody takes a chunk, and each waits for the
    others to give one back: their signals have long come, and no link is broken."""
    config = config_of(num_max_tokens_per_rank=48, num_chunk_tokens=4, num_experts=8, link_ms=200)
    work = Work(config, 3)
    with group_of(3, config) as ranks:
        ranks.buffers[2].arm("dispatch.gate", 3, "sleep_us", 1_000_000)
        tallies = run_checked(ranks, work, 5)
        wrong = corrupt(tallies) + lost_between_live(ranks, work, tallies, set())
        assert wrong + [str(found) for found in suspicions_of(ranks, {0, 1, 2})] == []


def test_window_does_not_grow_with_the_batch() -> None:
    sizes = {
        window_bytes(config_of(num_max_tokens_per_rank=most, num_chunk_tokens=64), 8) for most in (128, 8192, 100_000)
    }
    assert len(sizes) == 1


# --- deaths in mid-stream


def dies_in_a_stream(
    group_of: GroupOf,
    config: Config,
    num_ranks: int,
    deaths: list[tuple[int, str, int]],
    seed: int = 0,
    num_rounds: int = 5,
) -> list[Tally]:
    """``deaths``: (rank, phase, how often it passes the phase first), all in the third round. Checks what can be known;
    returns the survivors' tallies."""
    work = Work(config, num_ranks, seed=seed)
    with group_of(num_ranks, config) as ranks:
        for victim, phase, skip in deaths:
            ranks.buffers[victim].arm(phase, 3, "crash", skip=skip)
        tallies = run_checked(ranks, work, num_rounds)
        dead = {victim for victim, _, _ in deaths}
        assert {tally.rank for tally in tallies if isinstance(tally.error, ClosedError)} == dead, "a phase was missed"
        wrong = corrupt(tallies) + one_view_per_round(ranks, work, tallies)
        wrong += lost_between_live(ranks, work, tallies, dead)
        wrong += [str(found) for found in suspicions_of(ranks, set(range(num_ranks)) - dead)]
        assert wrong == []
        assert views_agree(ranks)
    alive = [tally for tally in tallies if tally.rank not in dead]
    assert all(tally.rounds == num_rounds for tally in alive)
    return alive


@each_on(list(BACKENDS), "skip,phase", itertools.product(range(0, 24, 3), CHUNK_PHASES))
def test_a_death_at_a_chunk(group_of: GroupOf, skip: int, phase: str) -> None:
    """Nobody takes a row that is not right, and choices to live ranks are all delivered."""
    formats = FORMATS[(skip + CHUNK_PHASES.index(phase)) % len(FORMATS)]
    config = config_of(formats, num_max_tokens_per_rank=48, num_chunk_tokens=4, num_experts=8)
    # Answers make fewer chunks than rows on their way out, and tokens are summed in batches of any length.
    skip = {"combine.chunk": skip // 2, "combine.chunk_taken": skip % 3}.get(phase, skip)
    dies_in_a_stream(group_of, config, 4, [(skip % 4, phase, skip)], seed=skip)


@on_every
@pytest.mark.parametrize("phase", CHUNK_PHASES[:3])
def test_two_deaths_in_one_stream(group_of: GroupOf, phase: str) -> None:
    config = config_of(num_max_tokens_per_rank=48, num_chunk_tokens=4, num_experts=10)
    dies_in_a_stream(group_of, config, 5, [(1, phase, 5), (3, phase, 9)], seed=7)


@on_every
def test_part_of_a_combine_stream_counts(group_of: GroupOf) -> None:
    """Who dies while its answers stream has delivered those that came, and lost the others."""
    config = config_of(num_max_tokens_per_rank=48, num_chunk_tokens=4, num_experts=8)
    tallies = dies_in_a_stream(group_of, config, 4, [(2, "combine.chunk", 12)])
    rank_of = torch.tensor(config.placement_for(4).expert_rank)
    shares = []
    for tally in tallies:
        idx = Work(config, 4).tokens(tally.rank, 3)[1]
        codes = tally.outcomes[3][(rank_of[idx.clamp(min=0)] == 2) & (idx >= 0)]
        shares.append(float((codes == reference.DELIVERED).float().mean()))
        assert not bool((codes == reference.UNROUTABLE).any())
    assert any(0 < share < 1 for share in shares), shares


@on_every
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))])
def test_a_writer_that_never_asks(group_of: GroupOf, seed: int) -> None:
    """It stores over chunks that are being read. Its rows may be torn, and no call hangs for it."""
    config = config_of(num_max_tokens_per_rank=96, num_chunk_tokens=2, num_experts=8, hidden=2048)
    work = Work(config, 3, seed=seed)
    with group_of(3, config) as ranks:
        ranks.buffers[1].core.set_faults({"ignore_consent": True})
        tallies = run_checked(ranks, work, 6)
        assert [(tally.rounds, tally.error) for tally in tallies] == [(6, None)] * 3
        assert not [text for text in corrupt(tallies) if "from rank 1" not in text and "out is not" not in text]


# --- prefill: 8,192 tokens a rank

PREFILL = {"num_experts": 8, "hidden": 8, "num_topk": 2, "num_max_tokens_per_rank": 8192, "num_chunk_tokens": 512}
NUM_PREFILL_CHUNKS = 12  # each of four ranks sends some 3,500 rows to each: 7 chunks there, and 4 of answers back


def prefill_death(seed: int, backends: tuple[str, ...] = ("cpu",)) -> None:
    """Death ``seed`` of all: every chunk position of a stream of 8,192 tokens, at its source and at its destination,
    and every third time twice in one stream."""
    phase, place = CHUNK_PHASES[seed % 4], seed // 4 % NUM_PREFILL_CHUNKS
    if phase == "combine.chunk_taken":
        place %= 3  # tokens are summed in batches of any length
    config = config_of((torch.bfloat16, "packed", "owner", "drop"), **PREFILL, silence_ms=10_000, stall_ms=60_000)
    deaths = [(seed % 4, phase, place)]
    if seed % 3 == 2:
        deaths.append(((seed + 1) % 4, CHUNK_PHASES[(seed + 1) % 2], (place + 2) % NUM_PREFILL_CHUNKS))
    dies_in_a_stream(group_on(backends), config, 4, deaths, seed=seed, num_rounds=4)


@pytest.mark.parametrize("seed", [0, 17, 35])
def test_a_death_in_a_prefill(seed: int) -> None:
    prefill_death(seed)


@pytest.mark.parametrize("seed", [20, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (5, 30))])
def test_a_death_in_a_prefill_of_both_kinds(seed: int) -> None:
    prefill_death(seed, ("cuda-host", "cpu"))
