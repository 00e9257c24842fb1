"""Every misuse names its argument and says what to do; the group works afterwards as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fault_a2a import reference
from fault_a2a.buffer import Buffer
from fault_a2a.config import Config
from fault_a2a.rounds import Handle, Received
from fault_a2a.testing.virtual import VirtualRanks
from tests.rig import Checker, Tally, Work

NUM_RANKS, CULPRIT = 3, 1
T, K, E, H = 4, 2, 7, 16
# Advice is an imperative, or names what is allowed.
ADVICE = ("give", "pass", "call", "combine", "construct", "convert", "close")


pytestmark = pytest.mark.usefixtures("one_thread")


def config_of(recv_format: str = "batched", **changes: object) -> Config:
    fields: dict = {"num_experts": E, "hidden": H, "num_topk": K, "num_max_tokens_per_rank": T, "settle_ms": 5}
    return Config(**{**fields, "recv_format": recv_format, **changes})


@pytest.fixture(scope="module", params=["batched", "packed"])
def ranks(request: pytest.FixtureRequest) -> Iterator[VirtualRanks]:
    """One group for all misuse of one format: each test leaves it as it must have found it."""
    with VirtualRanks(NUM_RANKS, config_of(request.param)) as group:
        yield group


def check_works(ranks: VirtualRanks, num_rounds: int = 2, members: list[int] | None = None) -> list[Tally]:
    """Checked rounds on every rank, in which nothing may be lost."""
    work = Work(ranks.config, len(ranks.buffers), seed=5)
    tallies = ranks.run(lambda buffer: Checker(buffer, work).run(num_rounds), members)
    for tally in tallies:
        assert isinstance(tally, Tally), tally
        assert (tally.error, tally.corrupt, tally.rounds) == (None, [], num_rounds)
        assert tally.lost == 0
        assert members is not None or tally.unroutable == 0
    return tallies


def refused(kind: type[Exception], words: list[str], call: Callable[[], Any]) -> str:
    """``call`` raises exactly ``kind``; the text has all ``words``, and advice."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert caught.type is kind, caught.type
    for word in words:
        assert word in text, f"{word!r} is not in {text!r}"
    assert any(word in text.lower() for word in ADVICE), f"no advice in {text!r}"
    return text


def good_tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    idx = torch.tensor([[0, 6], [3, -1], [-1, -1], [5, 2]])
    return torch.ones(T, H, dtype=torch.bfloat16), idx, torch.ones(T, K)


# --- dispatch: (what is wrong, which argument becomes what, exception, words of its text)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


