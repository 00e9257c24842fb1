"""Accidents on purpose: each scenario returns what went wrong in it, which must be nothing unless a guard is out.

``scale``, where a scenario has it, multiplies its times: some kernels are slow, being interpreted."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fault_a2a import phases, reference
from fault_a2a._core import core
from fault_a2a.buffer import Buffer
from fault_a2a.config import Config
from fault_a2a.errors import FaultA2AError, RankEvictedError
from fault_a2a.testing.virtual import VirtualRanks
from tests.rig import Checker, SameRouting, Tally, Work, raised, run_checked, run_two_open, suspicions_of, views_agree

Wrong = list[str]

# csrc/transport/faults.hpp, enum Lie.
LIES = {
    name: 1 << bit
    for bit, name in enumerate(
        [
            *("count", "expert", "choice", "num_choices", "twice", "combine_count"),
            *("old_round", "old_epoch", "future", "claims"),
        ]
    )
}


@contextmanager
def without(*guards: str) -> Iterator[None]:
    """The named guards are out, in this process, for as long as this lasts."""
    names = core.guard_names()
    core.set_guards_off(sum(1 << names.index(guard) for guard in guards))
    try:
        yield
    finally:
        core.set_guards_off(0)


def small(**changes: object) -> Config:
    fields: dict = {"num_experts": 8, "hidden": 32, "num_topk": 2, "num_max_tokens_per_rank": 8}
    return Config(**{**fields, "settle_ms": 20, "agreement_timeout_ms": 3000, **changes})


def corrupt(tallies: list[Tally]) -> Wrong:
    return [f"rank {tally.rank}: {text}" for tally in tallies for text in tally.corrupt]


def lost_between_live(ranks: VirtualRanks, work: Work, tallies: list[Tally], dead: set[int]) -> Wrong:
    """Choices to a rank that did not die, lost all the same."""
    wrong = []
    placement = ranks.buffers[0].placement
    for tally in tallies:
        for number, codes in tally.outcomes.items():
            idx = work.tokens(tally.rank, number)[1]
            for expert in idx[codes == reference.LOST].tolist():
                if placement.expert_rank[expert] not in dead | {tally.rank} and tally.rank not in dead:
                    wrong.append(
                        f"round {number}: rank {tally.rank} lost a choice to live rank {placement.expert_rank[expert]}"
                    )
    return wrong


def one_view_per_round(ranks: VirtualRanks, work: Work, tallies: list[Tally]) -> Wrong:
    """A choice is unroutable exactly in the rounds whose view leaves its rank out."""
    wrong = [] if views_agree(ranks) else ["two views of one epoch"]
    for buffer, tally in zip(ranks.buffers, tallies, strict=True):
        views = [view for view, _ in buffer.views()]
        rank_of = torch.tensor(buffer.placement.expert_rank)
        for number, codes in tally.outcomes.items():
            active = torch.tensor(
                [view for view in views if view.first_round <= number][-1].active_mask, dtype=torch.bool
            )
            idx = work.tokens(tally.rank, number)[1]
            out = ~active[rank_of[idx.clamp(min=0)]] & (idx >= 0)
            if not torch.equal(codes == reference.UNROUTABLE, out):
                wrong.append(f"round {number}: rank {tally.rank} used another view than its number says")
    return wrong


def overtaken(scale: int = 1, num_tokens: int = 16) -> Wrong:
    """Rank 1 is slow to copy rank 0's rows, and silent for a while: rank 0 gives it up. It beats again, the
    same members are decided anew, the suspicion is lifted; and all that once more. Then rank 0 has the slot again that
    rank 1 still copies."""
    config = small(silence_ms=120 * scale, settle_ms=2000 * scale, num_max_tokens_per_rank=num_tokens)
    work = SameRouting(config, 2)
    with VirtualRanks(2, config, poison=True) as ranks:
        ranks.buffers[1].arm("dispatch.copy", 3, "sleep_us", 1_100_000 * scale)

        def one(buffer: Buffer) -> Tally:
            checker = Checker(buffer, work)
            checker.run(2)
            if buffer.rank == 1:
                buffer.core.pause_pulse(250 * scale)
                threading.Timer(0.45 * scale, buffer.core.pause_pulse, [250 * scale]).start()
            return checker.run(8)

        tallies = raised(ranks.run(one))
        wrong = corrupt(tallies)
        if len(ranks.buffers[0].views()) < 3:
            wrong.append("the suspicion was never lifted: the scenario shows nothing")
        return wrong


def running_ahead(scale: int = 1) -> Wrong:
    """Rank 1 stands still in round 3. How far does rank 0, which has given it up, run ahead of it?"""
    config = small(stall_ms=60 * scale, settle_ms=60_000)
    work = Work(config, 2)
    with VirtualRanks(2, config) as ranks:
        ranks.buffers[1].arm("dispatch.copy", 3, "sleep_us", 400_000 * scale)
        ahead = [0]

        def one(buffer: Buffer) -> Tally:
            checker = Checker(buffer, work)
            checker.run(3)
            if buffer.rank == 1:
                ahead[0] = ranks.buffers[0].num_rounds - buffer.num_rounds
            return checker.run(3)

        raised(ranks.run(one))
        return [f"rank 0 ran {ahead[0]} rounds ahead"] if ahead[0] > 2 else []


def voted_out_alive() -> Wrong:
    """Rank 1 accuses everybody, so it goes, though nobody accuses it. It beats on, and never signals again: who waits
    for it in a round of the view before must not do so for ever."""
    config = small(link_ms=150, stall_ms=60_000)
    work = Work(config, 4)
    with VirtualRanks(4, config) as ranks:
        # What others send to rank 1 is lost on the way; what it sends arrives.
        for rank in (0, 2, 3):
            ranks.buffers[rank].arm("dispatch.gate", 4, "sleep_us", 1)
            ranks.buffers[rank].core.set_faults({"drop_signals": [1]})
        ended: dict[int, Tally] = {}

        def one(buffer: Buffer) -> None:
            ended[buffer.rank] = Checker(buffer, work).run(12)

        threads = [threading.Thread(target=one, args=(buffer,), daemon=True) for buffer in ranks.buffers]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 4
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))
        wrong = [f"rank {rank} still waits" for rank in range(4) if rank not in ended]
        wrong += [
            f"rank {rank} is in {ranks.buffers[rank].view.active_ranks}"
            for rank in (0, 2, 3)
            if ranks.buffers[rank].view.active_ranks != (0, 2, 3)
        ]
        for buffer in ranks.buffers:
            buffer.close()
        return wrong


def mixed_views() -> Wrong:
    """Rank 1 dies while rank 2 is already in round r and rank 0 has not begun it."""
    config = small()
    work = Work(config, 4)
    with VirtualRanks(4, config, poison=True) as ranks:
        ranks.buffers[1].arm("dispatch.gate", 5, "crash")
        ranks.buffers[0].arm("dispatch.gate", 5, "sleep_us", 100_000)
        tallies = run_checked(ranks, work, 12)
        return (
            corrupt(tallies) + lost_between_live(ranks, work, tallies, {1}) + one_view_per_round(ranks, work, tallies)
        )


def slow_promise() -> Wrong:
    """As mixed_views, and the rank that is ahead is late with its promise: its native thread sleeps."""
    config = small()
    work = Work(config, 5)
    with VirtualRanks(5, config, poison=True) as ranks:
        for rank in (0, 2, 3):
            ranks.buffers[rank].arm("dispatch.gate", 5, "sleep_us", 60_000)
        ranks.buffers[1].arm("dispatch.gate", 5, "crash")
        ranks.buffers[4].arm("dispatch.taken", 4, "sleep_us", 1)
        ranks.buffers[4].core.pause_pulse(300)
        tallies = run_checked(ranks, work, 12)
        return (
            corrupt(tallies) + lost_between_live(ranks, work, tallies, {1}) + one_view_per_round(ranks, work, tallies)
        )


def promise_race() -> Wrong:
    broken = core.promise_litmus(100_000)
    return [f"{broken} promises named a round as not started that was"] if broken else []


def death_between_dispatch_and_combine(in_round: int = 6, num_rounds: int = 12) -> Wrong:
    """A rank dies and the view without it is installed while round r is open: r must keep the members it began with."""
    config = small()
    work = Work(config, 4)

    def between(buffer: Buffer, number: int) -> None:
        deadline = time.monotonic() + 5
        while number == in_round and buffer.rank != 2 and buffer.view.epoch == 0 and time.monotonic() < deadline:
            time.sleep(0.001)

    with VirtualRanks(4, config, poison=True) as ranks:
        ranks.buffers[2].arm("dispatch.taken", in_round, "crash")
        tallies = run_checked(ranks, work, num_rounds, between=between)
        return corrupt(tallies) + one_view_per_round(ranks, work, tallies)


def late_rank() -> Wrong:
    """Nobody dies; one rank is late to a round. What stands in its words is two rounds old."""
    config = small()
    work = Work(config, 3)
    with VirtualRanks(3, config, poison=True) as ranks:
        ranks.buffers[1].arm("dispatch.gate", 4, "sleep_us", 50_000)
        ranks.buffers[2].arm("combine.begin", 6, "sleep_us", 50_000)
        tallies = run_checked(ranks, work, 10)
        return corrupt(tallies) + lost_between_live(ranks, work, tallies, set())


def overtaken_rank_catches_up(scale: int = 1) -> Wrong:
    """As overtaken, and it must end: the slow rank finds later rounds in its words."""
    config = small(stall_ms=60 * scale, link_ms=60_000, settle_ms=60_000, num_max_tokens_per_rank=16)
    work = Work(config, 2)
    with VirtualRanks(2, config) as ranks:
        # Before it waits for round 3's dispatch: by the time it looks, rank 0 has gone on and its words are later ones.
        ranks.buffers[1].arm("dispatch.wait", 3, "sleep_us", 300_000 * scale)
        ranks.buffers[1].set_timeouts(0, stall_ms=60_000)
        done: dict[int, Tally] = {}

        def one(rank: int, rounds: int) -> None:
            done[rank] = Checker(ranks.buffers[rank], work).run(rounds)

        threads = [
            threading.Thread(target=one, args=(0, 40), daemon=True),
            threading.Thread(target=one, args=(1, 6), daemon=True),
        ]
        for thread in threads:
            thread.start()
        threads[1].join(2.5 * scale)
        wrong = [] if 1 in done else ["the overtaken rank still waits"]
        for buffer in ranks.buffers:
            buffer.close()
        for thread in threads:
            thread.join(10)
        return wrong


def late_chunks() -> Wrong:
    """Nobody dies. One rank's chunks come late, and one rank copies them late: streams wait at every chunk."""
    config = small(num_max_tokens_per_rank=40, num_chunk_tokens=4)
    work = Work(config, 3)
    with VirtualRanks(3, config, poison=True) as ranks:
        for skip in (2, 4):
            ranks.buffers[1].arm("dispatch.chunk", 3, "sleep_us", 30_000, skip=skip)
            ranks.buffers[1].arm("combine.chunk", 4, "sleep_us", 30_000, skip=skip)
            ranks.buffers[2].arm("dispatch.chunk_taken", 3, "sleep_us", 30_000, skip=skip)
            ranks.buffers[2].arm("combine.chunk_taken", 4, "sleep_us", 30_000, skip=skip)
        tallies = run_checked(ranks, work, 6)
        return corrupt(tallies) + lost_between_live(ranks, work, tallies, set())


