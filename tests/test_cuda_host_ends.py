"""Halves, and ends of all kinds, in rounds of the CUDA kernels' own sources, run by their twin. Not run on a GPU."""

from __future__ import annotations

import threading

import pytest
import torch

from fault_a2a.errors import ClosedError
from fault_a2a.testing.virtual import VirtualRanks
from tests import rig, scenarios
from tests.rig import Checker, Tally, Work, raised
from tests.test_cuda_host import BOTH, in_chunks, small

pytestmark = pytest.mark.usefixtures("one_thread")


@in_chunks
@pytest.mark.parametrize("backends", [("cuda-host",), BOTH], ids="-".join)
def test_two_rounds_open(backends: tuple, num_chunk_tokens: int) -> None:
    config = small(num_chunk_tokens=num_chunk_tokens)
    with VirtualRanks(3, config, backends=backends, poison=True) as ranks:
        tallies = rig.run_two_open(ranks, Work(config, 3, 6), 6)
    assert scenarios.corrupt(tallies) == [] and all(tally.rounds == 6 and not tally.lost for tally in tallies)


@in_chunks
def test_hooks(num_chunk_tokens: int) -> None:
    config = small(num_chunk_tokens=num_chunk_tokens)
    work = Work(config, 2, 7)
    with VirtualRanks(2, config, poison=True) as ranks:

        def one(buffer: rig.Buffer) -> Tally:
            checker = Checker(buffer, work)
            for _ in range(3):
                number = buffer.num_rounds
                received, handle, receive = buffer.dispatch(*work.tokens(buffer.rank, number), return_recv_hook=True)
                receive()
                checker.check_received(received, handle, number)
                out, outcome, finish = buffer.combine(checker.experts(received), handle, return_recv_hook=True)
                finish()
                checker.check_output(out, outcome, number)
            return checker.tally

        tallies = raised(ranks.run(one))
    assert scenarios.corrupt(tallies) == [] and all(tally.rounds == 3 for tally in tallies)


@in_chunks
@pytest.mark.parametrize("received", [False, True])
def test_abandoned(received: bool, num_chunk_tokens: int) -> None:
    """Peers are told, get nothing, and go on."""
    config = small(num_chunk_tokens=num_chunk_tokens)
    work = Work(config, 3, 8)
    with VirtualRanks(3, config, backends=BOTH, poison=True) as ranks:

        def one(buffer: rig.Buffer) -> Tally:
            checker = Checker(buffer, work)
            checker.run(1)
            if buffer.rank == 0:
                _, handle, receive = buffer.dispatch(*work.tokens(0, buffer.num_rounds), return_recv_hook=True)
                if received:
                    receive()
                buffer.abandon(handle)
            else:
                checker.run(1)
            return checker.run(2)

        tallies = raised(ranks.run(one))
        evidence = [found for buffer in ranks.buffers for found in buffer.evidence()]
    assert scenarios.corrupt(tallies) == [] and not evidence
    assert all(tally.lost_by_round[2] > 0 for tally in tallies[1:])
    assert sum(tally.lost_by_round[3] + tally.lost_by_round[4] for tally in tallies) == 0


@in_chunks
def test_small_collectives_between_rounds(num_chunk_tokens: int) -> None:
    """They run on the host, and leave what the kernels show of this rank as it should be."""
    config = small(num_chunk_tokens=num_chunk_tokens)
    work = Work(config, 3, 9)
    with VirtualRanks(3, config, backends=BOTH, poison=True) as ranks:
        ranks.buffers[1].arm("collective.begin", 1, "sleep_us", 200_000)

        def one(buffer: rig.Buffer) -> Tally:
            checker = Checker(buffer, work)
            for number in range(3):
                checker.run(1)
                largest, _ = buffer.all_reduce(torch.tensor([buffer.rank + number]), "max")
                assert largest.item() == number + 2
            return checker.tally

        tallies = raised(ranks.run(one))
        evidence = [found for buffer in ranks.buffers for found in buffer.evidence()]
    assert scenarios.corrupt(tallies) == [] and not evidence and all(tally.rounds == 3 for tally in tallies)


@in_chunks
def test_close_ends_a_wait(num_chunk_tokens: int) -> None:
    """Rank 1 never comes to the round; rank 0 is closed from another thread, and leaves its wait."""
    config = small(num_chunk_tokens=num_chunk_tokens)
    with VirtualRanks(2, config) as ranks:
        threading.Timer(0.3, ranks.buffers[0].close).start()
        (result,) = ranks.run(lambda buffer: buffer.dispatch(*Work(config, 2).tokens(0, 1)), [0])
    assert isinstance(result, ClosedError)


def test_a_round_that_is_ended_leaves_nothing_of_the_one_before() -> None:
    """A replayed graph reads its outputs whatever became of the round: counts are 0, and every choice is lost."""
    config = small()
    counts, offsets = torch.full([4], 7, dtype=torch.int32), torch.full([5], 7, dtype=torch.int32)
    out, lost = torch.ones(6, 64, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.uint8)
    codes = torch.ones(6, 3, dtype=torch.uint8)
    work = Work(config, 2)
    for is_received in (False, True):
        with VirtualRanks(2, config) as ranks:
            buffers = ranks.buffers
            sent = [buffer._dispatch_send(*work.tokens(buffer.rank, 1), None) for buffer in buffers[: 1 + is_received]]
            core_of_0, recv_x = buffers[0].core, sent[0][0][0]
            threading.Timer(0.3, buffers[0].close).start()
            pointers = (counts.data_ptr(), offsets.data_ptr())
            status = core_of_0.dispatch_receive(1, recv_x.data_ptr(), 0, 0, *pointers)[0]
            if is_received:
                assert status == "ok" and core_of_0.combine_send(recv_x.data_ptr(), 1) == "ok"
                status = core_of_0.combine_receive(1, out.data_ptr(), codes.data_ptr(), lost.data_ptr())
            assert status == "closed"
        if not is_received:
            assert counts.tolist() == [0] * 4 and offsets.tolist() == [0] * 5
    assert (codes == 2).all() and lost.item() == 1 and not out.any()


@in_chunks
def test_bad_experts_are_refused_before_anything_is_sent(num_chunk_tokens: int) -> None:
    config = small(num_chunk_tokens=num_chunk_tokens)
    with VirtualRanks(1, config) as ranks:
        (buffer,) = ranks.buffers
        x, _, weights = Work(config, 1).tokens(0, 1)
        idx = torch.arange(3).repeat(6, 1)
        for wrong, why in ((8, r"topk_idx\[4, 1\] is 8; give an expert from 0 to 7"), (0, "names expert 0 twice")):
            bad = idx.clone()
            bad[4, 1] = wrong
            with pytest.raises(ValueError, match=why):
                buffer.dispatch(x, bad, weights)
        assert buffer.num_rounds == 1
        assert Checker(buffer, Work(config, 1)).run(2).corrupt == []
