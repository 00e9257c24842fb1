"""Halves and hooks: what is sent first and received later, two micro-batches in flight, and misuse of a hook."""

from __future__ import annotations

import time

import pytest
import torch

from fault_a2a.buffer import Buffer
from fault_a2a.config import Config
from fault_a2a.errors import ClosedError, FaultA2AError
from fault_a2a.rounds import NUM_LANES, Handle, Received
from fault_a2a.testing.virtual import VirtualRanks
from tests.groups import name_of
from tests.rig import Checker, Tally, Work, raised, suspicions_of
from tests.scenarios import corrupt, lost_between_live, one_view_per_round, small
from tests.test_conformance import FORMATS, config_of


class HookedChecker(Checker):
    """Every verb in two halves, with the halves of two micro-batches between each other."""

    def send(self, number: int) -> tuple[Received, Handle]:
        received, handle, self.receive[number] = self.buffer.dispatch(
            *self.work.tokens(self.buffer.rank, number), return_recv_hook=True
        )
        assert handle.lane == number % NUM_LANES
        return received, handle

    def run_micro_batches(self, num_steps: int) -> Tally:
        """Each step is two rounds: A goes out, B goes out, A is received and answered while B is under way ..."""
        self.receive: dict = {}
        try:
            for _ in range(num_steps):
                first = self.buffer.num_rounds
                rounds = [first, first + 1]
                sent = [self.send(number) for number in rounds]
                answers = []
                for number, (received, handle) in zip(rounds, sent, strict=True):
                    self.receive.pop(number)()
                    self.check_received(received, handle, number)
                    answers.append(self.buffer.combine(self.experts(received), handle, return_recv_hook=True))
                for number, (out, outcome, hook) in zip(rounds, answers, strict=True):
                    hook()
                    self.check_output(out, outcome, number)
        except FaultA2AError as error:
            self.tally.error = error
        return self.tally


def micro_batches(config: Config, num_ranks: int, deaths: tuple = (), num_steps: int = 4) -> list[Tally]:
    work = Work(config, num_ranks)
    with VirtualRanks(num_ranks, config, poison=True) as ranks:
        for victim, phase, number in deaths:
            ranks.buffers[victim].arm(phase, number, "crash")
        tallies = raised(ranks.run(lambda buffer: HookedChecker(buffer, work).run_micro_batches(num_steps)))
        dead = {victim for victim, _, _ in deaths}
        assert {tally.rank for tally in tallies if isinstance(tally.error, ClosedError)} == dead
        wrong = corrupt(tallies) + lost_between_live(ranks, work, tallies, dead)
        wrong += one_view_per_round(ranks, work, tallies)
        wrong += [str(found) for found in suspicions_of(ranks, set(range(num_ranks)) - dead)]
        assert wrong == []
    for tally in tallies:
        assert tally.rank in dead or (tally.error is None and tally.rounds == 2 * num_steps)
    return tallies


@pytest.mark.parametrize("num_chunk_tokens", [24, 4])
@pytest.mark.parametrize("recv_format", ["batched", "packed"])
def test_two_micro_batches(recv_format: str, num_chunk_tokens: int) -> None:
    config = small(num_max_tokens_per_rank=24, num_chunk_tokens=num_chunk_tokens, recv_format=recv_format)
    tallies = micro_batches(config, 3)
    assert sum(tally.lost + tally.unroutable for tally in tallies) == 0


PHASES_OF_A_DEATH = (
    *("dispatch.half_signalled", "dispatch.wait", "dispatch.taken"),
    *("combine.begin", "combine.half_signalled"),
)


@pytest.mark.parametrize("lane", range(NUM_LANES))
@pytest.mark.parametrize("phase", PHASES_OF_A_DEATH)
def test_two_micro_batches_with_a_death_in_one(phase: str, lane: int) -> None:
    """Both outcomes are exact, whichever of the two it struck."""
    number = 3 + lane
    tallies = micro_batches(small(), 4, deaths=((2, phase, number),))
    alive = [tally for tally in tallies if tally.rank != 2]
    # Whoever had not begun the round when the view came finds its choices unroutable, not lost.
    assert any(tally.lost_by_round[n] + tally.unroutable_by_round[n] for tally in alive for n in (3, 4))
    assert all(tally.unroutable_by_round[7] for tally in alive)


