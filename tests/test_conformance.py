"""Dispatch and combine against the reference, bit for bit: formats, shapes and routings, with and without a death.

Windows are filled with NaN before the first round, and so is every row of ``y`` that belongs to no token: a byte that
was read without having been written shows up as NaN in an output.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from fault_a2a import reference
from fault_a2a.buffer import Buffer
from fault_a2a.config import Config
from fault_a2a.core_fields import phases
from fault_a2a.errors import ClosedError
from fault_a2a.rounds import Handle, Outcome, Received
from fault_a2a.testing.virtual import VirtualRanks
from tests.groups import BACKENDS, GroupOf, each_on, on_each
from tests.rig import Checker, Tally, Work, raised, views_agree

Routing = Callable[[Config, int, torch.Tensor, torch.Generator], torch.Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


# --- routings: who chooses what. Each makes topk_idx int64 [num_tokens, num_topk] out of random scores


def uniform(config: Config, num_ranks: int, scores: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    idx = scores.topk(config.num_topk, dim=1).indices
    return idx.masked_fill(torch.rand(idx.shape, generator=generator) < 0.1, -1)


def skewed(config: Config, num_ranks: int, scores: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every token chooses the last expert, at any k."""
    scores[:, -1] = 2.0
    idx = scores.topk(config.num_topk, dim=1).indices
    return idx.gather(1, torch.rand(idx.shape, generator=generator).argsort(dim=1))