BAD_TOKENS: dict[str, tuple[str, Callable[[torch.Tensor], Any], type[Exception], list[str]]] = {
    "x: a list": ("x", lambda x: x.tolist(), TypeError, ["x is a list", "torch.Tensor"]),
    "x: nothing": ("x", lambda x: None, TypeError, ["x is a NoneType", "torch.Tensor"]),
    "x: numpy": ("x", lambda x: x.float().numpy(), TypeError, ["x is a ndarray", "torch.Tensor"]),
    "x: dtype": ("x", lambda x: x.float(), TypeError, ["x is torch.float32", "torch.bfloat16"]),
    "x: half": ("x", lambda x: x.half(), TypeError, ["x is torch.float16", "torch.bfloat16"]),
    "x: device": ("x", lambda x: x.to("meta"), ValueError, ["x is on meta", "x.cpu()"]),
    "x: layout": ("x", lambda x: x.to_sparse(), ValueError, ["x has the layout", "x.to_dense()"]),
    "x: hidden": ("x", lambda x: x[:, :8].contiguous(), ValueError, ["x has shape [4, 8]", "[num_tokens, 16]"]),
    "x: one dimension": ("x", lambda x: x.reshape(-1), ValueError, ["x has shape [64]", "[num_tokens, 16]"]),
    "x: three dimensions": ("x", lambda x: x[None], ValueError, ["x has shape [1, 4, 16]", "[num_tokens, 16]"]),
    "x: stride": ("x", strided, ValueError, ["x is not contiguous", "x.contiguous()"]),
    "x: expanded": ("x", lambda x: x[:1].expand(T, H), ValueError, ["x is not contiguous", "x.contiguous()"]),
    "x: too many": ("x", lambda x: x.repeat(2, 1), ValueError, ["x has 8 tokens", "num_max_tokens_per_rank = 4"]),
    "x: one too many": ("x", lambda x: x.new_ones(T + 1, H), ValueError, ["x has 5 tokens", "at most"]),
    "topk_idx: a list": ("topk_idx", lambda i: i.tolist(), TypeError, ["topk_idx is a list"]),
    "topk_idx: nothing": ("topk_idx", lambda i: None, TypeError, ["topk_idx is a NoneType"]),
    "topk_idx: float": ("topk_idx", lambda i: i.float(), TypeError, ["topk_idx is torch.float32", "torch.int64 or"]),
    "topk_idx: int16": ("topk_idx", lambda i: i.short(), TypeError, ["topk_idx is torch.int16", "torch.int32"]),
    "topk_idx: bool": ("topk_idx", lambda i: i > 0, TypeError, ["topk_idx is torch.bool"]),
    "topk_idx: device": ("topk_idx", lambda i: i.to("meta"), ValueError, ["topk_idx is on meta"]),
    "topk_idx: tokens": ("topk_idx", lambda i: i[:3], ValueError, ["topk_idx has shape [3, 2]", "[4, 2]"]),
    "topk_idx: choices": ("topk_idx", lambda i: i[:, :1].contiguous(), ValueError, ["topk_idx has shape [4, 1]"]),
    "topk_idx: flat": ("topk_idx", lambda i: i.reshape(-1), ValueError, ["topk_idx has shape [8]", "[4, 2]"]),
    "topk_idx: stride": ("topk_idx", strided, ValueError, ["topk_idx is not contiguous", "topk_idx.contiguous()"]),
    "topk_idx: too high": ("topk_idx", lambda i: put(i, 3, 1, E), ValueError, ["topk_idx[3, 1] is 7", "0 to 6"]),
    "topk_idx: too low": ("topk_idx", lambda i: put(i, 1, 1, -2), ValueError, ["topk_idx[1, 1] is -2", "-1"]),
    "topk_idx: int32": ("topk_idx", lambda i: put(i, 0, 0, 99).int(), ValueError, ["topk_idx[0, 0] is 99", "0 to 6"]),
    "topk_idx: wraps": ("topk_idx", lambda i: put(i, 0, 0, 1 << 32), ValueError, ["topk_idx[0, 0] is 4294967296"]),
    "topk_idx: repeated": ("topk_idx", lambda i: put(i, 0, 1, 0), ValueError, ["topk_idx[0]", "expert 0 twice"]),
    "topk_weights: number": ("topk_weights", lambda w: 0.5, TypeError, ["topk_weights is a float"]),
    "topk_weights: dtype": ("topk_weights", lambda w: w.bfloat16(), TypeError, ["topk_weights is torch.bfloat16"]),
    "topk_weights: double": ("topk_weights", lambda w: w.double(), TypeError, ["torch.float64", "torch.float32"]),
    "topk_weights: device": ("topk_weights", lambda w: w.to("meta"), ValueError, ["topk_weights is on meta"]),
    "topk_weights: shape": ("topk_weights", lambda w: w[:, :1].contiguous(), ValueError, ["topk_weights has shape"]),
    "topk_weights: stride": ("topk_weights", strided, ValueError, ["topk_weights is not contiguous"]),
}


def put(idx: torch.Tensor, token: int, choice: int, expert: int) -> torch.Tensor:
    idx[token, choice] = expert
    return idx


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_bad_tokens(ranks: VirtualRanks, name: str) -> None:
    argument, spoil, kind, words = BAD_TOKENS[name]
    names = ("x", "topk_idx", "topk_weights")
    tokens = dict(zip(names, good_tokens(), strict=True))
    tokens[argument] = spoil(tokens[argument])
    buffer = ranks.buffers[CULPRIT]
    before = buffer.num_rounds
    refused(kind, [argument, *words], lambda: buffer.dispatch(**tokens))
    assert buffer.num_rounds == before, "a refused call used up a round"
    check_works(ranks, 1)


