"""Accidents on purpose in small collectives: each returns what went wrong in it, which must be nothing."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import partial

import torch

from fault_a2a.buffer import Buffer
from fault_a2a.core_fields import collective_phases
from fault_a2a.errors import FaultA2AError, QuorumLostError
from fault_a2a.testing.virtual import VirtualRanks
from tests.process_rounds import small as small_for
from tests.processes import Here, Ranks
from tests.rig import Checker, Work, raised, suspicions_of
from tests.scenarios import Wrong, small


@dataclass
class Heard:
    """What one rank was told: by the number of the collective its bytes and contributors."""

    rank: int
    answers: dict[int, tuple[torch.Tensor, list[int]]] = field(default_factory=dict)
    error: Exception | None = None


def contribution(rank: int, number: int, num_elements: int = 5) -> torch.Tensor:
    """No two of them are alike, so nobody's can pass for another's, or for the one before."""
    return torch.arange(num_elements) + 1000 * rank + 1_000_000 * (number + 1)


def gather(buffer: Buffer, num_collectives: int, num_elements: int = 5) -> Heard:
    """So many collectives from the first one on; stops where this rank may not go on."""
    heard = Heard(buffer.rank)
    try:
        for number in range(num_collectives):
            out, contributions = buffer.all_gather(contribution(buffer.rank, number, num_elements))
            ranks = contributions.contributed.nonzero()[:, 0].tolist()
            heard.answers[number] = (out, ranks)
    except FaultA2AError as error:
        heard.error = error
    return heard


def differences(everybody: list[Heard], dead: set[int], num_collectives: int) -> Wrong:
    """All who return from a collective return the same; what they return is what its contributors gave."""
    wrong = []
    alive = [heard for heard in everybody if heard.rank not in dead]
    for heard in alive:
        if len(heard.answers) != num_collectives:
            wrong.append(f"rank {heard.rank} returned from {len(heard.answers)} collectives and raised {heard.error!r}")
    for number in range(num_collectives):
        answers = {heard.rank: heard.answers[number] for heard in everybody if number in heard.answers}
        for rank, (out, ranks) in answers.items():
            first_out, first_ranks = next(iter(answers.values()))
            if ranks != first_ranks or not torch.equal(out, first_out):
                wrong.append(f"collective {number}: rank {rank} has {ranks}, another has {first_ranks}")
            for src in range(len(everybody)):
                given = contribution(src, number, out.shape[1])
                if not torch.equal(out[src], given if src in ranks else torch.zeros_like(given)):
                    wrong.append(f"collective {number}: rank {rank} has wrong bytes of rank {src}")
            missing = {heard.rank for heard in alive} - set(ranks)
            if missing:
                wrong.append(f"collective {number}: live ranks {sorted(missing)} are not in the answer of rank {rank}")
    return wrong


def deaths(seed: int) -> Wrong:
    """One or two of up to seven free-running ranks die at any points of collectives, with naps anywhere."""
    chance = random.Random(seed)
    num_ranks, num_collectives = chance.randint(2, 7), 6
    victims = chance.sample(range(num_ranks), 1 if num_ranks < 4 else chance.randint(1, 2))
    phases = collective_phases()
    config = small()
    with VirtualRanks(num_ranks, config, poison=True) as ranks:
        for victim in victims:
            ranks.buffers[victim].arm(chance.choice(phases), chance.randrange(num_collectives), "crash")
        for _ in range(chance.randint(0, 3)):
            sleeper = chance.choice(ranks.buffers)
            number = chance.randrange(num_collectives)
            sleeper.arm(chance.choice(phases), number, "sleep_us", chance.choice([500, 3000, 20_000]))
        everybody = ranks.run(lambda buffer: gather(buffer, num_collectives))
        wrong = differences(everybody, set(victims), num_collectives)
        innocent = set(range(num_ranks)) - set(victims)
        return wrong + [f"a live rank was suspected: {one}" for one in suspicions_of(ranks, innocent)]


def half_heard(phase: str) -> Wrong:
    """Rank 3 of four dies when half have what it has to give or to say: the others must come to one answer."""
    with VirtualRanks(4, small(), poison=True) as ranks:
        # Rank 2 looks at ranks 0 and 1 before they have returned; and they return before the death is seen.
        for rank in (0, 1):
            ranks.buffers[rank].arm("collective.said", 2, "sleep_us", 30_000)
        ranks.buffers[3].arm(phase, 2, "sleep_us", 100_000)
        ranks.buffers[3].arm(phase, 2, "crash")
        return differences(ranks.run(lambda buffer: gather(buffer, 5)), {3}, 5)


def smaller_set_of_the_dead() -> Wrong:
    """Rank 3 dies before rank 0 has its bytes. Rank 0, which goes on without them, dies when only rank 1 could hear
    that; and rank 1 sleeps so long that the others settle in a view without rank 0."""
    with VirtualRanks(5, small(), poison=True) as ranks:
        ranks.buffers[3].core.set_faults({"cut": [0]})
        ranks.buffers[3].arm("collective.contributed", 0, "crash")
        ranks.buffers[0].arm("collective.half_said", 0, "crash")
        ranks.buffers[1].arm("collective.said", 0, "sleep_us", 600_000)
        return differences(ranks.run(lambda buffer: gather(buffer, 2)), {0, 3}, 2)


def beside_rounds(num_turns: int = 6) -> Wrong:
    """A death in the middle of turns of one round and one collective each: both accounts stay exact."""
    config = small()
    work = Work(config, 4)
    with VirtualRanks(4, config, poison=True) as ranks:
        ranks.buffers[2].arm("collective.half_said", 3, "crash")

        def turns(buffer: Buffer) -> tuple[Heard, Wrong]:
            checker, heard = Checker(buffer, work), Heard(buffer.rank)
            try:
                for number in range(num_turns):
                    checker.run(1)
                    out, contributions = buffer.all_gather(contribution(buffer.rank, number))
                    heard.answers[number] = (out, contributions.contributed.nonzero()[:, 0].tolist())
            except FaultA2AError as error:
                heard.error = error
            return heard, checker.tally.corrupt

        results = ranks.run(turns)
        failed = [result for result in results if isinstance(result, BaseException)]
        if failed:
            return [repr(one) for one in failed]
        wrong = differences([heard for heard, _ in results], {2}, num_turns)
        return wrong + [text for _, corrupt in results for text in corrupt]


def quorum_lost(pause_s: float = 2.0) -> Wrong:
    """Rank 2's bytes do not get to rank 1, then ranks 2 to 4 stop. Rank 0 has everybody's bytes and waits to hear what
    rank 1 has, whose call ends for want of a quorum: rank 0's must end as well, and rank 1 is no stalled rank."""
    config = small(silence_ms=200, agreement_timeout_ms=300, stall_ms=600, link_ms=60_000)
    with VirtualRanks(5, config) as ranks:
        ranks.buffers[2].core.set_faults({"cut": [1]})
        for rank in (2, 3, 4):
            ranks.buffers[rank].arm("collective.contributed", 0, "sleep_us", int(pause_s * 1e6))

        def one(buffer: Buffer) -> tuple[Heard, list[str]]:
            if buffer.rank >= 2:
                buffer.core.pause_pulse(int(pause_s * 1000))
            heard = gather(buffer, 1)
            return heard, [str(found) for found in buffer.evidence() if found.rank < 2]

        results = raised(ranks.run(one))[:2]
    wrong = [f"rank {heard.rank}: {found}" for heard, evidence in results for found in evidence]
    return wrong + [
        f"rank {heard.rank} was told {heard.error!r}"
        for heard, _ in results
        if not isinstance(heard.error, QuorumLostError)
    ]


def killed_processes(num_ranks: int, victim: int, phase: str) -> Wrong:
    """SIGKILL of a real process at that phase of its third collective."""
    num_collectives = 6
    task = partial(_gather_here, victim=victim, phase=phase, num_collectives=num_collectives)
    with Ranks(num_ranks, small_for(num_ranks), task) as ranks:
        ranks.killed.add(victim)
        ranks.wait_ready()
        ranks.wait_gone(victim)
        alive = [rank for rank in range(num_ranks) if rank != victim]
        everybody = [ranks.hear(rank) if rank != victim else Heard(victim) for rank in range(num_ranks)]
        ranks.tell("close", alive)
        for rank in alive:
            ranks.result(rank)
    return differences(everybody, {victim}, num_collectives)


def _gather_here(here: Here, victim: int, phase: str, num_collectives: int) -> None:
    buffer = here.open()
    if here.rank == victim:
        buffer.arm(phase, 2, "kill")
    here.say(gather(buffer, num_collectives))
    here.hear()
    buffer.close()
