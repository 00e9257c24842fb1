"""The drill's work: a real mixture-of-experts layer over a real text, and what its outputs must be, bit for bit.

A word's row of ``x`` is its embedding, and the experts are row-invariant, so the layer's whole evaluation is a table:
one row for each (word, choice). One process computes it (``RowTable.build``); the ranks map the file and look up what
they should have received and what their outputs should be.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from fault_a2a import reference
from fault_a2a.placement import Placement
from fault_a2a.testing.row_invariance import RowInvariance, check_row_invariant

# Every matrix product of the layer has this many rows: with the number fixed, and one thread, a row keeps its bits.
PADDED_ROWS = 64
# Later words share the rows of earlier ones, so that the table of a long text stays small.
MAX_WORDS = 4096

_WORD = re.compile(r"\w+|[^\w\s]")
_GOLDEN_RATIO = 0.6180339887498949
# What a generator is for; with the seed of the drill and, for experts, the expert's number.
_FOR_EMBEDDING, _FOR_ROUTER, _FOR_EXPERT = 1, 2, 3


def default_ffn(hidden: int) -> int:
    """Inner size of an expert that keeps a step of eight ranks on two cores in the order of ten milliseconds."""
    return min(max(hidden // 16, 8), 128)


class TextBatches:
    """Which words of a text stand in the batch of a rank in a step.

    Args:
        text: any text with at least one word or sign in it. Words (runs of letters and digits) and punctuation signs
            are the tokens.
        num_ranks, num_tokens: ranks of the group, and tokens of each rank in each step; ``num_tokens`` may be 0.
        seed: where in the text the first step begins.
        max_words: words beyond so many different ones share the number of an earlier one.

    The ranks read on where the rank before them stopped, and a step where the step before it stopped. At the text's
    end they begin again, each time at another place: a text that fills a number of batches exactly would otherwise
    repeat them, and a stale row would look like a right one.

    Attributes:
        vocabulary: the different words, in order of appearance, at most ``max_words``.
        word_idx: int64 ``[num_positions]``, the text as numbers of words.

    Raises:
        ValueError: the text has no word, or a number is out of range.
    """

    def __init__(self, text: str, num_ranks: int, num_tokens: int, seed: int = 0, max_words: int = MAX_WORDS) -> None:
        if num_ranks < 1 or num_tokens < 0 or max_words < 1:
            raise ValueError(
                f"num_ranks {num_ranks}, num_tokens {num_tokens}, max_words {max_words}: "
                "pass at least one rank, no negative number of tokens, and at least one word."
            )
        words = _WORD.findall(text)
        if not words:
            raise ValueError("text: it has no word in it; pass a file with some text.")
        number: dict[str, int] = {}
        numbers = [number.setdefault(word, len(number)) for word in words]
        self.num_ranks, self.num_tokens, self.seed = num_ranks, num_tokens, seed
        self.vocabulary = list(number)[:max_words]
        self.word_idx = torch.tensor(numbers) % max_words
        # The judge of a step asks for the same words again and again.
        self._read = functools.lru_cache(maxsize=4)(self._read_words)

    @property
    def num_words(self) -> int:
        """Different words, and so rows of the embedding."""
        return len(self.vocabulary)

    def words(self, step: int, rank: int) -> torch.Tensor:
        """int64 ``[num_tokens]``: the words of ``rank`` in ``step`` (both from 0), as indices of ``vocabulary``."""
        if not 0 <= rank < self.num_ranks or step < 0:
            raise ValueError(f"step {step}, rank {rank}: pass a step from 0 and a rank from 0 to {self.num_ranks - 1}.")
        return self._read((step * self.num_ranks + rank) * self.num_tokens, self.num_tokens)

    def step_words(self, step: int) -> torch.Tensor:
        """int64 ``[num_ranks, num_tokens]``: the words of every rank in ``step``."""
        num_read = self.num_ranks * self.num_tokens
        return self._read(step * num_read, num_read).view(self.num_ranks, self.num_tokens)

    def _read_words(self, first: int, num_read: int) -> torch.Tensor:
        """So many words, from the one that is read as number ``first`` since the drill began."""
        number = torch.arange(first, first + num_read)
        num_positions = len(self.word_idx)
        lap = number.div(num_positions, rounding_mode="floor")
        shift = ((lap + self.seed % 65536).double() * _GOLDEN_RATIO % 1.0 * num_positions).long()
        return self.word_idx[(number + shift) % num_positions]


@dataclass(frozen=True)
class _ExpertWeights:
    """float32, of values that the layer's dtype can hold. gate_up ``[hidden, 2 * ffn]``, down ``[ffn, hidden]``."""

    gate_up: torch.Tensor
    down: torch.Tensor


