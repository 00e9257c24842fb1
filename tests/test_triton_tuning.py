"""What a rank on Triton does once, while its group is constructed: it chooses blocks and compiles what rounds need.

Where there is no GPU nothing is compiled or timed. What would be is compared with what rounds launch, and clocks are
made up. Not run on a GPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="install triton==3.7.1: requirements-dev.txt has it")

import triton.language as tl

from fault_a2a.config import Config
from fault_a2a.kernels.triton import rank, tuning
from fault_a2a.kernels.triton.layout import layout_of
from fault_a2a.kernels.triton.target import INTERPRETED, NUMBERS
from fault_a2a.kernels.triton.tuning import CANDIDATES, Blocks, blocks_for, measured
from fault_a2a.reference import quantize_1x128
from fault_a2a.testing.virtual import VirtualRanks
from tests.rig import Work, run_checked
from tests.test_triton import tiny

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not INTERPRETED, reason="a GPU compiles and times by itself"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

FP8 = torch.float8_e4m3fn
Form = tuple[str, tuple[Any, ...]]


# --- compiled before the first round in which time counts


def form_of(kernel: Any, args: tuple[Any, ...]) -> Form:
    """What Triton compiles anew for: constants, the width of each number, what an address is a multiple of."""
    form: list[Any] = []
    parameters = inspect.signature(kernel.fn).parameters.values()
    for parameter, value in zip(parameters, args, strict=True):
        if parameter.annotation is tl.constexpr:
            form.append(value)
            continue
        is_wide = not -(1 << 31) <= value < 1 << 31
        assert parameter.name in NUMBERS or is_wide or value == 0, f"{parameter.name} of {kernel.fn} is no address"
        form.append((is_wide, parameter.name in NUMBERS or value % 16 == 0))
    return kernel.fn.__name__, tuple(form)


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[Form]]:
    """Everything that was launched, or compiled ahead."""
    seen: set[Form] = set()
    launch = rank.launch

    def recording(kernel: Any, num_programs: int, *args: Any) -> None:
        if num_programs:
            seen.add(form_of(kernel, args))
        launch(kernel, num_programs, *args)

    monkeypatch.setattr(rank, "launch", recording)
    monkeypatch.setattr(rank, "compile_ahead", lambda kernel, *args: seen.add(form_of(kernel, args)))
    yield seen


CONFIGS = {
    "batched": {},
    "packed, summed by the experts' ranks": {"recv_format": "packed", "reduce": "expert", "dtype": torch.float32},
    "quantised here or before": {"hidden": 136, "dispatch_dtype": FP8, "recv_format": "packed"},
    "always quantised before": {"dispatch_dtype": torch.int8, "num_scales": 4, "weights_at": "expert"},
}


def inputs_of(config: Config, idx_dtype: torch.dtype, num_tokens: int) -> Iterator[tuple[Any, ...]]:
    """A batch in each form that a caller may have it in."""
    x, idx, weights = Work(config, 1, seed=1).tokens(0, 0)
    x, idx, weights = x[:num_tokens], idx[:num_tokens].to(idx_dtype), weights[:num_tokens]
    if config.dispatch_dtype is None or config.quantizes != "never":
        yield x, idx, weights, None
    if config.quantizes != "never":
        q, scales = quantize_1x128(x)
        yield q, idx, weights, scales
    elif config.dispatch_dtype is not None:
        yield x.to(torch.int8), idx, weights, torch.ones(num_tokens, 4)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, id=name, marks=[] if name.startswith(("batched", "quantised")) else pytest.mark.slow)
        for name, changes in CONFIGS.items()
    ],
)
def test_no_round_launches_what_was_not_compiled_in_construction(changes: dict, forms: set[Form]) -> None:
    config = tiny(**changes)
    with VirtualRanks(1, config, backends=["triton"]) as ranks:
        (buffer,) = ranks.buffers
        ahead = set(forms)
        assert {"store_rows", "reduce_rows", "route", "return_rows"} <= {name for name, _ in ahead}
        batches = [*inputs_of(config, torch.int64, 3), *inputs_of(config, torch.int32, 1)]
        for batch in batches:
            received, handle = buffer.dispatch(*batch)
            y = torch.zeros(received.x.shape, dtype=config.dtype)
            late = {"topk_weights": batch[2]} if config.reduce == config.weights_at == "owner" else {}
            buffer.combine(y, handle, **late)
        buffer.abandon(buffer.dispatch(*batches[0])[1])
        assert forms <= ahead, {name for name, _ in forms - ahead}


# --- blocks


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAULT_A2A_CACHE", str(tmp_path))
    return tmp_path


class Clock:
    """The k-th candidate of each kind takes what ``times`` says."""

    def __init__(self, *times: float) -> None:
        self.times, self.num_calls = times, 0

    def __call__(self, call: Callable[[], None]) -> float:
        self.num_calls += 1
        return self.times[(self.num_calls - 1) % len(self.times)]


SLOW_FIRST = (4.0, 3.0, 1.0, 2.0, 4.0, 1.0, 3.0, 1.0)  # copies, then sums


def test_the_fastest_is_taken_and_kept(cache: Path) -> None:
    clock = Clock(*SLOW_FIRST)
    assert measured("a chip", 2048, "bfloat16", "cpu", clock) == Blocks(copy=1024, sum=512)
    assert measured("a chip", 2048, "bfloat16", "cpu", clock) == Blocks(copy=1024, sum=512)
    assert clock.num_calls == 2 * len(CANDIDATES) and len(list(cache.glob("*.blocks.json"))) == 1
    for other in (("another chip", 2048, "bfloat16"), ("a chip", 4096, "bfloat16"), ("a chip", 2048, "float16")):
        measured(*other, "cpu", clock)
    assert clock.num_calls == 8 * len(CANDIDATES)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"copy": 1024}x', '{"copy": 3, "sum": 512}', '{"blocks": 1}'])
def test_what_a_crash_or_another_version_left_is_measured_anew(cache: Path, content: str) -> None:
    measured("a chip", 2048, "bfloat16", "cpu", Clock(*SLOW_FIRST))
    (kept,) = cache.iterdir()
    kept.write_text(content)
    clock = Clock(*reversed(SLOW_FIRST))
    assert measured("a chip", 2048, "bfloat16", "cpu", clock) == Blocks(copy=256, sum=512)
    assert clock.num_calls == 2 * len(CANDIDATES)


def test_what_is_timed_runs(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each candidate's kernel, on few rows, in the interpreter."""
    launched: list[tuple[str, int]] = []

    def recording(kernel: Any, num_programs: int, *args: Any) -> None:
        launched.append((kernel.fn.__name__, args[-1]))
        launch(kernel, num_programs, *args)

    launch = tuning.launch
    monkeypatch.setattr(tuning, "launch", recording)
    monkeypatch.setattr(tuning, "NUM_ROWS", 4)
    measured("a chip", 48, "float16", "cpu", lambda call: call() or 1.0)
    assert launched == [(name, block) for name in ("unpermute_rows", "sum_rows") for block in CANDIDATES]


def test_without_a_gpu_the_choice_is_fixed(cache: Path) -> None:
    from fault_a2a.core_fields import core_fields

    fields = core_fields(tiny(hidden=8192), num_ranks=1, rank=0)
    assert blocks_for(fields) == Blocks() and not list(cache.iterdir())
    at = layout_of(fields, copy_block=256, sum_block=512)
    assert (at.copy_block, at.sum_block) == (256, 512)
    small = layout_of(core_fields(tiny(), num_ranks=1, rank=0), copy_block=256, sum_block=512)
    assert (small.copy_block, small.sum_block) == (8, 32)  # never more than a row has


def test_other_blocks_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several blocks on one rank, of one block on the other."""
    config = tiny(hidden=72)
    blocks = iter([Blocks(copy=8, sum=16), Blocks()])
    monkeypatch.setattr(rank, "blocks_for", lambda fields: next(blocks))
    with VirtualRanks(2, config, backends=["triton"], poison=True) as ranks:
        assert {buffer.verbs.at.copy_block for buffer in ranks.buffers} == {8, 32}
        for tally in run_checked(ranks, Work(config, 2, seed=3), 2):
            assert tally.error is None and not tally.corrupt, tally.corrupt