@pytest.mark.parametrize("name", ["x: dtype", "x: too many", "topk_idx: too high", "topk_weights: stride", "x: device"])
def test_the_operator_refuses_as_the_method_does(ranks: VirtualRanks, name: str) -> None:
    argument, spoil, kind, _ = BAD_TOKENS[name]
    tokens = dict(zip(("x", "topk_idx", "topk_weights"), good_tokens(), strict=True))
    tokens[argument] = spoil(tokens[argument])
    buffer = ranks.buffers[CULPRIT]
    refused(kind, [argument], lambda: torch.ops.fault_a2a.dispatch(*tokens.values(), buffer.id))
    check_works(ranks, 1)


def test_an_operator_without_its_buffer(ranks: VirtualRanks) -> None:
    refused(RuntimeError, ["buffer 987654"], lambda: torch.ops.fault_a2a.dispatch(*good_tokens(), 987654))


# --- combine: misuse between a dispatch and the combine that is right

BAD_ROWS: dict[str, tuple[Callable[[torch.Tensor], Any], type[Exception], list[str]]] = {
    "list": (lambda y: y.tolist(), TypeError, ["y is a list", "torch.Tensor"]),
    "nothing": (lambda y: None, TypeError, ["y is a NoneType"]),
    "dtype": (lambda y: y.float(), TypeError, ["y is torch.float32", "torch.bfloat16"]),
    "device": (lambda y: y.to("meta"), ValueError, ["y is on meta", "y.cpu()"]),
    "hidden": (lambda y: y[..., :8].contiguous(), ValueError, ["y has shape"]),
    "rows": (lambda y: y[:-1] if y.dim() == 2 else y[:, :-1].contiguous(), ValueError, ["y has shape"]),
    "more rows": (lambda y: torch.cat([y, y]), ValueError, ["y has shape"]),
    "dimensions": (lambda y: y[None], ValueError, ["y has shape"]),
    "stride": (strided, ValueError, ["y is not contiguous", "y.contiguous()"]),
}


def in_a_round(ranks: VirtualRanks, misuse: Callable[[Buffer, Received, Handle], None]) -> None:
    """A checked round on every rank; between its verbs the culprit does ``misuse``. Then another round."""
    work = Work(ranks.config, NUM_RANKS, seed=6)

    def one(buffer: Buffer) -> Tally:
        checker, number = Checker(buffer, work), buffer.num_rounds
        received, handle = checker.dispatch(number)
        if buffer.rank == CULPRIT:
            misuse(buffer, received, handle)
        checker.combine(received, handle, number)
        return checker.tally

    for tally in ranks.run(one):
        if isinstance(tally, BaseException):
            raise tally
        assert (tally.corrupt, tally.lost, tally.unroutable) == ([], 0, 0)
    check_works(ranks, 1)


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_expert_rows(ranks: VirtualRanks, name: str) -> None:
    spoil, kind, words = BAD_ROWS[name]

    def misuse(buffer: Buffer, received: Received, handle: Handle) -> None:
        refused(kind, words, lambda: buffer.combine(spoil(received.x.clone()), handle))

    in_a_round(ranks, misuse)


@pytest.mark.parametrize("verb", ["combine", "abandon"])
@pytest.mark.parametrize("wrong", [None, 3, "handle", torch.zeros(4, dtype=torch.int64)], ids=["None", "3", "str", "t"])
def test_no_handle(ranks: VirtualRanks, verb: str, wrong: object) -> None:
    def misuse(buffer: Buffer, received: Received, handle: Handle) -> None:
        arguments = (received.x, wrong) if verb == "combine" else (wrong,)
        refused(TypeError, ["handle is a"], lambda: getattr(buffer, verb)(*arguments))

    in_a_round(ranks, misuse)


