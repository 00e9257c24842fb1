"""The rig of the group tests: ranks run rounds whose rows anybody can recompute, and check each one they receive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from fault_a2a import reference
from fault_a2a.buffer import Buffer
from fault_a2a.config import Config
from fault_a2a.errors import FaultA2AError
from fault_a2a.rounds import Handle, Outcome, Received
from fault_a2a.testing.virtual import VirtualRanks


@dataclass
class Tally:
    """What one rank saw. ``corrupt`` must stay empty whatever dies."""

    rank: int
    rounds: int = 0
    lost: int = 0
    unroutable: int = 0
    choices: int = 0
    corrupt: list[str] = field(default_factory=list)
    error: BaseException | None = None
    lost_by_round: Counter[int] = field(default_factory=Counter)
    unroutable_by_round: Counter[int] = field(default_factory=Counter)
    outcomes: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """Rows and routing of every (rank, round), from the seed alone."""

    config: Config
    num_ranks: int
    seed: int = 0
    num_tokens: int | Callable[[int, int], int] | None = None  # or a function of (rank, round)

    def _generator(self, rank: int, round_number: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1009 + rank) * 1000003 + round_number)

    def tokens(self, rank: int, round_number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        config, generator = self.config, self._generator(rank, round_number)
        num_tokens = config.num_max_tokens_per_rank if self.num_tokens is None else self.num_tokens
        if callable(num_tokens):
            num_tokens = num_tokens(rank, round_number)
        x = torch.randn(num_tokens, config.hidden, generator=generator).to(config.dtype)
        scores = torch.rand(num_tokens, config.num_experts, generator=generator)
        idx = scores.topk(config.num_topk, dim=1).indices
        # Some choices name no expert, so that rows and answers differ in number.
        idx[torch.rand(idx.shape, generator=generator) < 0.1] = -1
        return x, idx, torch.rand(num_tokens, config.num_topk, generator=generator)

    def expert_rows(self, rows: torch.Tensor, expert: int) -> torch.Tensor:
        """An expert whose rows depend on the row and the expert only: elementwise, so the same bits in any batch."""
        return (rows.float() * (1.0 + expert / 8) + expert / 4).to(rows.dtype)


@dataclass(frozen=True)
class SameRouting(Work):
    """Every round chooses what the first one chose: one round's rows in another's place give only wrong bits."""

    def tokens(self, rank: int, round_number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, _, weights = super().tokens(rank, round_number)
        return x, super().tokens(rank, 0)[1], weights


class Checker:
    """Runs rounds of ``work`` on one buffer and checks all that can be known of them."""

    def __init__(self, buffer: Buffer, work: Work) -> None:
        self.buffer, self.work = buffer, work
        self.tally = Tally(buffer.rank)
        self.local = buffer.placement.local_experts(buffer.rank)

    def on_the_way(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows as they travel, and their scales."""
        scale = self.buffer.config.quantizes
        return (x, None) if scale == "never" else reference.quantize_1x128(x, scale)

    def as_experts_see(self, rows: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        config = self.buffer.config
        if scales is None:
            return rows
        return reference.dequantize_1x128(rows, scales).to(config.dtype)

    def dispatch(self, round_number: int) -> tuple[Received, Handle]:
        tokens = self.work.tokens(self.buffer.rank, round_number)
        received, handle = self.buffer.dispatch(*(tensor.to(self.buffer.device) for tensor in tokens))
        received = received.to(torch.device("cpu"))
        self.check_received(received, handle, round_number)
        return received, handle

    def check_received(self, received: Received, handle: Handle, round_number: int) -> None:
        rows = received.x.reshape(-1, self.buffer.config.hidden)
        sources = handle.sources()
        if int(received.num_tokens.sum()) != len(sources):
            self.tally.corrupt.append(f"round {round_number}: num_tokens does not count the rows")
        for src in sources[:, 2].unique().tolist():
            x, idx, weights = self.work.tokens(src, round_number)
            mine = sources[sources[:, 2] == src]
            places, tokens = mine[:, 0].long(), mine[:, 3].long()
            sent, scales = self.on_the_way(x)
            if not reference.same_bits(rows[places], sent[tokens]).all():
                self.tally.corrupt.append(f"round {round_number}: rows from rank {src} are not its rows")
            if scales is not None and received.scales is not None:
                got = received.scales.reshape(-1, received.scales.shape[-1])[places]
                if not reference.same_bits(got, scales[tokens]).all():
                    self.tally.corrupt.append(f"round {round_number}: scales from rank {src} are not its scales")
            if received.weights is not None:
                wanted = weights[tokens, mine[:, 4].long()]
                if not reference.same_bits(received.weights.reshape(-1)[places], wanted).all():
                    self.tally.corrupt.append(f"round {round_number}: weights from rank {src} are not its weights")
            named = idx[mine[:, 3].long(), mine[:, 4].long()]
            if named.tolist() != [self.local[expert] for expert in mine[:, 1].tolist()]:
                self.tally.corrupt.append(f"round {round_number}: rows from rank {src} stand at the wrong expert")

    def experts(self, received: Received) -> torch.Tensor:
        y = torch.full(received.x.shape, float("nan"), dtype=self.buffer.config.dtype)
        flat, flat_y = received.x.reshape(-1, received.x.shape[-1]), y.view(-1, received.x.shape[-1])
        for local, expert in enumerate(self.local):
            count = int(received.num_tokens[local])
            first = int(received.offsets[local])
            if self.buffer.config.recv_format == "batched":
                first = local * self.buffer.capacity
            span = slice(first, first + count)
            scales = received.scales
            rows = self.as_experts_see(
                flat[span], None if scales is None else scales.reshape(-1, scales.shape[-1])[span]
            )
            flat_y[span] = self.work.expert_rows(rows, expert)
            if received.weights is not None:
                flat_y[span] = (flat_y[span].float() * received.weights.reshape(-1)[span, None]).to(y.dtype)
        return y

    def combine(self, received: Received, handle: Handle, round_number: int) -> Outcome:
        out, outcome = self.buffer.combine(self.experts(received).to(self.buffer.device), handle)
        outcome = Outcome(outcome.codes.cpu(), outcome.lost.cpu())
        self.check_output(out.cpu(), outcome, round_number)
        return outcome

    def check_output(self, out: torch.Tensor, outcome: Outcome, round_number: int) -> None:
        config, tally = self.buffer.config, self.tally
        x, idx, weights = self.work.tokens(self.buffer.rank, round_number)
        x = self.as_experts_see(*self.on_the_way(x))
        rows = torch.stack([self.work.expert_rows(x, expert) for expert in range(config.num_experts)])
        chosen = rows[idx.clamp(min=0), torch.arange(len(x))[:, None]]
        if config.weights_at == "expert":
            chosen = (chosen.float() * weights[:, :, None]).to(config.dtype)
        expected = reference.combine(
            chosen,
            idx,
            weights,
            outcome.delivered,
            reduce=config.reduce,
            placement=self.buffer.placement,
            on_lost=config.on_lost,
            weights_at=config.weights_at,
        )
        if not reference.same_bits(out, expected).all():
            tally.corrupt.append(f"round {round_number}: out is not the sum of what the outcome says was delivered")
        if not torch.equal(outcome.codes == reference.NONE, idx < 0):
            tally.corrupt.append(f"round {round_number}: outcome 'none' and topk_idx -1 differ")
        num_lost = int((outcome.codes == reference.LOST).sum())
        if bool(outcome.lost) != (num_lost > 0):
            tally.corrupt.append(f"round {round_number}: lost is {bool(outcome.lost)} with {num_lost} choices lost")
        tally.lost += num_lost
        tally.lost_by_round[round_number] += num_lost
        num_unroutable = int((outcome.codes == reference.UNROUTABLE).sum())
        tally.unroutable += num_unroutable
        tally.unroutable_by_round[round_number] += num_unroutable
        tally.choices += int((idx >= 0).sum())
        tally.rounds += 1
        tally.outcomes[round_number] = outcome.codes

    def run(self, num_rounds: int, between: Callable[[Buffer, int], None] | None = None) -> Tally:
        """``num_rounds`` rounds, one open at a time. An error of the group ends it and is kept in the tally."""
        try:
            for _ in range(num_rounds):
                round_number = self.buffer.num_rounds
                received, handle = self.dispatch(round_number)
                if between is not None:
                    between(self.buffer, round_number)
                self.combine(received, handle, round_number)
        except FaultA2AError as error:
            self.tally.error = error
        return self.tally

    def run_two_open(self, num_rounds: int) -> Tally:
        """As ``run``, with two rounds open all the time: dispatch r + 1 goes out before combine r."""
        try:
            number = self.buffer.num_rounds
            older = (number, *self.dispatch(number))
            for _ in range(num_rounds - 1):
                number = self.buffer.num_rounds
                newer = (number, *self.dispatch(number))
                self.combine(older[1], older[2], older[0])
                older = newer
            self.combine(older[1], older[2], older[0])
        except FaultA2AError as error:
            self.tally.error = error
        return self.tally


def run_checked(ranks: VirtualRanks, work: Work, num_rounds: int, **options: object) -> list[Tally]:
    """All virtual ranks run ``num_rounds`` checked rounds; errors other than the group's own are raised."""

    def one(buffer: Buffer) -> Tally:
        return Checker(buffer, work).run(num_rounds, **options)  # type: ignore[arg-type]

    return raised(ranks.run(one))


def run_two_open(ranks: VirtualRanks, work: Work, num_rounds: int) -> list[Tally]:
    return raised(ranks.run(partial(_two_open, work=work, num_rounds=num_rounds)))


def _two_open(buffer: Buffer, work: Work, num_rounds: int) -> Tally:
    return Checker(buffer, work).run_two_open(num_rounds)


def raised(results: list) -> list[Tally]:
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def views_agree(ranks: VirtualRanks) -> bool:
    """No two ranks installed different views for one epoch."""
    seen: dict[int, tuple] = {}
    for buffer in ranks.buffers:
        for view, _ in buffer.views():
            content = (view.active_mask, view.first_round, view.incarnations)
            if seen.setdefault(view.epoch, content) != content:
                return False
    return True


def suspicions_of(ranks: VirtualRanks, innocent: set[int]) -> list[tuple[int, int, str]]:
    """(accuser, accused, kind) of every piece of evidence against a rank that did nothing."""
    return [
        (buffer.rank, evidence.rank, evidence.kind)
        for buffer in ranks.buffers
        if buffer.rank in innocent
        for evidence in buffer.evidence()
        if evidence.rank in innocent
    ]


def shown(scenario: Callable[[], list[str]], num_tries: int = 3) -> list[str]:
    """What went wrong; tried again while a busy machine kept the scenario from happening at all."""
    wrong = scenario()
    for _ in range(num_tries - 1):
        if not any(text.endswith("the scenario shows nothing") for text in wrong):
            break
        wrong = scenario()
    return wrong
