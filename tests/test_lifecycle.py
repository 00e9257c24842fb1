"""A buffer from construction to close: who is missing, who differs, and who leaves while others wait."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fault_a2a import reference
from fault_a2a.buffer import Buffer
from fault_a2a.config import Config
from fault_a2a.errors import ClosedError, ConstructError
from fault_a2a.group import Group
from fault_a2a.membership import MembershipThread, View
from fault_a2a.placement import Placement
from fault_a2a.testing.virtual import LocalFabric, VirtualRanks, run_threads
from tests.rig import Checker, Tally, Work

SOON_S = 5.0  # generous: the machine may be loaded. Nothing below waits for a timeout of the group.


pytestmark = pytest.mark.usefixtures("one_thread")


def config_of(**changes: object) -> Config:
    fields: dict = {"num_experts": 7, "hidden": 16, "num_topk": 2, "num_max_tokens_per_rank": 4, "settle_ms": 5}
    return Config(**{**fields, **changes})


def tokens_of(config: Config) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return Work(config, 3).tokens(0, 0)


def check_works(ranks: VirtualRanks, members: list[int], num_rounds: int = 3) -> list[Tally]:
    work = Work(ranks.config, len(ranks.buffers), seed=5)
    tallies = ranks.run(lambda buffer: Checker(buffer, work).run(num_rounds), members)
    for tally in tallies:
        assert isinstance(tally, Tally), tally
        assert (tally.error, tally.corrupt, tally.rounds) == (None, [], num_rounds)
    return tallies


def until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SOON_S
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


def background(call: Callable[[], Any]) -> tuple[threading.Thread, list]:
    """The result, or the error, stands in the list once the thread has ended."""
    results: list = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


def ended(thread: threading.Thread, results: list) -> Any:
    thread.join(SOON_S)
    assert not thread.is_alive(), "the call did not return"
    return results[0]


# --- close


def test_use_after_close() -> None:
    config = config_of()
    with VirtualRanks(1, config) as ranks:
        buffer = ranks.buffers[0]
        received, handle = buffer.dispatch(*tokens_of(config))
        buffer.close()
        for call in (
            lambda: buffer.dispatch(*tokens_of(config)),
            lambda: buffer.combine(received.x, handle),
            lambda: buffer.abandon(handle),
            lambda: torch.ops.fault_a2a.dispatch(*tokens_of(config), buffer.id),
        ):
            with pytest.raises(ClosedError, match=r"buffer is closed.*rejoin\(\).*only together with all other ranks"):
                call()
        # What it knows it still tells.
        assert buffer.view.active_ranks == (0,)
        assert len(buffer.views()) == 1
        assert (buffer.evidence(), buffer.num_rounds) == ([], 2)
        assert handle.sources().shape == (0, 5)


def test_close_again_and_again() -> None:
    with VirtualRanks(2, config_of()) as ranks:
        buffer = ranks.buffers[1]
        began = time.monotonic()
        run_threads([buffer.close] * 8, timeout_s=SOON_S)
        buffer.close()
        with buffer:
            pass
        assert time.monotonic() - began < SOON_S


def test_close_waits_for_no_period_of_a_thread() -> None:
    """The thread that listens for view changes is woken by the leave, and does not fall asleep again after it."""
    with VirtualRanks(2, config_of()) as ranks:
        core = ranks.buffers[0].core
        listener = threading.Thread(target=core.next_proposal, args=(60_000,), daemon=True)
        listener.start()
        time.sleep(0.05)
        core.close()
        listener.join(SOON_S)
        assert not listener.is_alive(), "the leave woke nobody"
        began = time.monotonic()
        assert core.next_proposal(60_000) is None
        assert core.is_leaving()
        assert time.monotonic() - began < SOON_S


class EndpointThatEnds:
    """A view is installed, and the life is over, in one wait of the thread that tells of views."""

    def __init__(self) -> None:
        self._views = [self._view(4, [0, 1])]
        self._is_over = False

    def _view(self, epoch: int, active: list[int]) -> tuple[dict[str, Any], int]:
        return {"epoch": epoch, "active": active, "incarnations": [0, 1], "first_round": epoch, "reason": ""}, 0

    def views(self, from_epoch: int = 0) -> list[tuple[dict[str, Any], int]]:
        return [one for one in self._views if one[0]["epoch"] >= from_epoch]

    def evidence(self, num_known: int = 0) -> list[tuple[int, str, int]]:
        return []

    def is_leaving(self) -> bool:
        return self._is_over

    def next_proposal(self, _: int) -> None:
        self._views.append(self._view(5, [0]))
        self._is_over = True


@pytest.mark.parametrize("joined, expected", [(True, [4, 5]), (False, [5])])
def test_callbacks_hear_of_every_view_of_a_life_that_ends_at_once(joined: bool, expected: list[int]) -> None:
    """Guard: the last telling of the thread, after its loop. An evicted rank that comes back at once gave up its life
    within the thread's last wait, and heard neither of the view that let it in nor of its eviction."""
    heard: list[View] = []
    MembershipThread(EndpointThatEnds(), None, 1, [heard.append], joined)._thread.join(SOON_S)
    assert [view.epoch for view in heard] == expected