def crossed_orders(patience_s: float = 2.5, stall_ms: int = 300) -> Wrong:
    """Rank 0 dispatches round r + 1 before it combines round r, rank 1 the other way round: each waits for the other,
    alive and ticking. No call may wait for ever."""
    config = small(stall_ms=stall_ms)
    work = Work(config, 2)
    with VirtualRanks(2, config) as ranks:
        ended: set[int] = set()

        def one(buffer: Buffer) -> None:
            checker = Checker(buffer, work)
            received, handle = checker.dispatch(1)
            try:
                if buffer.rank == 0:
                    checker.dispatch(2)
                checker.combine(received, handle, 1)
            except FaultA2AError:
                pass
            ended.add(buffer.rank)

        threads = [threading.Thread(target=one, args=(buffer,), daemon=True) for buffer in ranks.buffers]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + patience_s
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))
        wrong = [f"rank {rank} still waits" for rank in range(2) if rank not in ended]
        for buffer in ranks.buffers:
            buffer.close()
        for thread in threads:
            thread.join(10)
        return wrong


def third_round() -> Wrong:
    config = small()
    work = Work(config, 1)
    with VirtualRanks(1, config) as ranks:
        buffer = ranks.buffers[0]
        handles = [buffer.dispatch(*work.tokens(0, 1))[1], buffer.dispatch(*work.tokens(0, 2))[1]]
        try:
            buffer.dispatch(*work.tokens(0, 3))
        except RuntimeError as error:
            for handle in handles:
                buffer.abandon(handle)
            return [] if "two rounds are open" in str(error) else [str(error)]
        return ["a third round was opened"]


