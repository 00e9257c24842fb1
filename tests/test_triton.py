"""Triton's kernels in their interpreter: the reference's bits and the CPU's faults, on shapes as small as they can be.

A look of an interpreted wait takes a millisecond, and a round half a second of processor time: so few tests, each of
several things. Nothing here was run on a GPU.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence

import pytest
import torch

from fault_a2a.buffer import Buffer
from fault_a2a.config import Config
from fault_a2a.core_fields import phases
from fault_a2a.errors import ClosedError
from fault_a2a.reference import combine, same_bits
from fault_a2a.testing.virtual import VirtualRanks
from tests.groups import name_of
from tests.rig import Checker, Tally, Work, raised, run_checked, run_two_open, views_agree
from tests.test_conformance import FORMATS, RoutedWork, config_of, conform

pytest.importorskip("triton", reason="install triton==3.7.1: requirements-dev.txt has it")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # numpy, which interprets, has an opinion on infinities.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

TINY = {"num_experts": 5, "hidden": 24, "num_topk": 2, "num_max_tokens_per_rank": 3}
FP8 = torch.float8_e4m3fn


def tiny(formats: tuple = FORMATS[0], **changes: object) -> Config:
    return config_of(formats, **{**TINY, **changes})


def group(num_ranks: int, config: Config, *backends: str, **extra: object) -> VirtualRanks:
    return VirtualRanks(num_ranks, config, backends=backends or ("triton",), poison=True, **extra)


# --- the reference's bits


@pytest.mark.parametrize(
    "formats", [FORMATS[0], *(pytest.param(FORMATS[one], marks=pytest.mark.slow) for one in (15, 20))], ids=name_of
)
def test_all_alive(formats: tuple) -> None:
    config = tiny(formats)
    with group(2, config) as ranks:
        conform(ranks, RoutedWork(config, 2, seed=1))


def slow_or_exhaustive(number: int, every: int) -> pytest.MarkDecorator:
    """Of cases that take ten seconds each CI runs some; all of them: make test ARGS="-m 'slow or exhaustive'"."""
    return pytest.mark.slow if number % every == 3 else pytest.mark.exhaustive


@pytest.mark.parametrize(
    "formats",
    [
        pytest.param(formats, marks=slow_or_exhaustive(number, 8), id=name_of(formats))
        for number, formats in enumerate(FORMATS)
    ],
)
@pytest.mark.parametrize("backends", [("triton",), ("triton", "cpu")], ids=["triton", "mixed"])
def test_all_formats(formats: tuple, backends: tuple[str, ...]) -> None:
    config = tiny(formats)
    with group(3, config, *backends) as ranks:
        conform(ranks, RoutedWork(config, 3, seed=1))


@pytest.mark.parametrize(
    "formats",
    [*(pytest.param(one, marks=pytest.mark.slow) for one in (FORMATS[1], FORMATS[12])), FORMATS[23]],
    ids=name_of,
)
def test_one_dead_before(formats: tuple) -> None:
    config = tiny(formats)
    with group(3, config, "triton", "cpu") as ranks:
        conform(ranks, RoutedWork(config, 3, seed=2), victim=1)


@pytest.mark.parametrize(
    "phase",
    [
        pytest.param(
            phase,
            marks=[] if phase in ("dispatch.half_signalled", "combine.reduce") else slow_or_exhaustive(number, 5),
        )
        for number, phase in enumerate(phases())
    ],
)
def test_one_dies_inside_a_round(phase: str) -> None:
    """Of three ranks, of which the one between is the CPU's: the victims are of both kinds."""
    config = tiny(FORMATS[phases().index(phase) % len(FORMATS)])
    with group(3, config, "triton", "cpu") as ranks:
        conform(ranks, RoutedWork(config, 3, seed=4), victim=phases().index(phase) % 3, phase=phase)


