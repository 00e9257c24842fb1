"""The CUDA kernels' own sources, run by their twin: guards, planted bugs, formats, hooks, and groups with CPU ranks.

`tests/test_conformance.py` runs them against the reference; here is what is particular to them. Not run on a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial

import pytest
import torch

from fault_a2a._core import core
from fault_a2a.config import Config
from fault_a2a.testing.virtual import VirtualRanks
from tests import rig, scenarios, stall_scenarios
from tests.apart import exit_code
from tests.ballots import ROOT
from tests.rig import Checker, Tally, Work, raised, run_checked, shown
from tests.scenarios import Wrong, without
from tests.test_guards import TABLE

pytestmark = pytest.mark.usefixtures("one_thread")

BOTH = ("cuda-host", "cpu")

# A batch in one chunk, and as a stream of three.
in_chunks = pytest.mark.parametrize("num_chunk_tokens", [6, 2])


def small(**changes: object) -> Config:
    fields: dict = {"num_experts": 8, "hidden": 64, "num_topk": 3, "num_max_tokens_per_rank": 6, "settle_ms": 20}
    return Config(**{**fields, "backend": "cuda-host", **changes})


@contextmanager
def planted(*bugs: str) -> Iterator[None]:
    """The named bugs are in the kernels of this process for as long as this lasts."""
    core.set_planted_bugs(sum(1 << core.planted_bug_names.index(bug) for bug in bugs))
    try:
        yield
    finally:
        core.set_planted_bugs(0)


def run_rounds(
    seed: int,
    weak: bool,
    num_ranks: int = 3,
    num_rounds: int = 6,
    num_sms: int | None = None,
    num_chunk_tokens: int = 6,
    **extra: object,
) -> Wrong:
    """What went wrong in a few rounds in which nobody fails; also that a call ended with an error."""
    config = small(num_sms=num_sms, num_chunk_tokens=num_chunk_tokens)
    try:
        with VirtualRanks(num_ranks, config, poison=True, twin_seed=seed, twin_weak=weak, **extra) as ranks:
            tallies = run_checked(ranks, Work(config, num_ranks, seed), num_rounds)
            lost = [f"rank {tally.rank} lost {tally.lost}" for tally in tallies if tally.lost]
            return scenarios.corrupt(tallies) + lost
    except (RuntimeError, ValueError) as error:
        return [str(error)]


# --- any order of threads, any order of stores


@in_chunks
@pytest.mark.parametrize("seed", [*range(1, 5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 9))])
@pytest.mark.parametrize("weak", [False, True], ids=["strong", "weak"])
def test_rounds_in_any_order(seed: int, weak: bool, num_chunk_tokens: int) -> None:
    shapes = [(1, 32), (2, 64), (3, 32), (4, 96)]
    num_sms, num_threads = shapes[seed % len(shapes)]
    shape = {"num_sms": num_sms, "twin_threads": num_threads, "num_chunk_tokens": num_chunk_tokens}
    assert run_rounds(seed, weak, **shape) == []


@in_chunks
def test_other_blocks_and_threads_than_ranks(num_chunk_tokens: int) -> None:
    """More ranks than warps: a warp counts for several."""
    shape = {"num_ranks": 7, "num_rounds": 3, "twin_threads": 32}
    assert run_rounds(1, weak=True, num_chunk_tokens=num_chunk_tokens, **shape) == []


@in_chunks
def test_more_ranks_than_threads(num_chunk_tokens: int) -> None:
    """A thread waits for several peers."""
    shape = {"num_ranks": 34, "num_rounds": 2, "twin_threads": 32, "num_sms": 1}
    assert run_rounds(1, weak=False, num_chunk_tokens=num_chunk_tokens, **shape) == []


# --- planted bugs: each is found


@in_chunks
@pytest.mark.parametrize("bug", ["no_fence", "relaxed_signal"])
def test_a_missing_fence_is_found_in_the_weak_mode(bug: str, num_chunk_tokens: int) -> None:
    run = partial(run_rounds, num_chunk_tokens=num_chunk_tokens)
    with planted(bug):
        assert any(run(seed, weak=True) for seed in range(1, 5))
        assert not run(1, weak=False), "x86 hides it; if it does not, the weak mode is not what finds it"


@pytest.mark.parametrize("bug", ["no_barrier", "no_list_barrier"])
def test_a_missing_barrier_is_found(bug: str) -> None:
    assert exit_code_of(run_rounds_of_three_seeds, bug) != 0 == exit_code_of(run_rounds_of_three_seeds)


def run_rounds_of_three_seeds() -> Wrong:
    return [wrong for seed in range(1, 4) for wrong in run_rounds(seed, weak=True)]


def test_a_view_that_is_read_twice_is_found() -> None:
    with planted("view_twice"), all_on("cuda-host"):
        assert any(scenarios.death_between_dispatch_and_combine() for _ in range(3))


def lying_about_counts() -> Wrong:
    """A CPU rank writes row counts that no slot has; the CUDA ranks must refuse it before they count anything."""
    with all_on(*BOTH):
        return scenarios.lying("count")


def test_a_count_that_is_not_clamped_is_found() -> None:
    assert exit_code_of(lying_about_counts, "count_unclamped") != 0 == exit_code_of(lying_about_counts)


@cache
def exit_code_of(call: Callable[[], Wrong], *bugs: str) -> int:
    """Of a process in which the bugs are planted; a bug may as well end it itself."""
    return exit_code(partial(with_bugs, call, bugs))


def with_bugs(call: Callable[[], Wrong], bugs: tuple[str, ...]) -> Wrong:
    with planted(*bugs):
        return call()


# --- the guards, in these kernels


@contextmanager
def all_on(*backends: str) -> Iterator[None]:
    """The groups of tests/scenarios.py run on these backends, the ranks in turn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenarios, "VirtualRanks", partial(VirtualRanks, backends=backends))
        yield