def test_leaving_the_with_block_closes() -> None:
    config = config_of()
    with VirtualRanks(1, config) as ranks:
        with ranks.buffers[0] as buffer:
            buffer.abandon(buffer.dispatch(*tokens_of(config))[1])
        with pytest.raises(ClosedError):
            buffer.dispatch(*tokens_of(config))


@pytest.mark.parametrize("verb", ["dispatch", "combine"])
def test_close_while_this_rank_waits(verb: str) -> None:
    """From another thread: the call that waits ends at once, and so does close."""
    config = config_of()
    with VirtualRanks(2, config) as ranks:
        waiter, other = ranks.buffers
        if verb == "combine":
            (received, handle), _ = ranks.run(lambda buffer: buffer.dispatch(*tokens_of(config)))
            waiting = background(lambda: waiter.combine(received.x, handle))
        else:
            waiting = background(lambda: waiter.dispatch(*tokens_of(config)))
        time.sleep(0.05)
        assert waiting[0].is_alive(), "the peer did nothing, so this must wait"
        began = time.monotonic()
        waiter.close()
        assert isinstance(ended(*waiting), ClosedError)
        assert time.monotonic() - began < SOON_S
        until(lambda: other.view.active_ranks == (1,), "who left is no member")
        assert {one.kind for one in other.evidence()} == {"left"}


@pytest.mark.parametrize("when", ["before", "in the round"])
def test_close_while_peers_wait(when: str) -> None:
    """Peers that wait for the one who closes go on at once: lost in an open round, unroutable ever after."""
    config = config_of()
    work = Work(config, 3, seed=3)

    def one(buffer: Buffer) -> Tally:
        checker, number = Checker(buffer, work), buffer.num_rounds
        if buffer.rank == 1 and when == "before":
            time.sleep(0.05)
            buffer.close()
            return checker.tally
        received, handle = checker.dispatch(number)
        if buffer.rank == 1:
            time.sleep(0.05)
            buffer.close()
            return checker.tally
        began = time.monotonic()
        outcome = checker.combine(received, handle, number)
        assert time.monotonic() - began < SOON_S
        lost = reference.outcome_codes(work.tokens(buffer.rank, number)[1], buffer.placement, [1, 1, 1], {1})
        assert when == "before" or torch.equal(outcome.codes, lost)
        return checker.tally

    with VirtualRanks(3, config) as ranks:
        for tally in ranks.run(one):
            assert isinstance(tally, Tally), tally
            assert tally.corrupt == []
        for rank in (0, 2):
            until(lambda rank=rank: ranks.buffers[rank].view.active_ranks == (0, 2), "who left is no member")
            assert {(one.rank, one.kind) for one in ranks.buffers[rank].evidence()} == {(1, "left")}
        tallies = check_works(ranks, [0, 2])
        assert sum(tally.lost for tally in tallies) == 0 < sum(tally.unroutable for tally in tallies)