def lying(*lies: str, from_round: int = 4, wait_ms: int = 60_000, stall_ms: int = 30_000) -> Wrong:
    """Rank 1 writes wrong numbers. Nobody crashes, no wrong row is taken, and nobody honest is suspected."""
    config = small(num_topk=4, link_ms=wait_ms, stall_ms=stall_ms)
    work = Work(config, 3)
    with VirtualRanks(3, config, poison=True) as ranks:
        ranks.buffers[1].core.set_faults(
            {"lies": sum(LIES[lie] for lie in lies), "lies_from_round": from_round, "seed": 7}
        )
        tallies = run_checked(ranks, work, 10)
        wrong = corrupt([tallies[0], tallies[2]]) + [str(found) for found in suspicions_of(ranks, {0, 2})]
        # Its own accusations of those who refuse it are its business; it was honest enough to be answered.
        wrong += [f"the liar had no answer: {e}" for e in ranks.buffers[1].evidence() if e.kind in ("link", "stall")]
        refused = sum(ranks.buffers[rank].core.stats()["num_rejected"] for rank in (0, 2))
        if refused == 0 and set(lies) & {"count", "expert", "choice", "num_choices", "twice", "claims"}:
            wrong.append("a wrong number was believed")
        if ranks.buffers[1].core.num_faults() == 0:
            wrong.append("no lie was told: the scenario shows nothing")
        return wrong + lost_between_live(ranks, work, [tallies[0], tallies[2]], {1})