# The others are the host's business, the same on any backend.
GUARDS = {
    **dict.fromkeys(("consent", "recheck", "hold", "later_declined", "round_compare", "third_round"), ("cuda-host",)),
    **dict.fromkeys(("tick", "mutual_wait", "incarnation", "view_once", "evicted_is_suspect"), ("cuda-host",)),
    "release_word": ("cuda-host",),
    # Liars are CPU ranks: rank 1.
    **dict.fromkeys(("epoch_compare", "claims_met", "combine_count", "one_answer"), BOTH),
    # Of streams.
    **dict.fromkeys(("chunk_compare", "chunk_consent", "fresh_words"), ("cuda-host",)),
}
# Those that a stream's kernels ask anew, for which it has words of its own, or which it asks in places of its own; with
# what the group's settings must be. A row that was stored without consent is taken with the last chunk of its source
# only: of a longer stream, what its source has given up is declined, and that ends it.
GUARDS_IN_STREAMS = (
    *("incarnation", "view_once", "later_declined", "epoch_compare", "combine_count", "one_answer"),
    *("consent", "recheck", "tick", "claims_met"),
)
SETTINGS_IN_STREAMS = {
    "consent": {"num_chunk_tokens": 15},
    "recheck": {"num_chunk_tokens": 15},
    "tick": {"num_max_tokens_per_rank": 24},
}
# Shown in a process of its own, since it is stopped meanwhile; in streams as well.
GUARDS_APART = {"gap_restart": stall_scenarios.stopped_host}


# Without these a call waits for seconds, here as on the CPU, where tests/test_guards.py has them.
LONG = ("recheck", "later_declined", "mutual_wait", "release_word", "evicted_is_suspect", "tick")


def long_ones_slow(guards: Iterable[str]) -> pytest.MarkDecorator:
    marks = {guard: [pytest.mark.slow] * (guard in LONG) for guard in guards}
    return pytest.mark.parametrize("guard", [pytest.param(guard, marks=marks[guard]) for guard in guards])


@long_ones_slow(GUARDS)
def test_guard(guard: str) -> None:
    check_guard(guard, TABLE[guard][0])