def test_who_asks_again_is_told_what_is_new() -> None:
    """Whoever looks five times a second would otherwise copy all that ever was, each time."""
    with VirtualRanks(3, config_of()) as ranks:
        watcher = ranks.buffers[0]
        for num_gone, gone in ((1, 2), (2, 1)):
            ranks.buffers[gone].close()
            until(lambda num_gone=num_gone: watcher.view.epoch >= num_gone, "who left is no member")
        views, evidence = watcher.views(), watcher.evidence()
        assert [view.epoch for view, _ in views] == [0, 1, 2]
        assert [view.active_ranks for view, _ in views] == [(0, 1, 2), (0, 1), (0,)]
        assert views[-1][0] == watcher.view and views[0][1] < views[1][1] < views[2][1]
        assert [watcher.views(from_epoch) for from_epoch in range(4)] == [views, views[1:], views[2:], []]
        assert [(one.rank, one.kind) for one in evidence] == [(2, "left"), (1, "left")]
        assert [watcher.evidence(num_known) for num_known in (0, 1, 2, 9)] == [evidence, evidence[1:], [], []]


def test_all_close_at_once_with_open_rounds() -> None:
    config = config_of()
    with VirtualRanks(4, config) as ranks:
        ranks.run(lambda buffer: [buffer.dispatch(*tokens_of(config)) for _ in range(2)])
        began = time.monotonic()
        run_threads([buffer.close for buffer in ranks.buffers], timeout_s=SOON_S)
        assert time.monotonic() - began < SOON_S


def test_dropped_buffer_leaves() -> None:
    """Nobody closed it and nobody can any more; its threads must not keep its place in the group."""
    with VirtualRanks(2, config_of()) as ranks:
        dropped = weakref.ref(ranks.buffers.pop())
        gc.collect()
        assert dropped() is None
        until(lambda: ranks.buffers[0].view.active_ranks == (0,), "who was dropped is no member")
        assert {one.kind for one in ranks.buffers[0].evidence()} == {"left"}


LEAVE_IT_OPEN = """
import sys, threading
import torch, torch.distributed as dist
import fault_a2a

def buffer():
    config = fault_a2a.Config(num_experts=2, hidden=8, num_topk=1, num_max_tokens_per_rank=1)
    return fault_a2a.Buffer(fault_a2a.Group(dist.HashStore(), 0, 1), config)

kept, dropped = buffer(), buffer()
kept.dispatch(torch.ones(1, 8).bfloat16(), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
del dropped
sys.exit(7)
"""


