"""torch.ops.fault_a2a under torch's own checks and compilers: same shapes, same bits, and every round is run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fault_a2a import ops, reference
from fault_a2a.buffer import Buffer
from fault_a2a.config import Config
from fault_a2a.testing.virtual import VirtualRanks
from tests.rig import Work

T, K, E, H = 4, 2, 5, 8
OPS = {"dispatch": torch.ops.fault_a2a.dispatch, "combine": torch.ops.fault_a2a.combine}
UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(before)


def config_of(recv_format: str, **changes: object) -> Config:
    fields: dict = {"num_experts": E, "hidden": H, "num_topk": K, "num_max_tokens_per_rank": T}
    # Compilation lasts, and the peer waits for it in a round.
    return Config(**{**fields, "recv_format": recv_format, "stall_ms": 600_000, "link_ms": 600_000, **changes})


@pytest.fixture(params=["batched", "packed"])
def buffer(request: pytest.FixtureRequest) -> Iterator[Buffer]:
    """A rank alone."""
    with VirtualRanks(1, config_of(request.param)) as ranks:
        yield ranks.buffers[0]


def tokens_of(buffer: Buffer, num_tokens: int = T, seed: int = 0) -> Tokens:
    return Work(buffer.config, buffer.num_ranks, seed, num_tokens).tokens(buffer.rank, 0)


# --- opcheck


class OneRoundPerCall:
    """Stands in for a buffer, so that an operator called twice with one set of arguments gives one answer twice.

    opcheck compares a call with a second, traced one. A round happens once: the handle has its number, and is good for
    one combine. So each call here is a round of its own on the real buffer, and what differs by nature is made equal:
    the number in the handle, and the rows of recv.x behind the received ones.
    """

    def __init__(self, buffer: Buffer) -> None:
        self.buffer, self.tokens = buffer, tokens_of(buffer)
        self.config, self.num_local_experts, self.recv_shape = (
            buffer.config,
            buffer.num_local_experts,
            buffer.recv_shape,
        )
        self.scales_shape, self.weights_shape = buffer.scales_shape, buffer.weights_shape
        self.id = ops.register(self)  # type: ignore[arg-type]

    def _dispatch(self, *tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        recv_x, num_tokens, offsets, handle, *nothing = self.buffer._dispatch(*tokens)
        self.buffer._combine(recv_x, tokens[2], handle)
        handle[:2] = torch.tensor([self.id, 0])
        written = torch.zeros(self.recv_shape[:-1], dtype=torch.bool).view(-1)
        written[received_rows(self.buffer, num_tokens, offsets)] = True
        return recv_x.masked_fill(~written.view(*self.recv_shape[:-1], 1), 0), num_tokens, offsets, handle, *nothing

    def _combine(self, y: torch.Tensor, topk_weights: torch.Tensor, handle: torch.Tensor) -> tuple[torch.Tensor, ...]:
        _, _, _, real_handle, *_ = self.buffer._dispatch(*self.tokens)
        assert handle[2:].equal(real_handle[2:])
        return self.buffer._combine(y, topk_weights, real_handle)


def received_rows(buffer: Buffer, num_tokens: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Which rows of recv.x, seen as two-dimensional, were received."""
    firsts = [e * buffer.capacity for e in range(len(num_tokens))]
    if buffer.config.recv_format == "packed":
        firsts = offsets[:-1].tolist()
    spans = [torch.arange(first, first + n) for first, n in zip(firsts, num_tokens.tolist(), strict=True)]
    return torch.cat(spans)


@pytest.mark.parametrize("util", UTILS)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(buffer: Buffer, name: str, util: str) -> None:
    one = OneRoundPerCall(buffer)
    arguments: tuple = (*one.tokens, one.id)
    if name == "combine":
        recv_x, _, _, handle, *_ = OPS["dispatch"](*arguments)
        arguments = (recv_x.clone(), one.tokens[2], handle, one.id)
    before = buffer.num_rounds
    torch.library.opcheck(OPS[name].default, arguments, test_utils=util)
    assert buffer.num_rounds > before or util == "test_autograd_registration"


@pytest.mark.parametrize("util", UTILS[:3])
@pytest.mark.parametrize("name", OPS)
def test_opcheck_on_the_buffer_itself(buffer: Buffer, name: str, util: str) -> None:
    """All but the check that compares two calls."""
    arguments: tuple = (*tokens_of(buffer), buffer.id)
    if name == "combine":
        recv_x, _, _, handle, *_ = OPS["dispatch"](*arguments)
        arguments = (recv_x.clone(), arguments[2], handle, buffer.id)
    torch.library.opcheck(OPS[name].default, arguments, test_utils=util)


# --- fake kernels