def old_epoch() -> Wrong:
    """Rank 1 signs with the epoch before: its rows must not be taken."""
    config = small()
    work = Work(config, 3)
    with VirtualRanks(3, config, first_epoch=256) as ranks:
        ranks.buffers[1].core.set_faults({"lies": LIES["old_epoch"], "lies_from_round": 4})
        taken: list[int] = []

        def one(buffer: Buffer) -> Tally:
            checker = Checker(buffer, work)
            for number in range(1, 8):
                received, handle = checker.dispatch(number)
                if buffer.rank == 0 and number >= 4 and 1 in handle.sources()[:, 2].tolist():
                    taken.append(number)
                checker.combine(received, handle, number)
            return checker.tally

        raised(ranks.run(one))
        return [f"round {number}: rows signed in another view were taken" for number in taken]


def foreign_incarnation() -> Wrong:
    """Rank 0's partition for rank 1 belongs to another life of rank 1 than the view names."""
    config = small()
    work = Work(config, 3)
    with VirtualRanks(3, config) as ranks:
        ranks.buffers[0].core.set_partition_incarnation(1, 12345)
        tallies = run_checked(ranks, work, 4)
        placement = ranks.buffers[0].placement
        idx = {number: work.tokens(0, number)[1] for number in tallies[0].outcomes}
        return [
            f"round {number}: a row of a foreign incarnation was taken"
            for number, codes in tallies[0].outcomes.items()
            for expert in idx[number][codes == reference.DELIVERED].tolist()
            if placement.expert_rank[expert] == 1
        ]


def waiting_longer_than_a_stall(scale: int = 1) -> Wrong:
    """Rank 2's rows reach rank 0 and not rank 1, then it stops as a process does: no beat, no tick, no exit. Rank 1
    waits for it longer than a stall lasts, and rank 0 waits for rank 1 all that time."""
    config = small(silence_ms=700 * scale, stall_ms=300 * scale, num_experts=6)
    work = Work(config, 3)
    with VirtualRanks(3, config) as ranks:
        ranks.buffers[0].set_timeouts(2, stall_ms=60_000)
        ranks.buffers[1].set_timeouts(2, stall_ms=60_000)
        ranks.buffers[2].arm("dispatch.half_signalled", 4, "sleep_us", 1_500_000 * scale)
        ranks.buffers[2].arm("dispatch.rows_sent", 4, "sleep_us", 1)

        def one(buffer: Buffer) -> Tally:
            checker = Checker(buffer, work)
            checker.run(3)
            if buffer.rank == 2:
                buffer.core.pause_pulse(1500 * scale)
            return checker.run(5)

        tallies = raised(ranks.run(one))
        return corrupt(tallies) + [str(found) for found in suspicions_of(ranks, {0, 1})]


def long_compute() -> Wrong:
    """A rank computes for several silence timeouts while others wait for it."""
    config = small(silence_ms=100, beat_ms=10)
    work = Work(config, 3)
    with VirtualRanks(3, config) as ranks:
        ranks.buffers[1].arm("combine.begin", 3, "sleep_us", 450_000)
        tallies = run_checked(ranks, work, 6)
        return corrupt(tallies) + [str(found) for found in suspicions_of(ranks, {0, 1, 2})]