def check_guard(guard: str, scenario: Callable[[], Wrong]) -> None:
    """Clean with it, red without it."""
    others = TABLE[guard][1]
    with all_on(*GUARDS[guard]):
        with without(*others):
            assert shown(scenario) == []
        with without(guard, *others):
            assert any(scenario() for _ in range(3))


@contextmanager
def in_streams(**changes: int) -> Iterator[None]:
    """The groups of tests/scenarios.py send their batches in chunks of two tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenarios, "small", partial(scenarios.small, **{"num_chunk_tokens": 2, **changes}))
        yield


@long_ones_slow(GUARDS_IN_STREAMS)
def test_guard_in_streams(guard: str) -> None:
    with in_streams(**SETTINGS_IN_STREAMS.get(guard, {})):
        check_guard(guard, unmet_claims if guard == "claims_met" else TABLE[guard][0])


def unmet_claims() -> Wrong:
    """As ``lying("claims")``, of dispatches that nobody answers: with the guard out a stream's liar believes itself
    too, makes its answer to itself longer than it has asked for, and waits for room that nobody makes."""
    config = scenarios.small(num_topk=4)
    with scenarios.VirtualRanks(3, config, poison=True) as ranks:
        ranks.buffers[1].core.set_faults({"lies": scenarios.LIES["claims"], "seed": 7})
        work = Work(config, 3)

        def one(buffer: rig.Buffer) -> Tally:
            checker = Checker(buffer, work)
            for number in range(1, 9):
                buffer.abandon(checker.dispatch(number)[1])
            return checker.tally

        tallies = raised(ranks.run(one))
        if not ranks.buffers[1].core.num_faults():
            return ["no lie was told: the scenario shows nothing"]
        return scenarios.corrupt([tallies[0], tallies[2]])


# Each waits for seconds.
in_chunks_slow = pytest.mark.parametrize(
    "chunks", [nullcontext, pytest.param(in_streams, marks=pytest.mark.slow)], ids=["rounds", "streams"]
)


@in_chunks_slow
@pytest.mark.parametrize("guard", GUARDS_APART)
def test_guard_apart(guard: str, chunks: Callable[[], AbstractContextManager[None]]) -> None:
    assert exit_code(partial(found_apart, guard, chunks)) == 0
    assert any(exit_code(partial(found_apart, guard, chunks, guard)) for _ in range(3))


def found_apart(guard: str, chunks: Callable[[], AbstractContextManager[None]], *guards_out: str) -> Wrong:
    with all_on("cuda-host"), chunks(), without(*guards_out):
        return shown(GUARDS_APART[guard])


# --- what a kernel finds stalled, the host makes a suspicion of


@in_chunks_slow
@pytest.mark.parametrize("backend", ["cpu", "cuda-host"])
@pytest.mark.parametrize(
    "scenario",
    [
        stall_scenarios.hung_in_an_older_view,
        pytest.param(stall_scenarios.stalled_without_a_quorum, marks=pytest.mark.slow),
    ],
)
def test_a_stall_ends_the_wait(
    scenario: Callable[[], Wrong], backend: str, chunks: Callable[[], AbstractContextManager[None]]
) -> None:
    with all_on(backend), chunks():
        assert shown(scenario) == []


LIES = pytest.mark.parametrize("lie", ["count", "expert", "choice", "num_choices", "twice", "claims"])


@LIES
def test_no_number_of_a_liar_is_believed(lie: str) -> None:
    with all_on(*BOTH):
        assert scenarios.lying(lie) == []


@LIES
def test_no_number_of_a_liar_is_believed_in_streams(lie: str) -> None:
    with all_on(*BOTH), in_streams():
        assert scenarios.lying(lie) == []


def guards_of_streams() -> set[str]:
    """Those that a test of this file takes out in streams."""
    believed = {guard for guards, _ in BELIEVED for guard in guards}
    return {*GUARDS_IN_STREAMS, *GUARDS_APART, *believed, "chunk_compare", "chunk_consent", "fresh_words"}


def test_every_guard_of_the_kernels_of_streams_is_taken_out_in_them() -> None:
    sources = [path.read_text() for path in (ROOT / "kernels/cuda").glob("stream*.cu*")]
    asked = {guard for text in sources for guard in re.findall(r"guarded\(guard_(\w+)\)", text)}
    assert len(asked) > 5 and asked <= guards_of_streams()


BELIEVED = [(("clamp_count", "check_index"), "count"), (("check_index",), "expert")]


@pytest.mark.parametrize(("guards", "lie"), BELIEVED)
def test_a_number_that_is_believed_does_harm(guards: tuple, lie: str) -> None:
    assert exit_code(partial(believed, guards, lie)) != 0


@pytest.mark.parametrize(("guards", "lie"), BELIEVED)
def test_a_number_that_is_believed_does_harm_in_streams(guards: tuple, lie: str) -> None:
    assert exit_code(partial(believed_in_streams, guards, lie)) != 0


def believed(guards: tuple[str, ...], lie: str) -> Wrong:
    with all_on(*BOTH), without(*guards):
        return scenarios.lying(lie)


def believed_in_streams(guards: tuple[str, ...], lie: str) -> Wrong:
    with in_streams():
        return believed(guards, lie)


# --- formats


QUANTISED = {
    "e4m3, float32 scales": {"dispatch_dtype": torch.float8_e4m3fn},
    "e4m3, UE8M0 scales": {"dispatch_dtype": torch.float8_e4m3fn, "scale_dtype": torch.int32},
}


@in_chunks
@pytest.mark.parametrize("backends", [("cuda-host",), BOTH], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("quantised", QUANTISED)
def test_quantised_on_the_way_out(backends: tuple, dtype: torch.dtype, quantised: str, num_chunk_tokens: int) -> None:
    """Bit for bit what the CPU makes of a row, in a row with a shorter last block."""
    shape = {"hidden": 328, "recv_format": "packed", "num_chunk_tokens": num_chunk_tokens}
    config = small(dtype=dtype, **shape, **QUANTISED[quantised])
    with VirtualRanks(2, config, backends=backends, poison=True) as ranks:
        tallies = run_checked(ranks, Work(config, 2, 3), 4)
    assert scenarios.corrupt(tallies) == []


@in_chunks
@pytest.mark.parametrize("reduce", ["owner", "expert"])
def test_weights_at_the_expert(reduce: str, num_chunk_tokens: int) -> None:
    config = small(weights_at="expert", reduce=reduce, num_chunk_tokens=num_chunk_tokens)
    with VirtualRanks(3, config, backends=BOTH, poison=True) as ranks:
        tallies = run_checked(ranks, Work(config, 3, 4), 4)
    assert scenarios.corrupt(tallies) == []


@in_chunks
@pytest.mark.parametrize("hidden", [8, 24, 40])
def test_rows_of_bytes_with_scales(hidden: int, num_chunk_tokens: int) -> None:
    """Rows that come quantised: their payload and scales need not be whole words of 16 bytes, nor of 4."""
    scales_of = {"scale_dtype": torch.uint8, "num_scales": 3}
    config = small(hidden=hidden, dispatch_dtype=torch.int8, num_chunk_tokens=num_chunk_tokens, **scales_of)
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-128, 127, (2, 5, hidden), generator=generator, dtype=torch.int8)
    scales = torch.randint(0, 255, (2, 5, 3), generator=generator, dtype=torch.uint8)
    idx = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(10)]).reshape(2, 5, 3)

    with VirtualRanks(2, config, backends=BOTH, poison=True) as ranks:

        def one(buffer: rig.Buffer) -> int:
            mine = buffer.rank
            received, handle = buffer.dispatch(x[mine], idx[mine], torch.ones(5, 3), scales[mine])
            sources = handle.sources()
            places, srcs, tokens = sources[:, 0].long(), sources[:, 2].long(), sources[:, 3].long()
            assert torch.equal(received.x.reshape(-1, hidden)[places], x[srcs, tokens])
            assert torch.equal(received.scales.reshape(-1, 3)[places], scales[srcs, tokens])
            buffer.combine(torch.zeros(received.x.shape, dtype=config.dtype), handle)
            return len(sources)

        counts = ranks.run(one)
    assert raised(counts) and sum(counts) == 30
