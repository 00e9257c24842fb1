"""What a buffer tells of each peer: who is late, how many rows came, and what failed."""

from __future__ import annotations

import pytest
import torch

from fault_a2a.buffer import Buffer
from fault_a2a.rounds import SourceStats
from fault_a2a.testing.virtual import VirtualRanks
from tests.rig import Checker, Work, raised, run_checked
from tests.scenarios import small


def since(buffer: Buffer, before: list[SourceStats]) -> list[SourceStats]:
    return [
        SourceStats(
            new.rank,
            new.wait_us - old.wait_us,
            new.late_us - old.late_us,
            new.max_late_us,
            new.num_rows - old.num_rows,
            new.num_bytes - old.num_bytes,
            new.num_failures - old.num_failures,
        )
        for new, old in zip(buffer.source_stats(), before, strict=True)
    ]


@pytest.mark.parametrize("num_chunk_tokens", [8, 2])
def test_rows_and_bytes_are_counted(num_chunk_tokens: int) -> None:
    config = small(num_chunk_tokens=num_chunk_tokens)
    work = Work(config, 3)
    with VirtualRanks(3, config) as ranks:
        before = [buffer.source_stats() for buffer in ranks.buffers]
        run_checked(ranks, work, 3)
        rank_of = torch.tensor(ranks.buffers[0].placement.expert_rank)
        for buffer in ranks.buffers:
            for line in since(buffer, before[buffer.rank]):
                wanted = 0
                for number in (1, 2, 3):
                    theirs, mine = work.tokens(line.rank, number)[1], work.tokens(buffer.rank, number)[1]
                    to_me = (rank_of[theirs.clamp(min=0)] == buffer.rank) & (theirs >= 0)
                    wanted += int(to_me.any(1).sum())  # one row a token
                    wanted += int(((rank_of[mine.clamp(min=0)] == line.rank) & (mine >= 0)).sum())  # one a choice
                assert (line.num_rows, line.num_failures) == (wanted, 0)
                assert line.num_bytes == wanted * config.hidden_bytes


def test_the_straggler_shows() -> None:
    """Rank 1 begins one round late and computes long in another: it is late to everybody, and nobody else is."""
    config = small()
    work = Work(config, 3)
    with VirtualRanks(3, config) as ranks:
        before = [buffer.source_stats() for buffer in ranks.buffers]
        ranks.buffers[1].arm("dispatch.gate", 2, "sleep_us", 200_000)
        ranks.buffers[1].arm("combine.begin", 3, "sleep_us", 100_000)
        run_checked(ranks, work, 4)
        for rank in (0, 2):
            lines = since(ranks.buffers[rank], before[rank])
            assert lines[1].late_us > 280_000 and lines[1].wait_us > 150_000
            assert 180_000 < lines[1].max_late_us < 2_000_000
            assert all(lines[other].late_us < lines[1].late_us / 2 for other in (0, 2))
            assert lines[rank].wait_us == 0, "nobody waits for itself"


def test_what_was_not_taken_counts() -> None:
    config = small()
    work = Work(config, 3)
    with VirtualRanks(3, config) as ranks:
        before = ranks.buffers[0].source_stats()

        def one(buffer: Buffer) -> None:
            checker = Checker(buffer, work)
            received, handle = checker.dispatch(1)
            if buffer.rank == 1:
                buffer.abandon(handle)
            else:
                checker.combine(received, handle, 1)

        raised(ranks.run(one))
        assert [line.num_failures for line in since(ranks.buffers[0], before)] == [0, 1, 0]