@pytest.mark.parametrize("formats", FORMATS, ids=name_of)
def test_two_micro_batches_in_every_format(formats: tuple) -> None:
    """Hooks, lanes, chunks or none, and a death in every other one."""
    number = FORMATS.index(formats)
    config = config_of(formats, num_max_tokens_per_rank=12, num_chunk_tokens=(12, 5)[number // 2 % 2])
    phase = PHASES_OF_A_DEATH[number % len(PHASES_OF_A_DEATH)]
    micro_batches(config, 4, deaths=((number % 4, phase, 3 + number % 3),) if number % 2 else (), num_steps=3)


@pytest.mark.parametrize("phase", ["dispatch.chunk", "dispatch.chunk_taken", "combine.chunk"])
def test_a_death_in_one_of_two_streams(phase: str) -> None:
    config = small(num_max_tokens_per_rank=24, num_chunk_tokens=2)
    micro_batches(config, 4, deaths=((1, phase, 4),))


def test_sending_waits_for_nobody() -> None:
    """A half that sends returns although the other rank has not even begun the round."""
    config = small()
    work = Work(config, 2)
    with VirtualRanks(2, config) as ranks:

        def one(buffer: Buffer) -> float:
            checker = Checker(buffer, work)
            if buffer.rank == 1:
                time.sleep(0.5)
            began = time.monotonic()
            received, handle, receive = buffer.dispatch(*work.tokens(buffer.rank, 1), return_recv_hook=True)
            took_s = time.monotonic() - began
            receive()
            out, outcome, reduce = buffer.combine(checker.experts(received), handle, return_recv_hook=True)
            reduce()
            checker.check_output(out, outcome, 1)
            assert not checker.tally.corrupt
            return took_s

        assert max(raised(ranks.run(one))) < 0.4


def test_x_may_go_once_it_is_sent_in_one_chunk() -> None:
    config = small()
    work = Work(config, 2)
    with VirtualRanks(2, config) as ranks:

        def one(buffer: Buffer) -> Tally:
            checker = Checker(buffer, work)
            x, idx, weights = work.tokens(buffer.rank, 1)
            received, handle, receive = buffer.dispatch(x, idx, weights, return_recv_hook=True)
            del x
            receive()
            checker.check_received(received, handle, 1)
            buffer.abandon(handle)
            return checker.tally

        assert corrupt(raised(ranks.run(one))) == []


# --- misuse: the group works afterwards


def test_a_hook_is_called_once_and_before_combine() -> None:
    config = small()
    work = Work(config, 2)
    with VirtualRanks(2, config) as ranks:

        def one(buffer: Buffer) -> Tally:
            checker = Checker(buffer, work)
            received, handle, receive = buffer.dispatch(*work.tokens(buffer.rank, 1), return_recv_hook=True)
            with pytest.raises(RuntimeError, match="call the hook"):
                buffer.combine(torch.zeros_like(received.x), handle)
            receive()
            with pytest.raises(RuntimeError, match="called before"):
                receive()
            _, _, reduce = buffer.combine(checker.experts(received), handle, return_recv_hook=True)
            with pytest.raises(RuntimeError, match="answered already"):
                buffer.combine(checker.experts(received), handle)
            reduce()
            with pytest.raises(RuntimeError, match="called before"):
                reduce()
            return checker.run(2)

        tallies = raised(ranks.run(one))
        assert corrupt(tallies) + lost_between_live(ranks, work, tallies, set()) == []


@pytest.mark.parametrize("num_chunk_tokens", [24, 4])
def test_abandoned_before_it_is_received(num_chunk_tokens: int) -> None:
    """Peers lose what they sent here in that round, hear so at once, and the next round is whole."""
    config = small(num_max_tokens_per_rank=24, num_chunk_tokens=num_chunk_tokens)
    work = Work(config, 3)
    with VirtualRanks(3, config, poison=True) as ranks:

        def one(buffer: Buffer) -> Tally:
            checker = Checker(buffer, work)
            if buffer.rank != 1:
                return checker.run(3)
            _, handle, _ = buffer.dispatch(*work.tokens(1, 1), return_recv_hook=True)
            buffer.abandon(handle)
            return checker.run(2)

        tallies = raised(ranks.run(one))
        assert corrupt(tallies) == []
        assert [bool(tally.lost_by_round[1]) for tally in tallies] == [True, False, True]
        assert all(tally.lost_by_round[2] + tally.lost_by_round[3] == 0 for tally in tallies)


def test_abandoned_in_the_middle_of_its_answer() -> None:
    """The hook of a combine is dropped, and y with it: what had not gone out yet is lost, and nothing reads y again."""
    config = small(num_max_tokens_per_rank=64, num_chunk_tokens=2)
    work = Work(config, 3)
    with VirtualRanks(3, config, poison=True) as ranks:

        def one(buffer: Buffer) -> Tally:
            checker = Checker(buffer, work)
            if buffer.rank != 1:
                return checker.run(3)
            received, handle = checker.dispatch(1)
            y = checker.experts(received)
            buffer.combine(y, handle, return_recv_hook=True)
            y.fill_(float("nan"))
            buffer.abandon(handle)
            return checker.run(2)

        tallies = raised(ranks.run(one))
        assert corrupt(tallies) == []
        assert [bool(tally.lost_by_round[1]) for tally in tallies] == [True, False, True]
        assert all(tally.lost_by_round[2] + tally.lost_by_round[3] == 0 for tally in tallies)


@pytest.mark.parametrize("num_chunk_tokens", [24, 4])
def test_close_with_a_hook_not_called(num_chunk_tokens: int) -> None:
    config = small(num_max_tokens_per_rank=24, num_chunk_tokens=num_chunk_tokens)
    work = Work(config, 3)
    with VirtualRanks(3, config, poison=True) as ranks:

        def one(buffer: Buffer) -> Tally | None:
            if buffer.rank != 1:
                return Checker(buffer, work).run(3)
            _, _, receive = buffer.dispatch(*work.tokens(1, 1), return_recv_hook=True)
            began = time.monotonic()
            buffer.close()
            assert time.monotonic() - began < 2.0
            with pytest.raises(ClosedError):
                receive()
            return None

        tallies = [tally for tally in raised(ranks.run(one)) if tally is not None]
        assert corrupt(tallies) == []
        assert all(tally.rounds == 3 for tally in tallies)