def test_handle_of_another_buffer(ranks: VirtualRanks) -> None:
    other = ranks.buffers[0]
    foreign = Handle(torch.tensor([other.id, other.num_rounds, T, 0]), torch.ones(T, K), other)

    def misuse(buffer: Buffer, received: Received, handle: Handle) -> None:
        words = [f"handle is of buffer {other.id}", str(buffer.id)]
        refused(ValueError, words, lambda: buffer.combine(received.x, foreign))
        refused(ValueError, words, lambda: buffer.abandon(foreign))

    in_a_round(ranks, misuse)


def test_handle_of_another_round_or_size(ranks: VirtualRanks) -> None:
    def misuse(buffer: Buffer, received: Received, handle: Handle) -> None:
        for word, change in ((1, 1), (1, -1), (1, 1 << 24), (1, 1 << 62), (2, 1), (2, -1)):
            tensor = handle.tensor.clone()
            tensor[word] += change
            forged = Handle(tensor, handle.topk_weights, buffer)
            refused(RuntimeError, ["handle", "not open"], lambda h=forged: buffer.combine(received.x, h))

    in_a_round(ranks, misuse)


@pytest.mark.parametrize("second", ["combine", "abandon"])
@pytest.mark.parametrize("first", ["combine", "abandon"])
def test_second_use_of_a_handle(ranks: VirtualRanks, first: str, second: str) -> None:
    def use(buffer: Buffer, verb: str, received: Received, handle: Handle) -> None:
        getattr(buffer, verb)(*((received.x, handle) if verb == "combine" else (handle,)))

    def one(buffer: Buffer) -> str:
        received, handle = buffer.dispatch(*good_tokens())
        use(buffer, first, received, handle)
        return refused(RuntimeError, ["handle's round", "not open"], lambda: use(buffer, second, received, handle))

    assert all(isinstance(result, str) for result in ranks.run(one))
    check_works(ranks)


def test_third_open_round(ranks: VirtualRanks) -> None:
    work = Work(ranks.config, NUM_RANKS, seed=7)

    def one(buffer: Buffer) -> Tally:
        checker, first = Checker(buffer, work), buffer.num_rounds
        rounds = [(*checker.dispatch(number), number) for number in (first, first + 1)]
        if buffer.rank == CULPRIT:
            for _ in range(2):
                refused(RuntimeError, ["two rounds are open"], lambda: buffer.dispatch(*good_tokens()))
        for one_round in rounds:
            checker.combine(*one_round)
        return checker.tally

    for tally in ranks.run(one):
        assert isinstance(tally, Tally), tally
        assert (tally.corrupt, tally.lost, tally.rounds) == ([], 0, 2)
    check_works(ranks)


# --- what is no misuse, though it looks like it


def test_the_newer_round_may_be_combined_first(ranks: VirtualRanks) -> None:
    work = Work(ranks.config, NUM_RANKS, seed=8)

    def one(buffer: Buffer) -> Tally:
        checker, first = Checker(buffer, work), buffer.num_rounds
        rounds = [(*checker.dispatch(number), number) for number in (first, first + 1)]
        for one_round in reversed(rounds):
            checker.combine(*one_round)
        return checker.tally

    for tally in ranks.run(one):
        assert isinstance(tally, Tally), tally
        assert (tally.corrupt, tally.lost, tally.rounds) == ([], 0, 2)
    check_works(ranks)


def test_negated_and_grad_tensors_are_taken_for_what_they_hold(ranks: VirtualRanks) -> None:
    def one(buffer: Buffer) -> bool:
        x, idx, weights = good_tokens()
        received, handle = buffer.dispatch(torch._neg_view(x).requires_grad_(), idx, weights)
        rows = received.x.reshape(-1, H)[handle.sources()[:, 0].long()]
        out, _ = buffer.combine(received.x, handle)
        return bool((rows == -1).all() and (out[0] == -2).all() and (out[2] == 0).all())

    assert ranks.run(one) == [True] * NUM_RANKS
    check_works(ranks)


# --- abandon


