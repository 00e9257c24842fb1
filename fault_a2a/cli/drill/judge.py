"""The judge inside every rank of a drill: what came in, and what went out, against the single-process evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fault_a2a import reference
from fault_a2a.cli.drill.model import Expectation


@dataclass(frozen=True)
class Accounts:
    """What one step's outcome says, and whether it is true.

    Attributes:
        exact: the output equals the reference on the delivered choices, bit for bit, and the codes are possible.
        lost_on: choices lost in the step, by the rank that holds their expert.
        num_unroutable: choices whose expert stood on no active rank.
        why: what is wrong, if it is not exact.
    """

    exact: bool
    lost_on: dict[int, int] = field(default_factory=dict)
    num_unroutable: int = 0
    why: str = ""

    @property
    def num_lost(self) -> int:
        return sum(self.lost_on.values())


class Judge:
    """Judges one rank's steps.

    Args:
        expectation: the single-process evaluation.
        rank: whose steps.
        on_lost, reduce: of the group's config.
        chunk_tokens: tokens of a chunk, if the batches are streams; ``None``: a batch is one chunk.
    """

    def __init__(
        self,
        expectation: Expectation,
        rank: int,
        on_lost: str = "drop",
        reduce: str = "owner",
        chunk_tokens: int | None = None,
    ) -> None:
        self.expectation, self.rank, self.on_lost, self.reduce = expectation, rank, on_lost, reduce
        self.chunk_tokens, self.num_ranks = chunk_tokens, expectation.batches.num_ranks
        self._expert_rank = torch.tensor(expectation.placement.expert_rank)
        self._local_experts = torch.tensor(expectation.placement.local_experts(rank), dtype=torch.int64)

    def num_corrupt_rows(self, step: int, rows: torch.Tensor, sources: torch.Tensor, num_tokens: torch.Tensor) -> int:
        """Rows that are not what their source put there, were sent to another expert, came twice, or are missing.

        Args:
            rows: ``[num_rows, hidden]``, the received rows in the order of ``sources``.
            sources: of ``handle.sources()``.
            num_tokens: of ``recv.num_tokens``.

        From each source rank all its rows for this rank must be there, or none.
        """
        sources = sources.long()
        num_corrupt = int((num_tokens.long() - torch.bincount(sources[:, 1], minlength=len(num_tokens))).abs().sum())
        if len(sources):
            same = _same_rows(rows, self.expectation.expected_x(step, sources))
            right_expert = self.expectation.expected_experts(step, sources) == self._local_experts[sources[:, 1]]
            num_corrupt += int((~(same & right_expert)).sum())
        due = self._rows_due(step)
        came = torch.zeros_like(due)
        came.index_put_((sources[:, 2], sources[:, 3], sources[:, 4]), torch.ones(len(sources), dtype=due.dtype), True)
        taken = came.sum(dim=(1, 2)) > 0
        return num_corrupt + int((came[taken] - due[taken]).abs().sum())

    def accounts(self, step: int, out: torch.Tensor, codes: torch.Tensor, active_mask: tuple[int, ...]) -> Accounts:
        """Judges ``out`` and ``outcome.codes`` of a step that ran in a view with this ``active_mask``."""
        expert_rank = self._expert_rank[self._topk_idx(step)]
        lost = codes == reference.LOST
        lost_on = torch.bincount(expert_rank[lost], minlength=1)
        found = {rank: int(count) for rank, count in enumerate(lost_on.tolist()) if count}
        num_unroutable = int((codes == reference.UNROUTABLE).sum())
        why = self._impossible(codes, expert_rank, active_mask) or self._wrong_out(step, out, codes)
        return Accounts(not why, found, num_unroutable, why)

    def _impossible(self, codes: torch.Tensor, expert_rank: torch.Tensor, active_mask: tuple[int, ...]) -> str:
        active = torch.tensor(active_mask, dtype=torch.bool)[expert_rank]
        if not ((codes == reference.UNROUTABLE) == ~active).all():
            return "unroutable must be the choices on ranks that the view left out, and no others"
        if not ((codes >= reference.DELIVERED) & (codes <= reference.UNROUTABLE)).all():
            return "a choice has no outcome"
        delivered = set(expert_rank[codes == reference.DELIVERED].tolist())
        lost = set(expert_rank[codes == reference.LOST].tolist())
        split = [rank for rank in sorted(delivered & lost) if self._is_split(codes, expert_rank == rank)]
        where = "one chunk of their answers" if self.chunk_tokens else "one round"
        return f"ranks {split} delivered some choices and lost others in {where}" if split else ""

    def _is_split(self, codes: torch.Tensor, on_rank: torch.Tensor) -> bool:
        """Whether a part of a rank's answer that comes whole or not at all did neither: of a stream, a chunk."""
        if self.chunk_tokens is None:
            return True
        # Answers come in the order of tokens and choices, one for each or one for all of a token, so many to a chunk.
        tokens = on_rank.nonzero()[:, 0]
        if self.reduce == "expert":
            chunks = torch.unique_consecutive(tokens, return_inverse=True)[1] // self.chunk_tokens
        else:
            most_local = max(len(self.expectation.placement.local_experts(rank)) for rank in range(self.num_ranks))
            chunks = torch.arange(len(tokens)) // (self.chunk_tokens * min(codes.shape[1], most_local))
        delivered = (codes[on_rank] == reference.DELIVERED).long()
        num_delivered = torch.bincount(chunks, weights=delivered)
        return bool(((num_delivered > 0) & (num_delivered < torch.bincount(chunks))).any())

    def _wrong_out(self, step: int, out: torch.Tensor, codes: torch.Tensor) -> str:
        if (codes == reference.DELIVERED).all():
            want, what = self.expectation.healthy_out(step, self.rank, self.reduce), "the healthy run"
        else:
            want = self.expectation.expected_out(step, self.rank, codes, self.on_lost, self.reduce)
            what = "the reference on the delivered choices"
        if out.shape != want.shape:
            return f"the output has shape {list(out.shape)}, not {list(want.shape)}"
        wrong = (~_same_rows(out, want)).nonzero().flatten().tolist()
        return f"the outputs of tokens {wrong[:8]} differ from {what}" if wrong else ""

    def _topk_idx(self, step: int) -> torch.Tensor:
        return self.expectation.table.topk_idx[self.expectation.batches.words(step, self.rank)]

    def _rows_due(self, step: int) -> torch.Tensor:
        """int64 ``[num_ranks, num_tokens, num_topk]``: 1 where that choice of that token goes to this rank."""
        topk_idx = self.expectation.table.topk_idx[self.expectation.batches.step_words(step)]
        return (self._expert_rank[topk_idx] == self.rank).long()


def _same_rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """bool ``[num_rows]``: which rows have the same bits."""
    bits = torch.int16 if a.dtype == torch.bfloat16 else torch.int32
    if torch.equal(a.view(bits), b.view(bits)):  # nearly always, and five times as quick as looking for NaN
        return torch.ones(len(a), dtype=torch.bool)
    return reference.same_bits(a, b).all(dim=1)