def one_rank(config: Config, num_ranks: int, scores: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Only experts of one rank are chosen, as many as it has."""
    local = torch.tensor(config.placement_for(num_ranks).local_experts(0))
    count = min(config.num_topk, len(local))
    idx = torch.full([len(scores), config.num_topk], -1)
    idx[:, :count] = local[scores[:, : len(local)].topk(count, dim=1).indices]
    return idx.gather(1, torch.rand(idx.shape, generator=generator).argsort(dim=1))


def nobody(config: Config, num_ranks: int, scores: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.full([len(scores), config.num_topk], -1)


# Round 1 is the first of a test, and the kind of a round is its number: skewed, uniform, nobody ...
ROUTINGS: tuple[Routing, ...] = (one_rank, skewed, uniform, nobody)

# Rows that a sum must carry through as they are: signs of zero, subnormals, infinities and NaN.
AWKWARD = torch.tensor([0.0, -0.0, 1e-40, -1e-40, float("inf"), float("-inf"), float("nan"), 3e38])


@dataclass(frozen=True)
class RoutedWork(Work):
    """One routing after the other, then a round without any token, then a round of awkward numbers; and again."""

    idx_dtype: torch.dtype = torch.int64
    routings: tuple[Routing, ...] = ROUTINGS

    @property
    def num_kinds(self) -> int:
        return len(self.routings) + 2

    def tokens(self, rank: int, round_number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        config, generator = self.config, self._generator(rank, round_number)
        kind = round_number % self.num_kinds
        num_tokens = config.num_max_tokens_per_rank if self.num_tokens is None else self.num_tokens
        if callable(num_tokens):
            num_tokens = num_tokens(rank, round_number)
        if kind == len(self.routings):
            num_tokens = 0
        x = torch.randn(num_tokens, config.hidden, generator=generator)
        scores = torch.rand(num_tokens, config.num_experts, generator=generator)
        routing = self.routings[kind] if kind < len(self.routings) else uniform
        idx = routing(config, self.num_ranks, scores, generator)
        weights = torch.rand(num_tokens, config.num_topk, generator=generator)
        if kind > len(self.routings):
            places = torch.randint(len(AWKWARD), x.shape, generator=generator)
            x = torch.where(torch.rand(x.shape, generator=generator) < 0.2, AWKWARD[places], x)
            # Weights of either sign whose sum may be zero, and zero itself.
            weights = (weights * 5).floor() / 2 - 1
        return x.to(config.dtype), idx.to(self.idx_dtype), weights

    def expert_rows(self, rows: torch.Tensor, expert: int) -> torch.Tensor:
        return (rows.float() * (1.0 + expert / 8)).to(rows.dtype)


class Strict(Checker):
    """A checker that also knows who must have been heard: everybody but ``victim``, from ``dead_from`` on."""

    def __init__(
        self, buffer: Buffer, work: RoutedWork, victim: int | None = None, dead_from: int = 0, phase: str = ""
    ) -> None:
        """``phase``: at which the victim dies in round ``dead_from``; "" if its view is history by then."""
        super().__init__(buffer, work)
        self.victim, self.dead_from, self.phase = victim, dead_from, phase
        self.num_first_half = buffer.num_ranks // 2

    def is_member(self, round_number: int) -> bool:
        """Whether the victim is in the view of this round: the newest of those that begin there or before."""
        views = [view for view, _ in self.buffer.views() if view.first_round <= round_number]
        return self.victim in max(views, key=lambda view: view.epoch).active_ranks

    def hears_victim(self, round_number: int, half: str) -> bool:
        """Whether the victim's signal got here; at the phase ``half`` it has signalled the first half after itself."""
        if round_number != self.dead_from or not self.phase:
            return round_number < self.dead_from
        place = phases().index(self.phase) - phases().index(half)
        distance = (self.buffer.rank - self.victim) % self.buffer.num_ranks
        return self.is_member(round_number) and (place > 0 or (place == 0 and 1 <= distance <= self.num_first_half))

    def check_received(self, received: Received, handle: Handle, round_number: int) -> None:
        super().check_received(received, handle, round_number)
        config, num_ranks = self.buffer.config, self.buffer.num_ranks
        tokens = [self.work.tokens(src, round_number) for src in range(num_ranks)]
        srcs = set(range(num_ranks))
        if self.victim is not None and not self.hears_victim(round_number, "dispatch.half_signalled"):
            srcs.remove(self.victim)
        expected = reference.dispatch(
            [self.on_the_way(x)[0] for x, _, _ in tokens],
            [idx for _, idx, _ in tokens],
            self.buffer.placement,
            self.buffer.rank,
            srcs,
            config.recv_format,
            config.num_max_tokens_per_rank,
        )
        for name, got, want in (
            ("num_tokens", received.num_tokens, expected.num_tokens),
            ("offsets", received.offsets, expected.offsets),
            ("shape of x", torch.tensor(received.x.shape), torch.tensor(expected.x.shape)),
            ("sources()", _by_row(handle.sources()), _by_row(expected.sources)),
        ):
            if got.dtype != want.dtype or not torch.equal(got, want):
                self.wrong(round_number, f"{name} is {got.tolist()}, not {want.tolist()}")
                return
        written = expected.sources[:, 0].long()
        rows, want_rows = (x.reshape(-1, config.hidden)[written] for x in (received.x, expected.x))
        if not reference.same_bits(rows, want_rows).all():
            self.wrong(round_number, "recv.x has other bits")

    def check_output(self, out: torch.Tensor, outcome: Outcome, round_number: int) -> None:
        super().check_output(out, outcome, round_number)
        kinds = (out.dtype, outcome.codes.dtype, outcome.lost.dtype)
        if kinds != (self.buffer.config.dtype, torch.uint8, torch.bool) or outcome.lost.dim():
            self.wrong(round_number, f"out, codes and lost are {kinds}, lost of {outcome.lost.dim()} dimensions")
        want = self.wanted_codes(self.work.tokens(self.buffer.rank, round_number)[1], round_number)
        if not torch.equal(outcome.codes, want):
            self.wrong(round_number, f"codes are {outcome.codes.tolist()}, not {want.tolist()}")

    def wanted_codes(self, idx: torch.Tensor, round_number: int) -> torch.Tensor:
        active_mask = [1] * self.buffer.num_ranks
        if self.victim is None or self.hears_victim(round_number, "combine.half_signalled"):
            return reference.outcome_codes(idx, self.buffer.placement, active_mask)
        active_mask[self.victim] = int(self.is_member(round_number))
        return reference.outcome_codes(idx, self.buffer.placement, active_mask, {self.victim})

    def wrong(self, round_number: int, what: str) -> None:
        self.tally.corrupt.append(f"round {round_number}: {what}")


def _by_row(sources: torch.Tensor) -> torch.Tensor:
    return sources[sources[:, 0].argsort()]


def conform(ranks: VirtualRanks, work: RoutedWork, victim: int | None = None, phase: str = "") -> list[Tally]:
    """Every kind of round of ``work`` on every rank; at ``phase`` of the second one (or before the first) one dies."""
    first = ranks.buffers[0].num_rounds
    dead_from, num_rounds, living = first + 1 if phase else first, work.num_kinds, list(range(len(ranks.buffers)))
    if victim is not None:
        living.remove(victim)
    if phase:
        ranks.buffers[victim].arm(phase, dead_from, "crash")
        num_rounds += 1
    elif victim is not None:
        ranks.buffers[victim].core.crash()
        wait_for_view(ranks, living)

    def one(buffer: Buffer) -> Tally:
        return Strict(buffer, work, victim, dead_from, phase).run(num_rounds)

    tallies = raised(ranks.run(one, None if phase else living))
    if phase:
        dead = tallies.pop(victim)
        assert isinstance(dead.error, ClosedError), f"{phase} was not reached"
    for tally in tallies:
        assert tally.error is None
        assert not tally.corrupt, f"rank {tally.rank}: " + "; ".join(tally.corrupt[:3])
        assert tally.rounds == num_rounds
    assert views_agree(ranks)
    if victim is not None:
        check_last_view(ranks, living, last_round=dead_from + 1 if phase else first)
    return tallies


def check_last_view(ranks: VirtualRanks, living: list[int], last_round: int) -> None:
    """One death costs one view, and that view begins at ``last_round`` at the latest: nobody runs on without it."""
    for rank in living:
        view, _ = ranks.buffers[rank].views()[-1]
        assert (view.epoch, list(view.active_ranks)) == (1, living)
        assert view.first_round <= last_round + 1


def wait_for_view(ranks: VirtualRanks, living: Sequence[int], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while any(ranks.buffers[rank].view.active_ranks != tuple(living) for rank in living):
        assert time.monotonic() < deadline, "the view without the dead rank was not installed"
        time.sleep(0.001)


# --- the grid

FORMATS = list(
    itertools.product(
        (torch.bfloat16, torch.float32, torch.float16),
        ("batched", "packed"),
        ("owner", "expert"),
        ("drop", "renormalize"),
    )
)


def config_of(formats: tuple = FORMATS[0], **changes: object) -> Config:
    dtype, recv_format, reduce, on_lost = formats
    fields: dict = {"num_experts": 11, "hidden": 24, "num_topk": 3, "num_max_tokens_per_rank": 6, "settle_ms": 5}
    fields.update(dtype=dtype, recv_format=recv_format, reduce=reduce, on_lost=on_lost)
    return Config(**{**fields, **changes})


@each_on(list(BACKENDS), "formats", [(formats,) for formats in FORMATS])
def test_all_alive(group_of: GroupOf, formats: tuple) -> None:
    config = config_of(formats)
    with group_of(3, config) as ranks:
        tallies = conform(ranks, RoutedWork(config, 3, seed=1))
    assert sum(tally.lost + tally.unroutable for tally in tallies) == 0 < sum(tally.choices for tally in tallies)


@each_on(["cpu", "cuda-host"], "formats", [(formats,) for formats in FORMATS])
def test_one_dead_before(group_of: GroupOf, formats: tuple) -> None:
    config = config_of(formats)
    victim = FORMATS.index(formats) % 3
    with group_of(3, config) as ranks:
        tallies = conform(ranks, RoutedWork(config, 3, seed=2), victim)
    assert sum(tally.unroutable for tally in tallies) > 0 == sum(tally.lost for tally in tallies)


@each_on(list(BACKENDS), "formats,phase", zip(itertools.cycle(FORMATS), phases(), strict=False))
def test_one_dies_inside_a_round(group_of: GroupOf, formats: tuple, phase: str) -> None:
    """Each phase with another format."""
    config = config_of(formats)
    with group_of(5, config) as ranks:
        tallies = conform(ranks, RoutedWork(config, 5, seed=3), victim=len(phase) % 5, phase=phase)
    assert sum(tally.unroutable for tally in tallies) > 0


@each_on(list(BACKENDS), "phase", [(phase,) for phase in phases()])
def test_rows_and_outcome_at_every_phase(group_of: GroupOf, phase: str) -> None:
    """Packed, four ranks, so that half of the group hears the victim's signal and half does not."""
    config = config_of((torch.bfloat16, "packed", "owner", "drop"), num_experts=8)
    with group_of(4, config) as ranks:
        conform(ranks, RoutedWork(config, 4, seed=4), victim=phases().index(phase) % 4, phase=phase)


# --- shapes


def some_tokens(rank: int, round_number: int) -> int:
    """None on every other rank, and one more or less on the rest."""
    return 0 if (rank + round_number) % 2 else 1 + (rank + round_number) % 5


@dataclass(frozen=True)
class Shape:
    """A group, in the words of Config, and the type of ``topk_idx``."""

    num_ranks: int
    changes: dict
    idx_dtype: torch.dtype = torch.int64
    num_tokens: Callable[[int, int], int] | int | None = None


SHAPES = {
    "one rank": Shape(1, {}),
    "one rank, one expert, one token": Shape(1, {"num_experts": 1, "num_topk": 1, "num_max_tokens_per_rank": 1}),
    "two ranks, int32": Shape(2, {}, torch.int32),
    "five ranks, seven experts": Shape(5, {"num_experts": 7}),
    "seven ranks": Shape(7, {"num_experts": 30, "num_topk": 4}, torch.int32),
    "more ranks than experts": Shape(5, {"num_experts": 3, "num_topk": 2}),
    "hidden 8": Shape(3, {"hidden": 8}),
    "hidden 7168": Shape(2, {"hidden": 7168, "num_experts": 5, "num_topk": 2, "num_max_tokens_per_rank": 3}),
    "hidden 16384": Shape(2, {"hidden": 16384, "num_experts": 4, "num_topk": 2, "num_max_tokens_per_rank": 2}),
    "top-1": Shape(3, {"num_topk": 1}),
    "top-8 of 8": Shape(3, {"num_experts": 8, "num_topk": 8}, torch.int32),
    "top-31": Shape(3, {"num_experts": 40, "num_topk": 31, "hidden": 8}),
    "top-32 of 32": Shape(3, {"num_experts": 32, "num_topk": 32, "hidden": 8}),
    "top-32 on one rank": Shape(1, {"num_experts": 33, "num_topk": 32, "hidden": 8}, torch.int32),
    "no tokens on some": Shape(5, {}, num_tokens=some_tokens),
    "no tokens on any": Shape(3, {}, num_tokens=0),
    "interleaved map": Shape(3, {"placement": [expert % 3 for expert in range(11)]}),
    "scattered map, rank 1 has none": Shape(4, {"placement": [3, 0, 0, 2, 3, 3, 0, 2, 3, 3, 2]}),
    "all on the last rank": Shape(3, {"placement": [2] * 11}, torch.int32),
}


@each_on(
    *(["cpu", "cuda-host"], "name,recv_format,reduce"),
    itertools.product(SHAPES, ("batched", "packed"), ("owner", "expert")),
)
def test_shapes(group_of: GroupOf, name: str, recv_format: str, reduce: str) -> None:
    shape = SHAPES[name]
    dtype = torch.bfloat16 if (recv_format == "packed") == (reduce == "owner") else torch.float32
    config = config_of((dtype, recv_format, reduce, "drop"), **shape.changes)
    work = RoutedWork(config, shape.num_ranks, 5, shape.num_tokens, shape.idx_dtype, routings_for(config, shape))
    with group_of(shape.num_ranks, config) as ranks:
        tallies = conform(ranks, work)
    assert sum(tally.lost + tally.unroutable for tally in tallies) == 0


def routings_for(config: Config, shape: Shape) -> tuple[Routing, ...]:
    """``one_rank`` needs experts on rank 0."""
    has_experts = config.placement_for(shape.num_ranks).num_local_experts(0) > 0
    return ROUTINGS if has_experts else (nobody, skewed, uniform)


@on_each
@pytest.mark.parametrize("name", ["scattered map, rank 1 has none", "seven ranks", "no tokens on some"])
@pytest.mark.parametrize("recv_format", ["batched", "packed"])
def test_shapes_with_a_death(group_of: GroupOf, name: str, recv_format: str) -> None:
    shape = SHAPES[name]
    config = config_of((torch.float32, recv_format, "expert", "drop"), **shape.changes)
    work = RoutedWork(config, shape.num_ranks, 6, shape.num_tokens, shape.idx_dtype)
    with group_of(shape.num_ranks, config) as ranks:
        conform(ranks, work, victim=shape.num_ranks - 1, phase="dispatch.half_signalled")


@on_each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reduce", ["owner", "expert"])
def test_product_and_sum_are_rounded_apart(group_of: GroupOf, dtype: torch.dtype, reduce: str) -> None:
    """A weight times a row, less the same: nothing is left of it, unless the product went into the sum unrounded."""
    config = config_of((dtype, "packed", reduce, "drop"), num_experts=2, num_topk=2)
    x = torch.randn(6, config.hidden, generator=torch.Generator().manual_seed(9)).to(dtype)
    idx, weights = torch.tensor([[0, 1]] * 6), torch.full([6, 2], 1 / 3)
    with group_of(1, config) as ranks:
        received, handle = ranks.buffers[0].dispatch(x, idx, weights)
        y = torch.cat([received.x[:6], -received.x[6:]])
        out, _ = ranks.buffers[0].combine(y, handle)
    assert reference.same_bits(out, torch.zeros_like(x)).all()


def test_nan_in_a_window_shows() -> None:
    """The control: without it the suite could not tell a byte that was never written from one that was."""
    config = config_of()
    with VirtualRanks(2, config, poison=True) as ranks:
        work = RoutedWork(config, 2, seed=7)

        def one(buffer: Buffer) -> Tally:
            checker = Strict(buffer, work)
            received, handle = checker.dispatch(buffer.num_rounds)
            written = int(received.num_tokens[0])
            received.x[0, written:] = float("nan")
            y = checker.experts(received)
            y[:, 0] = float("nan")  # a row that belongs to a token
            checker.check_output(*buffer.combine(y, handle), buffer.num_rounds - 1)
            return checker.tally

        tallies = raised(ranks.run(one))
    assert any("out is not the sum" in text for tally in tallies for text in tally.corrupt)