@pytest.mark.parametrize("num_tokens", [0, 1, T])
@pytest.mark.parametrize("placement", [None, [1] * E])
@pytest.mark.parametrize("recv_format", ["batched", "packed"])
def test_fake_shapes_are_the_real_ones(recv_format: str, placement: list[int] | None, num_tokens: int) -> None:
    """On both ranks of a group; with the placement, one of them has no expert."""

    def both_verbs(buffer: Buffer, tokens: Tokens) -> list[torch.Tensor]:
        received = OPS["dispatch"](*tokens, buffer.id)
        return [*received, *OPS["combine"](received[0], tokens[2], received[3], buffer.id)]

    def one(buffer: Buffer) -> bool:
        tokens = tokens_of(buffer, num_tokens)
        with FakeTensorMode() as mode:
            fakes = both_verbs(buffer, tuple(map(mode.from_tensor, tokens)))
        real = both_verbs(buffer, tokens)
        for got, want in zip(fakes, real, strict=True):
            assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
            assert (got.stride(), got.layout) == (want.stride(), want.layout)
        return True

    with VirtualRanks(2, config_of(recv_format, placement=placement)) as ranks:
        assert ranks.run(one) == [True, True]


# --- what a model may do with them


def with_operators(buffer_id: int, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> tuple[Any, ...]:
    recv_x, num_tokens, _, handle, *_ = torch.ops.fault_a2a.dispatch(x, idx, weights, buffer_id)
    y = recv_x * 1.5  # one operation, one rounding: no compiler makes other bits of it
    out, codes, lost = torch.ops.fault_a2a.combine(y, weights, handle, buffer_id)
    return out, codes, lost, num_tokens


def with_methods(buffer: Buffer, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> tuple[Any, ...]:
    received, handle = buffer.dispatch(x, idx, weights)
    out, outcome = buffer.combine(received.x * 1.5, handle)
    return out, outcome.codes, outcome.lost, outcome.delivered, received.num_tokens


def layers_of(buffer: Buffer) -> dict[str, Callable[..., tuple[Any, ...]]]:
    return {"operators": partial(with_operators, buffer.id), "methods": partial(with_methods, buffer)}


def check_same_bits(compiled: tuple[Any, ...], eager: tuple[Any, ...]) -> None:
    for got, want in zip(compiled, eager, strict=True):
        assert reference.same_bits(got, want).all(), f"{got} is not {want}"


@pytest.mark.parametrize("style", ["operators", "methods"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_gives_the_same_bits(buffer: Buffer, style: str, dynamic: bool | None) -> None:
    layer = layers_of(buffer)[style]
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_tokens in (T, 0, 1, 3, T):
        tokens = tokens_of(buffer, num_tokens, seed=num_tokens)
        before = buffer.num_rounds
        check_same_bits(compiled(*tokens), layer(*tokens))
        assert buffer.num_rounds == before + 2


def test_one_compiled_layer_serves_many_buffers() -> None:
    """A number that changes from call to call is what a compiler likes to leave open; the buffer's must not be."""
    compiled = torch.compile(with_methods, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        with VirtualRanks(1, config_of("batched")) as ranks:
            buffer = ranks.buffers[0]
            check_same_bits(compiled(buffer, *tokens_of(buffer)), with_methods(buffer, *tokens_of(buffer)))


def test_misuse_of_a_compiled_layer(buffer: Buffer) -> None:
    layer = layers_of(buffer)["methods"]
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for _ in range(2):
        check_same_bits(compiled(*tokens_of(buffer)), layer(*tokens_of(buffer)))
        too_many = (torch.cat([tensor, tensor]) for tensor in tokens_of(buffer))
        with pytest.raises(ValueError, match=r"x has 8 tokens; give at most num_max_tokens_per_rank = 4"):
            compiled(*too_many)


def test_inference_only(buffer: Buffer) -> None:
    x, idx, weights = tokens_of(buffer)
    received, handle = buffer.dispatch(x.requires_grad_(), idx, weights)
    out, _ = buffer.combine(torch.ones_like(received.x).requires_grad_(), handle)
    assert not received.x.requires_grad
    assert not out.requires_grad
    with torch.inference_mode():
        check_same_bits(layers_of(buffer)["methods"](x, idx, weights), layers_of(buffer)["methods"](x, idx, weights))


def output_unread(buffer: Buffer, tokens: Tokens) -> torch.Tensor:
    with_operators(buffer.id, *tokens)
    return tokens[0] * 2


def combine_unread(buffer: Buffer, tokens: Tokens) -> torch.Tensor:
    return with_operators(buffer.id, *tokens)[3]


def twice_the_same(buffer: Buffer, tokens: Tokens) -> torch.Tensor:
    return with_operators(buffer.id, *tokens)[0] + with_operators(buffer.id, *tokens)[0]


def two_open(buffer: Buffer, tokens: Tokens) -> torch.Tensor:
    (first, first_handle), (second, second_handle) = (buffer.dispatch(*tokens) for _ in range(2))
    return buffer.combine(second.x * 2, second_handle)[0] - buffer.combine(first.x * 3, first_handle)[0]


@pytest.mark.parametrize("model", [output_unread, combine_unread, twice_the_same, two_open])
def test_no_round_is_dropped_or_merged(buffer: Buffer, model: Callable[..., torch.Tensor]) -> None:
    """Peers wait for every round: one that a compiler finds useless is a round in which this rank hangs them all."""
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = buffer.num_rounds
    got = compiled(buffer, tokens_of(buffer))
    num_compiled = buffer.num_rounds - before
    want = model(buffer, tokens_of(buffer))
    assert num_compiled == buffer.num_rounds - before - num_compiled > 0
    assert reference.same_bits(got, want).all()
    assert all(buffer.core.open_tokens(number) < 0 for number in range(buffer.num_rounds)), "a round was left open"


def test_dispatch_alone_is_run(buffer: Buffer) -> None:
    def model(x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        torch.ops.fault_a2a.dispatch(x, idx, weights, buffer.id)
        return x * 2

    before = buffer.num_rounds
    torch.compile(model, fullgraph=True, backend="aot_eager")(*tokens_of(buffer))
    assert buffer.num_rounds == before + 1


def test_rows_stay_what_they_were(buffer: Buffer) -> None:
    """Whoever keeps recv.x or out keeps these rows, though many rounds use the same slots after."""
    kept = []
    for seed in range(6):
        received, handle = buffer.dispatch(*tokens_of(buffer, seed=seed))
        rows = received_rows(buffer, received.num_tokens, received.offsets)
        out, outcome = buffer.combine(received.x.clone(), handle)
        mine = (received.x.view(-1, H), rows), (out, slice(None)), (outcome.codes, slice(None))
        kept += [(tensor, where, tensor[where].clone()) for tensor, where in mine]
    for tensor, where, copy in kept:
        assert torch.equal(tensor[where], copy)


# --- in a group


@pytest.mark.parametrize("recv_format", ["batched", "packed"])
def test_compiled_ranks_of_a_group(recv_format: str) -> None:
    """Each rank compiles for itself; then one dies, and the compiled layer says so as the eager one does."""

    def one(buffer: Buffer) -> list[torch.Tensor]:
        compiled = torch.compile(layers_of(buffer)["methods"], fullgraph=True, backend="aot_eager")
        for seed in range(4):
            tokens = tokens_of(buffer, seed=seed)
            check_same_bits(compiled(*tokens), layers_of(buffer)["methods"](*tokens))
        if buffer.rank == 1:
            buffer.close()
            return []
        codes = []
        for seed in range(4):
            x, idx, weights = tokens_of(buffer, seed=seed)
            out, code, lost, delivered, _ = compiled(x, idx, weights)
            chosen = (x * 1.5)[:, None].expand(-1, K, -1)
            assert reference.same_bits(out, reference.combine(chosen, idx, weights, delivered)).all()
            assert bool(lost) == bool((code == reference.LOST).any())
            codes.append(code)
        want = reference.outcome_codes(idx, buffer.placement, [1, 0])
        assert torch.equal(codes[-1], want), "by now the group is without rank 1"
        return codes

    with VirtualRanks(2, config_of(recv_format)) as ranks:
        for result in ranks.run(one):
            assert not isinstance(result, BaseException), result


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles for the CPU with g++")
def test_inductor(buffer: Buffer) -> None:
    """Inductor computes in place where it may, and frees what nobody needs: y stands in the memory of recv.x."""
    from torch._inductor.utils import fresh_cache

    def model(x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with_operators(buffer.id, x, idx, weights)  # nobody reads it
        recv_x, num_tokens, offsets, handle, *_ = torch.ops.fault_a2a.dispatch(x, idx, weights, buffer.id)
        y = recv_x * 1.5
        out, codes, lost = torch.ops.fault_a2a.combine(y, weights, handle, buffer.id)
        again = with_operators(buffer.id, out, idx, weights)
        return out, codes, lost, *again, num_tokens, offsets, y

    with fresh_cache():
        compiled = torch.compile(model, fullgraph=True, backend="inductor")
        kept = []
        for seed in range(3):
            before = buffer.num_rounds
            got = compiled(*tokens_of(buffer, seed=seed))
            assert buffer.num_rounds == before + 3
            want = model(*tokens_of(buffer, seed=seed))
            check_same_bits(got[:-1], want[:-1])
            rows = received_rows(buffer, want[-3], want[-2])
            kept.append((got[-1].view(-1, H), rows, want[-1].view(-1, H)[rows]))
    for y, rows, copy in kept:
        assert torch.equal(y[rows], copy), "a later round wrote into y"