@pytest.mark.parametrize(
    ("scale", "weights_at"),
    [
        *(("float32", "expert"), ("ue8m0", "owner")),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in (("float32", "owner"), ("ue8m0", "expert"))),
    ],
)
def test_fp8(scale: str, weights_at: str) -> None:
    """Rows quantised on the way out, a short last block and padded scales included, by either machine alike."""
    scale_dtype = torch.float32 if scale == "float32" else torch.int32
    config = tiny(hidden=136, dispatch_dtype=FP8, scale_dtype=scale_dtype, weights_at=weights_at)
    with group(2, config, "triton", "cpu") as ranks:
        for tally in run_checked(ranks, Work(config, 2, seed=3), 2):
            assert tally.error is None and not tally.corrupt, tally.corrupt


def test_rows_that_come_quantised() -> None:
    config = tiny(dispatch_dtype=torch.int8, num_scales=3)

    def one(buffer: Buffer) -> bool:
        generator = torch.Generator().manual_seed(buffer.rank)
        x = torch.randint(-128, 128, (3, config.hidden), generator=generator).to(torch.int8)
        scales = torch.rand(3, 3, generator=generator)
        received, handle = buffer.dispatch(x, torch.tensor([[0, 4], [2, -1], [3, 1]]), torch.ones(3, 2), scales)
        flat, flat_scales = received.x.reshape(-1, config.hidden), received.scales.reshape(-1, 3)
        whole = True
        for row, _, src, token, _ in handle.sources().tolist():
            theirs = torch.Generator().manual_seed(src)
            sent = torch.randint(-128, 128, (3, config.hidden), generator=theirs).to(torch.int8)
            sent_scales = torch.rand(3, 3, generator=theirs)
            whole &= torch.equal(flat[row], sent[token]) and torch.equal(flat_scales[row], sent_scales[token])
        buffer.abandon(handle)
        return whole

    with group(2, config, "triton", "cpu") as ranks:
        assert ranks.run(one) == [True, True]


def outputs(config: Config, backends: Sequence[str]) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """(out, delivered) of each round of each rank, of a group whose rank 1 dies in mid-dispatch of the second round.

    Whether the round after it is in the new view already, and its choices unroutable or lost, is up to chance.
    """
    work = Work(config, 3, seed=8)

    def one(buffer: Buffer) -> list[tuple[torch.Tensor, torch.Tensor]]:
        checker, seen = Checker(buffer, work), []
        try:
            for _ in range(4):
                number = buffer.num_rounds
                received, handle = checker.dispatch(number)
                out, outcome = buffer.combine(checker.experts(received), handle)
                seen.append((out, outcome.delivered))
        except ClosedError:
            assert buffer.rank == 1
        return seen

    with group(3, config, *backends) as ranks:
        ranks.buffers[1].arm("dispatch.half_signalled", ranks.buffers[0].num_rounds + 1, "crash")
        found = raised(ranks.run(one))
        assert views_agree(ranks)
    return found


@pytest.mark.parametrize("reduce", ["owner", pytest.param("expert", marks=pytest.mark.slow)])
def test_a_mixed_group_has_the_bits_of_a_cpu_group(reduce: str) -> None:
    config = tiny((torch.bfloat16, "batched", reduce, "drop"))
    mixed, plain = outputs(config, ("cpu", "triton", "cpu")), outputs(config, ("cpu",))
    assert [len(rounds) for rounds in mixed] == [len(rounds) for rounds in plain] == [4, 1, 4]
    for one, other in zip(itertools.chain(*mixed), itertools.chain(*plain), strict=True):
        assert torch.equal(one[1], other[1]) and same_bits(one[0], other[0]).all()


# --- lanes, halves, numbers over their ends


def test_two_rounds_open_over_the_end_of_the_round_number() -> None:
    config = tiny()
    with group(2, config, "triton", "cpu", first_round=(1 << 24) - 2, first_epoch=255) as ranks:
        for tally in run_two_open(ranks, Work(config, 2, seed=5), 4):
            assert tally.error is None and not tally.corrupt and tally.lost == 0, tally