def test_abandon_closes_the_round_and_peers_see_lost(ranks: VirtualRanks) -> None:
    work = Work(ranks.config, NUM_RANKS, seed=9)

    def one(buffer: Buffer) -> Tally:
        checker, number = Checker(buffer, work), buffer.num_rounds
        received, handle = checker.dispatch(number)
        if buffer.rank == CULPRIT:
            buffer.abandon(handle)
            assert handle.sources().shape == (0, 5)
            return checker.tally
        outcome = checker.combine(received, handle, number)
        want = reference.outcome_codes(
            work.tokens(buffer.rank, number)[1], buffer.placement, [1] * NUM_RANKS, {CULPRIT}
        )
        assert torch.equal(outcome.codes, want)
        return checker.tally

    tallies = ranks.run(one)
    for tally in tallies:
        assert isinstance(tally, Tally), tally
        assert tally.corrupt == []
        assert (tally.lost > 0) == (tally.rank != CULPRIT)
    assert all(buffer.view.epoch == 0 and not buffer.evidence() for buffer in ranks.buffers), "nobody died"
    check_works(ranks)


# --- what else can be set


BAD_TIMEOUTS: dict[str, tuple[tuple, dict, type[Exception], list[str]]] = {
    "rank too high": ((3,), {"silence_ms": 500}, ValueError, ["rank is 3", "0 to 2"]),
    "rank too low": ((-1,), {"silence_ms": 500}, ValueError, ["rank is -1", "0 to 2"]),
    "rank of a wrong type": (("0",), {"silence_ms": 500}, TypeError, ["rank", "whole number"]),
    "no silence": ((0,), {"silence_ms": 0}, ValueError, ["silence_ms is 0", "40 to"]),
    "negative stall": ((0,), {"stall_ms": -5}, ValueError, ["stall_ms is -5", "1 to"]),
    "shorter than four beats": ((0,), {"silence_ms": 39}, ValueError, ["silence_ms is 39", "40 to"]),
    "longer than a day": ((0,), {"stall_ms": 10**12}, ValueError, ["stall_ms", "86400000"]),
    "more than an int64": ((0,), {"silence_ms": 10**30}, ValueError, ["silence_ms", "86400000"]),
    "half a millisecond": ((0,), {"silence_ms": 50.5}, TypeError, ["silence_ms", "whole number"]),
    "yes": ((0,), {"stall_ms": True}, TypeError, ["stall_ms", "whole number"]),
    "text": ((0,), {"stall_ms": "100"}, TypeError, ["stall_ms", "whole number"]),
}


@pytest.mark.parametrize("name", BAD_TIMEOUTS)
def test_bad_timeouts(ranks: VirtualRanks, name: str) -> None:
    positional, named, kind, words = BAD_TIMEOUTS[name]
    refused(kind, words, lambda: ranks.buffers[CULPRIT].set_timeouts(*positional, **named))
    check_works(ranks, 1)


def test_good_timeouts(ranks: VirtualRanks) -> None:
    buffer = ranks.buffers[CULPRIT]
    for named in ({}, {"silence_ms": 40}, {"stall_ms": 50}, {"silence_ms": 24 * 3600 * 1000, "stall_ms": 30000}):
        for rank in range(NUM_RANKS):
            buffer.set_timeouts(rank, **named)
        check_works(ranks, 1)
    for rank in range(NUM_RANKS):
        buffer.set_timeouts(rank, silence_ms=2000, stall_ms=30000)


def test_callback_that_is_none(ranks: VirtualRanks) -> None:
    refused(TypeError, ["callback is a NoneType"], lambda: ranks.buffers[CULPRIT].on_view_change(None))


def test_fault_that_does_not_exist(ranks: VirtualRanks) -> None:
    buffer = ranks.buffers[CULPRIT]
    refused(ValueError, ["phase is 'dispatch.nap'", "dispatch.gate"], lambda: buffer.arm("dispatch.nap", 1, "crash"))
    with pytest.raises(ValueError, match="action must be kill, stop, sleep_us or crash"):
        buffer.arm("dispatch.gate", 1, "nap")
    check_works(ranks, 1)
