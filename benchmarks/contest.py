"""Several teams measured in turns (A B C A B C ...), so that a change of the machine's speed meets all of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch.distributed

from .teams import SETTLE, SPLIT, WHOLE, Team, TeamFailedError, check_can_fork, resolve_names_locally
from .work import NUM_BATCHES

# Awake after a stop, a team has cold caches and sleeping threads: its first round is not counted. Dispatch and combine
# are timed with a barrier between them, the pair without one, since no caller puts one there.
TURN = (SETTLE, SPLIT, WHOLE)


@dataclass
class Score:
    """What one team's counted rounds took, in us; ``failure`` says why its times do not count."""

    name: str
    dispatch: list[float] = field(default_factory=list)
    combine: list[float] = field(default_factory=list)
    pair: list[float] = field(default_factory=list)
    failure: str = ""


def run_contest(
    make_teams: Sequence[Callable[[], Team]],
    num_warm_up: int,
    num_iterations: int,
    orders: Sequence[int] = TURN,
    watch: Callable[[int], None] = lambda iteration: None,
    shuffle_seed: int | None = None,
) -> list[Score]:
    """Forks the teams, checks every one, and times them in turns. Every process is gone when it returns or raises.

    A team that fails is ended and has no times; the others go on. With ``shuffle_seed`` the order within an iteration
    is drawn anew, and no team has two turns in a row.

    Raises:
        RuntimeError: this process has several threads, so it cannot fork safely.
    """
    check_can_fork()
    resolve_names_locally()
    teams: list[Team] = []
    try:
        for make_team in make_teams:
            teams.append(make_team())
        # After the forks: the store's server is a thread.
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        scores = [Score(team.name) for team in teams]
        for team, score in zip(teams, scores, strict=True):
            _attempt(team, score, partial(team.build, store.port, NUM_BATCHES))
        order = list(range(len(teams)))
        chance = None if shuffle_seed is None else random.Random(shuffle_seed)
        for iteration in range(-num_warm_up, num_iterations):
            watch(iteration)
            if chance is not None:
                order = next_order(order, chance)
            for team, score in ((teams[i], scores[i]) for i in order):
                if not score.failure:
                    _attempt(team, score, partial(_take_turn, team, score, orders, is_counted=iteration >= 0))
        for team, score in zip(teams, scores, strict=True):
            if score.failure:
                score.dispatch, score.combine, score.pair = [], [], []
            else:
                team.end()
        return scores
    finally:
        for team in teams:
            team.kill()
        _forget_windows(store if len(teams) == len(make_teams) else None, teams)


def next_order(order: Sequence[int], chance: random.Random) -> list[int]:
    """A drawn order that does not begin with the one that was last.

    Not the reverse order every second time (A B C C B A): the team in the middle would be the only one that never has
    two turns in a row, with its rows still in the cache.
    """
    drawn = chance.sample(order, len(order))
    while len(order) > 1 and drawn[0] == order[-1]:
        drawn = chance.sample(order, len(order))
    return drawn


def _take_turn(team: Team, score: Score, orders: Sequence[int], is_counted: bool) -> None:
    times = team.turn(orders)
    if not is_counted:
        return
    score.dispatch += times["dispatch"]
    score.combine += times["combine"]
    score.pair += times["pair"]


def _attempt(team: Team, score: Score, do: Callable[[], None]) -> None:
    try:
        do()
    except TeamFailedError as error:
        score.failure = str(error)
        team.kill()


def _forget_windows(store: torch.distributed.TCPStore | None, teams: Sequence[Team]) -> None:
    """Takes out of /dev/shm what ranks that were killed while they built their windows may have left there."""
    if store is None:
        return
    # Here the forks are over, so the parent may import the package.
    from fault_a2a.group import Group, forget_names

    for team in teams:
        key = f"{team.name}/{Group(store, 0, team.shape.ranks).key('start', 0)}"
        if store.check([key]):
            forget_names(bytes(store.get(key)).decode().split()[1])