def test_process_that_ends_without_closing() -> None:
    """Its native threads must be gone before the interpreter is."""
    done = subprocess.run([sys.executable, "-c", LEAVE_IT_OPEN], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (7, "")


# --- callbacks


def test_callback_that_fails_does_not_end_the_views(caplog: pytest.LogCaptureFixture) -> None:
    """The thread that calls it also carries this rank's proposals: rank 0 must propose twice."""
    seen: list[View] = []

    def fails(view: View) -> None:
        raise KeyError("the engine's own mistake")

    with VirtualRanks(3, config_of()) as ranks, caplog.at_level(logging.ERROR):
        ranks.buffers[0].on_view_change(fails)
        ranks.buffers[0].on_view_change(seen.append)
        for leaving, left in ((2, (0, 1)), (1, (0,))):
            ranks.buffers[leaving].close()
            check_works(ranks, list(left))
            until(lambda left=left: bool(seen) and seen[-1].active_ranks == left, "the callback was not called")
    assert [view.epoch for view in seen] == [1, 2]
    assert "the engine's own mistake" in caplog.text


def test_close_inside_a_callback() -> None:
    config = config_of()
    with VirtualRanks(2, config) as ranks:
        buffer, other = ranks.buffers
        closed = threading.Event()
        buffer.on_view_change(lambda view: (buffer.close(), closed.set()))
        other.close()
        waiting = background(lambda: [buffer.abandon(buffer.dispatch(*tokens_of(config))[1]) for _ in range(10000)])
        assert closed.wait(SOON_S)
        assert isinstance(ended(*waiting), ClosedError)


# --- construction


def groups_of(num_ranks: int, name: str = "default") -> list[Group]:
    store, fabric = dist.HashStore(), LocalFabric()
    return [Group(store, rank, num_ranks, name, fabric) for rank in range(num_ranks)]


def construct(groups: list[Group], configs: list[Config]) -> list[Any]:
    """Buffers, or the errors in their place."""
    calls = [partial(Buffer, group, config) for group, config in zip(groups, configs, strict=True)]
    return run_threads(calls, keep_errors=True, timeout_s=2 * SOON_S)


def close_all(buffers: list[Buffer]) -> None:
    for buffer in buffers:
        buffer.close()


def test_missing_rank_is_named() -> None:
    groups = groups_of(4, "night shift")
    began = time.monotonic()
    errors = construct([groups[0], groups[2]], [config_of(construct_timeout_ms=500)] * 2)
    assert 0.5 <= time.monotonic() - began < SOON_S
    for error in errors:
        assert isinstance(error, ConstructError), error
        assert "ranks [1, 3]" in str(error)
        assert "night shift" in str(error)
        assert "construct_timeout_ms" in str(error)


def test_second_attempt_after_a_missing_rank() -> None:
    groups = groups_of(2)
    assert isinstance(construct(groups[:1], [config_of(construct_timeout_ms=100)])[0], ConstructError)
    buffers = construct(groups, [config_of()] * 2)
    assert all(isinstance(buffer, Buffer) for buffer in buffers), buffers
    close_all(buffers)


OTHER_CONFIGS: dict[str, tuple[dict, list[str]]] = {
    "hidden": ({"hidden": 32}, ["hidden is 32", "16 here"]),
    "dtype": ({"dtype": torch.float32}, ["dtype is torch.float32", "torch.bfloat16 here"]),
    "dtype, same bytes": ({"dtype": torch.float32, "hidden": 8}, ["hidden is 8"]),
    "num_experts": ({"num_experts": 9}, ["num_experts is 9"]),
    "num_topk": ({"num_topk": 3}, ["num_topk is 3"]),
    "tokens": ({"num_max_tokens_per_rank": 5}, ["num_max_tokens_per_rank is 5", "4 here"]),
    "reduce": ({"reduce": "expert"}, ["reduce is expert", "owner here"]),
    "on_lost": ({"on_lost": "renormalize"}, ["on_lost is renormalize", "drop here"]),
    "recv_format": ({"recv_format": "packed"}, ["recv_format is packed", "batched here"]),
    "silence_ms": ({"silence_ms": 1000}, ["silence_ms is 1000", "2000 here"]),
    "spare": ({"num_spare_partitions": 2}, ["num_spare_partitions is 2", "1 here"]),
    "placement": ({"placement": [0, 1, 2, 0, 1, 2, 0]}, ["placement is"]),
}


@pytest.mark.parametrize("name", OTHER_CONFIGS)
def test_other_config_on_one_rank_is_named(name: str) -> None:
    changes, words = OTHER_CONFIGS[name]
    began = time.monotonic()
    errors = construct(groups_of(3), [config_of(), config_of(), config_of(**changes)])
    assert time.monotonic() - began < SOON_S, "it is known at once"
    for rank, error in enumerate(errors):
        assert isinstance(error, ConstructError), error
        assert ("ranks [2]" if rank < 2 else "ranks [0, 1]") in str(error)
        assert "same Config" in str(error)
    for word in words:
        assert word in str(errors[0]), errors[0]


def test_configs_that_mean_the_same() -> None:
    """The same placement in other words, and another patience, are no difference."""
    contiguous = Placement.contiguous(7, 2)
    configs = [config_of(), config_of(placement=contiguous.expert_rank, construct_timeout_ms=9000)]
    buffers = construct(groups_of(2), configs)
    assert all(isinstance(buffer, Buffer) for buffer in buffers), buffers
    close_all(buffers)


def test_other_group_size_on_one_rank_is_named() -> None:
    store, fabric = dist.HashStore(), LocalFabric()
    groups = [Group(store, 0, 2, fabric=fabric), Group(store, 1, 3, fabric=fabric)]
    errors = construct(groups, [config_of(construct_timeout_ms=300)] * 2)
    assert all(isinstance(error, ConstructError) for error in errors), errors
    assert "ranks [1]" in str(errors[0])


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ((7, config_of()), TypeError, "group is a int; give a fault_a2a.Group, a"),
        ((None, config_of()), TypeError, "group is a NoneType; give"),
        ((groups_of(1)[0], {"hidden": 8}), TypeError, "config is a dict; give a fault_a2a.Config"),
        ((groups_of(1)[0], config_of(placement=[0, 1, 0, 0, 0, 0, 0])), ValueError, "expert_rank.*pass ranks from 0"),
        ((groups_of(1)[0], config_of(placement=Placement([0] * 7, 2))), ValueError, "made for 2 ranks.*pass"),
    ],
)
def test_what_is_no_group_and_no_config(arguments: tuple, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        Buffer(*arguments)


@pytest.mark.parametrize(("rank", "num_ranks"), [(0, 0), (1, 1), (-1, 2), (0, 1025)])
def test_group_of_no_such_size(rank: int, num_ranks: int) -> None:
    with pytest.raises(ValueError, match="give a number from"):
        Group(dist.HashStore(), rank, num_ranks)


# --- groups and stores


def check_alone(buffer: Buffer) -> None:
    tally = Checker(buffer, Work(buffer.config, 1, seed=8)).run(2)
    assert (tally.error, tally.corrupt, tally.lost, tally.rounds) == (None, [], 0, 2)


@pytest.fixture
def process_group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_process_group(process_group: dist.ProcessGroup) -> None:
    """A group of torch.distributed will do, for as many buffers as one likes: they do not meet each other's keys."""
    config = config_of(num_max_tokens_per_rank=4)
    first = Buffer(process_group, config)
    second = Buffer(process_group, config_of(hidden=24))
    assert (first.rank, first.num_ranks) == (0, 1)
    for buffer in (first, second, first):
        check_alone(buffer)
    first.close()
    third = Buffer(dist.new_group([0]), config)
    check_alone(third)
    close_all([second, third])


def test_second_buffer_on_one_group() -> None:
    """The first one's death must not be the second one's history: both vote on epoch 1 in the same store."""
    store = dist.HashStore()
    for number in range(3):
        fabric = LocalFabric()
        groups = [Group(store, rank, 3, fabric=fabric) for rank in range(3)]
        buffers = construct(groups, [config_of()] * 3)
        assert all(isinstance(buffer, Buffer) for buffer in buffers), buffers
        assert all(buffer.view.epoch == 0 for buffer in buffers)
        buffers[number].close()
        rest = [buffer for buffer in buffers if buffer.rank != number]
        work = Work(config_of(), 3)
        run_threads([partial(Checker(buffer, work).run, 2) for buffer in rest], timeout_s=SOON_S)
        for buffer in rest:
            until(lambda b=buffer: b.view.epoch > 0, "the death was not agreed on")
            assert buffer.view.active_ranks == tuple(rank for rank in range(3) if rank != number), buffer.view
        close_all(rest)