def everybody_slept() -> Wrong:
    """The whole host stands still for longer than a silence timeout; who wakes first finds only old beats."""
    config = small(silence_ms=200, beat_ms=10)
    work = Work(config, 3)
    with VirtualRanks(3, config) as ranks:
        ranks.buffers[1].arm("combine.begin", 3, "sleep_us", 700_000)

        def one(buffer: Buffer) -> Tally:
            checker = Checker(buffer, work)
            checker.run(1)
            if buffer.rank == 0:
                time.sleep(0.1)  # it waits for rank 1 by now
                buffer.core.pause_pulse(300)
            else:
                time.sleep(0.05)
                buffer.core.pause_pulse(400)
            return checker.run(5)

        tallies = raised(ranks.run(one))
        return corrupt(tallies) + [str(found) for found in suspicions_of(ranks, {0, 1, 2})]


def idle_group() -> Wrong:
    """Nobody is in a round and a rank stands still for a while."""
    config = small(silence_ms=100, beat_ms=10)
    work = Work(config, 3)
    with VirtualRanks(3, config) as ranks:
        run_checked(ranks, work, 2)
        ranks.buffers[1].core.pause_pulse(400)
        time.sleep(0.5)
        tallies = run_checked(ranks, work, 2)
        return corrupt(tallies) + [str(found) for found in suspicions_of(ranks, {0, 1, 2})]


def evicted_while_waiting() -> Wrong:
    """A rank stops, is evicted, wakes and waits for peers that no longer speak to it: its call must end."""
    config = small(silence_ms=150, link_ms=1500, stall_ms=60_000)
    work = Work(config, 3)
    with VirtualRanks(3, config) as ranks:
        # Its kernels wake before its native thread does, so they wait in a later round when the eviction is learned.
        ranks.buffers[2].arm("dispatch.rows_sent", 3, "sleep_us", 500_000)
        woken = [0.0]

        def one(buffer: Buffer) -> Tally:
            checker = Checker(buffer, work)
            checker.run(2)
            if buffer.rank == 2:
                buffer.core.pause_pulse(900)
            tally = checker.run(10)
            if buffer.rank == 2:
                woken[0] = time.monotonic()
            return tally

        started = time.monotonic()
        tallies = raised(ranks.run(one))
        wrong = corrupt(tallies[:2])
        if not isinstance(tallies[2].error, RankEvictedError):
            wrong.append(f"the evicted rank was told {tallies[2].error!r}")
        if woken[0] - started > 2.0:
            wrong.append(f"the evicted rank's call ended after {woken[0] - started:.1f} s")
        return wrong


def evictions(seed: int, num_ranks: int = 8, two_open: bool = True) -> tuple[Wrong, int]:
    """Free-running ranks die one after the other until two are left. Returns what went wrong, and how many died."""
    generator = torch.Generator().manual_seed(seed)
    config = small(hidden=8, num_max_tokens_per_rank=2)
    work = Work(config, num_ranks, seed=seed)
    order = torch.randperm(num_ranks, generator=generator).tolist()[: num_ranks - 2]
    places = phases()
    number = 2
    with VirtualRanks(num_ranks, config, poison=True) as ranks:
        for victim in order:
            number += 1 + int(torch.randint(4, [1], generator=generator))
            phase = places[int(torch.randint(len(places), [1], generator=generator))]
            ranks.buffers[victim].arm(phase, number, "crash")
        run = run_two_open if two_open else run_checked
        tallies = run(ranks, work, number + 8)
        dead = set(order)
        wrong = corrupt(tallies) + one_view_per_round(ranks, work, tallies)
        wrong += lost_between_live(ranks, work, tallies, dead)
        wrong += [str(found) for found in suspicions_of(ranks, set(range(num_ranks)) - dead)]
        for tally in tallies:
            if tally.rank not in dead and (tally.error or tally.rounds != number + 8):
                wrong.append(f"survivor {tally.rank} ended after {tally.rounds} rounds: {tally.error}")
        return [f"seed {seed}: {text}" for text in wrong], len(order)


def streamed_rows() -> Wrong:
    """One thread stores rows past the cache and signals; another looks at each as soon as it sees the signal."""
    num_torn = core.torn_streamed_rows(num_rounds=10_000, num_bytes=14336)
    return [f"{num_torn} rows were announced before they were there"] if num_torn else []
