"""Small collectives: torch's answers, one answer on all who go on, and clear refusals."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from fault_a2a.buffer import Buffer
from fault_a2a.core_fields import collective_phases
from fault_a2a.errors import ClosedError, FaultA2AError, QuorumLostError, RankEvictedError
from fault_a2a.testing.virtual import VirtualRanks
from tests import collective_scenarios as scenarios
from tests.scenarios import small

torch.set_num_threads(1)
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
SHAPES = [(1,), (7,), (3, 5), (), (512,)]


def values(rank: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    chance = torch.Generator().manual_seed(rank)
    if dtype == torch.bool:
        return torch.rand(shape, generator=chance) < 0.8
    if dtype.is_floating_point:
        return torch.randn(shape, generator=chance).to(dtype)
    return torch.randint(0, 100, shape, generator=chance).to(dtype)


@pytest.fixture(scope="module")
def four():
    with VirtualRanks(4, small(), poison=True) as ranks:
        yield ranks


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, torch.bool], ids=str)
def test_all_gather_gives_everybodys_bytes(four, dtype):
    for shape in SHAPES:
        want = torch.stack([values(rank, dtype, shape) for rank in range(4)])
        for out, contributions in four.run(lambda buffer, s=shape: buffer.all_gather(values(buffer.rank, dtype, s))):
            assert out.dtype == dtype and torch.equal(out, want)
            assert contributions.contributed.tolist() == [1] * 4 and contributions.contributed.dtype == torch.int32
            assert contributions.complete


@pytest.mark.parametrize("op", ["sum", "max", "and"])
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, torch.bool], ids=str)
def test_all_reduce_is_torchs(four, op, dtype):
    if op == "and" and dtype.is_floating_point:
        pytest.skip("floats have no conjunction; see the refusals")
    for shape in SHAPES:
        parts = [values(rank, dtype, shape) for rank in range(4)]
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        want = parts[0].to(wide)
        for part in parts[1:]:
            want = {"sum": want + part.to(wide), "max": torch.maximum(want, part.to(wide))}.get(op, want)
            want = want & part if op == "and" else want
        results = four.run(lambda buffer, s=shape: buffer.all_reduce(values(buffer.rank, dtype, s), op)[0])
        for out in results:
            assert out.dtype == dtype and torch.equal(out, want.to(dtype))


def test_a_nan_stays_one(four):
    def one(buffer: Buffer) -> torch.Tensor:
        return buffer.all_reduce(torch.tensor([float("nan") if buffer.rank == 2 else 1.0, 2.0]), "max")[0]

    for out in four.run(one):
        assert out[0].isnan() and out[1] == 2.0


def test_the_largest_contribution_passes_and_one_more_byte_does_not():
    config = small(max_collective_bytes=70_000)
    with VirtualRanks(2, config) as ranks:
        for out, _ in ranks.run(lambda buffer: buffer.all_gather(torch.full([70_000], buffer.rank + 1).byte())):
            assert out.sum(1).tolist() == [70_000, 140_000]
        for error in ranks.run(lambda buffer: buffer.all_gather(torch.zeros(70_001, dtype=torch.uint8))):
            assert isinstance(error, ValueError) and "max_collective_bytes = 70000" in str(error)


REFUSED = [
    (torch.zeros(0), "sum", ValueError, "no element"),
    (torch.zeros(4, 4).t(), "sum", ValueError, "x.contiguous()"),
    (torch.zeros(4, dtype=torch.complex64), "sum", TypeError, "complex64"),
    (torch.zeros(4096), "sum", ValueError, "max_collective_bytes"),
    ([1, 2], "sum", TypeError, "give a torch.Tensor"),
    (torch.zeros(4, device="meta"), "sum", ValueError, "meta"),
    (torch.zeros(4), "and", TypeError, "integers or bool"),
    (torch.zeros(4), "mean", ValueError, "sum, max, and"),
]


@pytest.mark.parametrize(("x", "op", "kind", "words"), REFUSED)
def test_what_cannot_be_sent_is_refused_and_nothing_is_lost(four, x, op, kind, words):
    with pytest.raises(kind, match=words.replace("(", r"\(").replace(")", r"\)")):
        four.buffers[0].all_reduce(x, op)
    assert all(out.tolist() == [6] for out, _ in four.run(lambda b: b.all_reduce(torch.tensor([b.rank]))))


def test_other_sizes_are_told_to_all_and_the_next_collective_is_well():
    with VirtualRanks(3, small()) as ranks:
        errors = ranks.run(lambda buffer: buffer.all_gather(torch.zeros(2 if buffer.rank == 1 else 4)))
        assert all(isinstance(error, RuntimeError) and "same shape and dtype" in str(error) for error in errors)
        assert "rank 1" in str(errors[0]) and "rank 1" in str(errors[2])
        assert all(out.tolist() == [3] for out, _ in ranks.run(lambda b: b.all_reduce(torch.tensor([b.rank]))))


def test_a_closed_buffer_says_so():
    with VirtualRanks(2, small()) as ranks:
        ranks.buffers[1].close()
        with pytest.raises(ClosedError):
            ranks.buffers[1].all_gather(torch.zeros(1))
        out, contributions = ranks.buffers[0].all_gather(torch.ones(1))
        assert out.tolist() == [[1.0], [0.0]] and contributions.contributed.tolist() == [1, 0]
        assert not contributions.complete


# -- deaths


@pytest.mark.parametrize("victims", [(0,), (2,), (1, 3)], ids=str)
@pytest.mark.parametrize("phase", collective_phases())
def test_a_death_at_every_phase_gives_one_answer(phase, victims):
    with VirtualRanks(4, small(), poison=True) as ranks:
        for victim in victims:
            ranks.buffers[victim].arm(phase, 2, "crash")
        everybody = ranks.run(lambda buffer: scenarios.gather(buffer, 5))
        assert scenarios.differences(everybody, set(victims), 5) == []


@pytest.mark.parametrize("seed", range(20))
def test_deaths_anywhere_give_one_answer(seed):
    assert scenarios.deaths(seed) == []


def test_a_death_among_rounds_and_collectives():
    assert scenarios.beside_rounds() == []


@pytest.mark.parametrize("phase", ["collective.half_contributed", "collective.half_said", "collective.half_done"])
def test_a_process_killed_in_mid_collective(phase):
    assert scenarios.killed_processes(4, victim=2, phase=phase) == []


# -- the other ends of a wait


def test_a_rank_that_sleeps_is_waited_for():
    with VirtualRanks(3, small(), poison=True) as ranks:
        ranks.buffers[1].arm("collective.half_contributed", 1, "sleep_us", 300_000)
        assert scenarios.differences(ranks.run(lambda buffer: scenarios.gather(buffer, 3)), set(), 3) == []


def test_a_cut_link_costs_one_of_its_ends():
    with VirtualRanks(4, small(link_ms=200), poison=True) as ranks:
        for one, other in ((1, 2), (2, 1)):
            ranks.buffers[one].core.set_faults({"cut": [other]})
        everybody = ranks.run(lambda buffer: scenarios.gather(buffer, 4))
        gone = {heard.rank for heard in everybody if isinstance(heard.error, RankEvictedError)}
        assert len(gone) == 1 and gone < {1, 2}
        assert scenarios.differences(everybody, gone, 4) == []


def test_a_part_without_quorum_is_told_and_the_collective_stays_open():
    config = small(agreement_timeout_ms=300, link_ms=100, silence_ms=200)
    with VirtualRanks(4, config, poison=True) as ranks:
        for one, others in ((0, [2, 3]), (1, [2, 3]), (2, [0, 1]), (3, [0, 1])):
            ranks.buffers[one].core.set_faults({"cut": others})
        results = ranks.run(lambda buffer: buffer.all_reduce(torch.tensor([buffer.rank])))
        assert [out.tolist() for out, _ in results[:2]] == [[1], [1]]
        assert all(isinstance(error, QuorumLostError) for error in results[2:])
        with pytest.raises(RuntimeError, match="call it again with the bytes that it had"):
            ranks.buffers[2].all_reduce(torch.tensor([7]))
        with pytest.raises(QuorumLostError):
            ranks.buffers[2].all_reduce(torch.tensor([2]))


def test_calls_in_another_order_end():
    """Rank 0 is in a collective, rank 1 in a round: each waits for the other, alive and ticking."""
    config = small(stall_ms=300)
    with VirtualRanks(2, config) as ranks:
        ended: dict[int, BaseException | None] = {}

        def one(buffer: Buffer) -> None:
            try:
                if buffer.rank == 0:
                    buffer.all_gather(torch.zeros(1))
                else:
                    empty = torch.empty([0, config.num_topk])
                    buffer.dispatch(torch.empty([0, config.hidden], dtype=config.dtype), empty.long(), empty)
                ended[buffer.rank] = None
            except FaultA2AError as error:
                ended[buffer.rank] = error

        threads = [threading.Thread(target=one, args=(buffer,), daemon=True) for buffer in ranks.buffers]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 6
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))
        assert set(ended) == {0, 1}
        deadline = time.monotonic() + 5
        while all(len(buffer.view.active_ranks) == 2 for buffer in ranks.buffers) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sorted(len(buffer.view.active_ranks) for buffer in ranks.buffers)[0] == 1, "nobody was given up"