class MoELayer:
    """Embedding, softmax router and SwiGLU experts; a row's bits depend on its word and the seed, on nothing else.

    Args:
        vocab_size: words, each with its embedding.
        hidden: elements of a row.
        num_experts, num_topk: experts in all, and how many different ones a token goes to.
        ffn: inner size of an expert; ``None`` for ``default_ffn(hidden)``.
        dtype: of embedding and rows: ``torch.bfloat16`` or ``torch.float32``. Products are computed in float32 either
            way (quick on every machine), from weights that the dtype can hold, and rounded once.
        seed: of all weights. Each expert has a generator of its own, so a rank builds only its local experts and still
            has the same weights as every other process.

    Sets ``torch.set_num_threads(1)`` for the process: with more threads a row's bits could depend on its place.

    Raises:
        ValueError: a size is not positive, or ``num_topk`` is more than ``num_experts``.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden: int,
        num_experts: int,
        num_topk: int,
        ffn: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> None:
        self.ffn = default_ffn(hidden) if ffn is None else ffn
        if min(vocab_size, hidden, num_experts, num_topk, self.ffn) < 1:
            raise ValueError("vocab_size, hidden, num_experts, num_topk, ffn: pass at least 1 for each.")
        if num_topk > num_experts:
            raise ValueError(f"num_topk: {num_topk} different experts of {num_experts}; pass at most {num_experts}.")
        torch.set_num_threads(1)
        self.vocab_size, self.hidden, self.num_experts, self.num_topk = vocab_size, hidden, num_experts, num_topk
        self.dtype, self.seed = dtype, seed
        self.embedding = _randn(seed, _FOR_EMBEDDING, 0, vocab_size, hidden).to(dtype)
        # Sharp enough that the weights of a token differ visibly.
        self._router = _randn(seed, _FOR_ROUTER, 0, hidden, num_experts) * (2.0 / hidden**0.5)
        self._experts: dict[int, _ExpertWeights] = {}
        self._padded = torch.zeros(PADDED_ROWS, hidden)

    def prepare(self, experts: Iterable[int]) -> None:
        """Builds the weights of these experts now, and runs each once, rather than in their first step."""
        for expert in experts:
            self.expert_rows(expert, self._padded[:1].to(self.dtype))

    def embed(self, words: torch.Tensor) -> torch.Tensor:
        """``x`` of these words: ``[num_tokens, hidden]`` of the layer's dtype."""
        return self.embedding[words]

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``topk_idx`` int64 and ``topk_weights`` float32, both ``[num_tokens, num_topk]``, by falling weight.

        The weights of a token are renormalised: they sum to 1, to a rounding or two.
        """
        scores = self._in_padded_parts(x, lambda padded: torch.softmax(padded @ self._router, dim=-1), self.num_experts)
        scores, topk_idx = scores.sort(dim=-1, descending=True, stable=True)
        scores, topk_idx = scores[:, : self.num_topk].clone(), topk_idx[:, : self.num_topk].clone()
        total = torch.zeros(len(x))
        for k in range(self.num_topk):  # torch's own sum promises no order
            total = total + scores[:, k]
        return topk_idx, scores / total[:, None]

    def expert_rows(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """One expert's rows ``[n, hidden]`` for the rows ``x`` ``[n, hidden]``, any n, in the dtype of the layer."""
        return self._expert_sums(expert, x).to(self.dtype)

    def recv_rows(
        self,
        recv_x: torch.Tensor,
        num_tokens: torch.Tensor,
        local_experts: Sequence[int],
        offsets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs a rank's experts over what it received; the answer has the shape of ``recv_x``.

        Args:
            recv_x: batched ``[num_local_experts, capacity, hidden]``, or packed ``[num_recv, hidden]``.
            num_tokens: ``[num_local_experts]``, rows of each expert. An expert without rows is not run.
            local_experts: global numbers of the rank's experts, in the order of ``recv_x``.
            offsets: ``[num_local_experts + 1]``, for the packed format only.

        Rows of the batched format behind an expert's last one are left as they come.
        """
        y = torch.empty_like(recv_x)
        starts = [0] * len(local_experts) if offsets is None else offsets.tolist()
        for local, (expert, count) in enumerate(zip(local_experts, num_tokens.tolist(), strict=True)):
            if count:
                rows = slice(starts[local], starts[local] + count)
                source, target = (recv_x[local], y[local]) if recv_x.dim() == 3 else (recv_x, y)
                target[rows] = self.expert_rows(expert, source[rows])
        return y

    def row_invariance(self, expert: int = 0) -> RowInvariance:
        """Whether rows keep their bits on this machine. Checks one expert: the others run the same products.

        It looks at the float32 sums, before a rounding to bfloat16 could hide a difference.
        """
        return check_row_invariant(lambda x: self._expert_sums(expert, x), self.hidden, torch.float32)

    def _expert_sums(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        weights = self._weights(expert)

        def swiglu(padded: torch.Tensor) -> torch.Tensor:
            gate_up = padded @ weights.gate_up
            inner = torch.nn.functional.silu(gate_up[:, : self.ffn]) * gate_up[:, self.ffn :]
            return inner @ weights.down

        return self._in_padded_parts(x, swiglu, self.hidden)

    def _in_padded_parts(
        self, x: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor], num_columns: int
    ) -> torch.Tensor:
        """float32 ``[n, num_columns]``: ``compute`` on exactly PADDED_ROWS rows at a time, zeros behind the last."""
        out = torch.empty(len(x), num_columns)
        for start in range(0, len(x), PADDED_ROWS):
            part = x[start : start + PADDED_ROWS]
            self._padded[: len(part)] = part  # a buffer of its own: alignment matters to some matrix products
            self._padded[len(part) :] = 0
            out[start : start + len(part)] = compute(self._padded)[: len(part)]
        return out

    def _weights(self, expert: int) -> _ExpertWeights:
        if not 0 <= expert < self.num_experts:
            raise ValueError(f"expert: {expert} does not exist; pass 0 to {self.num_experts - 1} (num_experts - 1).")
        if expert not in self._experts:
            numbers = _randn(self.seed, _FOR_EXPERT, expert, 3, self.hidden, self.ffn).to(self.dtype).float()
            gate_up = torch.cat([numbers[0], numbers[1]], dim=1) / self.hidden**0.5
            down = numbers[2].T.contiguous() / self.ffn**0.5
            self._experts[expert] = _ExpertWeights(*(w.to(self.dtype).float() for w in (gate_up, down)))
        return self._experts[expert]


def _randn(seed: int, purpose: int, number: int, *shape: int) -> torch.Tensor:
    """Normal numbers that depend on these arguments only, in whichever process and order they are asked for."""
    mixed = numpy.random.SeedSequence([seed % (1 << 64), purpose, number]).generate_state(1, numpy.uint64)[0]
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(mixed) >> 1))


@dataclass(frozen=True)
class RowTable:
    """The single-process evaluation of the layer over a vocabulary.

    Attributes:
        x: ``[vocab_size, hidden]``, the row of each word.
        topk_idx, topk_weights: int64 and float32 ``[vocab_size, num_topk]``, where each word goes.
        rows: ``[vocab_size, num_topk, hidden]``, what the expert of each choice makes of the word.
    """

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def build(cls, layer: MoELayer) -> RowTable:
        """Evaluates the layer on every word of its vocabulary."""
        x = layer.embedding
        topk_idx, topk_weights = layer.route(x)
        rows = torch.empty(*topk_idx.shape, layer.hidden, dtype=layer.dtype)
        for expert in topk_idx.unique().tolist():
            word, choice = (topk_idx == expert).nonzero(as_tuple=True)
            rows[word, choice] = layer.expert_rows(expert, x[word])
        return cls(x, topk_idx, topk_weights, rows)

    def save(self, folder: str | Path) -> None:
        """Writes one .npy file per attribute into ``folder``, which must exist."""
        for name in self.__dataclass_fields__:
            tensor = getattr(self, name).contiguous()
            # numpy has no bfloat16: its bits travel as int16, and int16 stands for nothing else here.
            numpy.save(_table_file(folder, name), _as_int16_if_bfloat16(tensor).numpy())

    @classmethod
    def load(cls, folder: str | Path) -> RowTable:
        """Maps the files that ``save`` wrote: the processes of one machine share their pages."""
        tensors = {}
        for name in cls.__dataclass_fields__:
            # Copy-on-write: torch wants memory it may write to, and no process may change what the others see.
            tensor = torch.from_numpy(numpy.load(_table_file(folder, name), mmap_mode="c"))
            tensors[name] = tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
        return cls(**tensors)


def _table_file(folder: str | Path, name: str) -> Path:
    return Path(folder) / f"{name}.npy"


def _as_int16_if_bfloat16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


class Expectation:
    """What every rank of the drill should receive and put out, by step; looked up, not computed anew.

    Args:
        batches: which words stand where.
        table: the layer over these words.
        placement: which rank holds which expert.
    """

    def __init__(self, batches: TextBatches, table: RowTable, placement: Placement) -> None:
        self.batches, self.table, self.placement = batches, table, placement

    def expected_x(self, step: int, sources: torch.Tensor) -> torch.Tensor:
        """``[num_rows, hidden]``: what the received rows of ``handle.sources()`` (int32 ``[num_rows, 5]``) must be."""
        return self.table.x[self._source_words(step, sources)]

    def expected_experts(self, step: int, sources: torch.Tensor) -> torch.Tensor:
        """int64 ``[num_rows]``: the global number of the expert that each received row was sent to."""
        return self.table.topk_idx[self._source_words(step, sources), sources[:, 4].long()]

    def expected_recv(
        self,
        step: int,
        rank: int,
        delivered_srcs: Iterable[int],
        recv_format: str = "batched",
        num_max_tokens_per_rank: int | None = None,
    ) -> reference.Received:
        """All that ``rank`` must hold after it took the rows of ``delivered_srcs``: ``reference.dispatch``."""
        words = self.batches.step_words(step)
        xs, topk_idxs = list(self.table.x[words]), list(self.table.topk_idx[words])
        srcs = frozenset(delivered_srcs)
        return reference.dispatch(xs, topk_idxs, self.placement, rank, srcs, recv_format, num_max_tokens_per_rank)

    def expected_out(
        self, step: int, rank: int, codes: torch.Tensor, on_lost: str = "drop", reduce: str = "owner"
    ) -> torch.Tensor:
        """``[num_tokens, hidden]``: the output of ``rank`` in ``step`` when its outcome is ``codes``.

        ``codes``: uint8 ``[num_tokens, num_topk]``, as ``outcome.codes``.
        """
        words = self.batches.words(step, rank)
        topk_idx, topk_weights = self.table.topk_idx[words], self.table.topk_weights[words]
        rows = self.table.rows[words]
        return reference.combine(
            rows, topk_idx, topk_weights, codes, reduce=reduce, placement=self.placement, on_lost=on_lost
        )

    def healthy_out(self, step: int, rank: int, reduce: str = "owner") -> torch.Tensor:
        """``[num_tokens, hidden]``: the output of ``rank`` in ``step`` when nothing is lost."""
        num_topk = self.table.topk_idx.shape[1]
        everything = torch.full((self.batches.num_tokens, num_topk), reference.DELIVERED, dtype=torch.uint8)
        return self.expected_out(step, rank, everything, reduce=reduce)

    def _source_words(self, step: int, sources: torch.Tensor) -> torch.Tensor:
        sources = sources.long()
        return self.batches.step_words(step)[sources[:, 2], sources[:, 3]]