def test_misuse_is_told_before_anything_is_sent() -> None:
    config = tiny()
    with group(1, config) as ranks:
        buffer, x, weights = ranks.buffers[0], torch.zeros(2, 24, dtype=torch.bfloat16), torch.ones(2, 2)
        for idx, text in (([[0, 1], [2, 5]], r"topk_idx\[1, 1\] is 5"), ([[0, 1], [3, 3]], r"names expert 3 twice")):
            with pytest.raises(ValueError, match=text):
                buffer.dispatch(x, torch.tensor(idx), weights)
        handles = [buffer.dispatch(x, torch.tensor([[0, 1], [2, -1]], dtype=torch.int32), weights)[1] for _ in "01"]
        with pytest.raises(RuntimeError, match="two rounds are open"):
            buffer.dispatch(x, torch.tensor([[0, 1], [2, 3]]), weights)
        buffer.abandon(handles[0])
        received, handle, hook = buffer.dispatch(x, torch.tensor([[0, 1], [2, 3]]), weights, return_recv_hook=True)
        with pytest.raises(RuntimeError, match="call the hook"):
            buffer.combine(received.x, handle)
        hook()
        assert int(received.num_tokens.sum()) == 4
        assert buffer.source_stats()[0].num_rows > 0
    with pytest.raises(ValueError, match="backend: 'triton' sends every batch in one chunk"):
        Config(**TINY, backend="triton", num_chunk_tokens=2)


def test_weights_that_come_with_the_sums_and_memory_for_them() -> None:
    config = tiny()
    work = Work(config, 1, seed=9)
    with group(1, config) as ranks:
        buffer, (x, idx, weights) = ranks.buffers[0], work.tokens(0, 0)
        received, handle = buffer.dispatch(x, idx, torch.full_like(weights, 7.0))
        out = torch.full_like(x, float("nan"))
        returned, outcome = buffer.combine(received.x, handle, out=out, topk_weights=weights)
        rows = x[:, None].expand(-1, config.num_topk, -1)
        assert returned is out and same_bits(out, combine(rows, idx, weights, outcome.codes)).all()
        assert buffer.verbs.stats()["num_lost"] == buffer.verbs.stats()["num_unroutable"] == 0


# --- waits end


def test_a_peer_that_beats_and_does_not_come_is_a_stall() -> None:
    # Interpreted work itself may take a second on a busy machine, and shows nothing while it does.
    config = tiny(stall_ms=3000, settle_ms=5)

    def one(buffer: Buffer) -> Tally:
        checker = Checker(buffer, Work(config, 2, seed=6))
        return checker.run(1) if buffer.rank == 1 else checker.run(3)

    with group(2, config, "triton", "cpu") as ranks:
        tallies = raised(ranks.run(one))
        assert [evidence.kind for evidence in ranks.buffers[0].evidence()] == ["stall"]
    assert tallies[0].error is None and tallies[0].rounds == 3 and not tallies[0].corrupt
    assert tallies[0].lost > 0 and tallies[0].unroutable > 0


def waits_until_closed(plant: int, within_s: float = 5.0) -> bool:
    """Rank 0 waits for one that never comes, and is closed meanwhile: does its call end?"""
    config = tiny()
    with group(2, config, "triton", "cpu") as ranks:
        buffer, ended = ranks.buffers[0], []
        buffer.verbs.plant = plant  # type: ignore[attr-defined]

        def wait() -> None:
            try:
                buffer.dispatch(torch.zeros(1, 24, dtype=torch.bfloat16), torch.tensor([[0, 1]]), torch.ones(1, 2))
            except ClosedError:
                ended.append(time.monotonic())

        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(1.0)
        closing = threading.Thread(target=buffer.close)
        closing.start()
        waiting.join(within_s)
        ends = not waiting.is_alive()
        buffer.verbs.plant = 0  # type: ignore[attr-defined]  # lets the planted wait end as well
        waiting.join()
        closing.join()
        assert ended
        return ends


def test_the_release_word_ends_a_wait() -> None:
    assert waits_until_closed(plant=0)


def test_a_planted_unbounded_wait_is_found() -> None:
    from fault_a2a.kernels.triton.rank import PLANT_UNBOUNDED

    assert not waits_until_closed(PLANT_UNBOUNDED, within_s=2.0)
