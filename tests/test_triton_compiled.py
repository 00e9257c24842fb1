"""Triton's kernels compiled for every chip that is named, without one: what each takes, and what its PTX says."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton", reason="install triton==3.7.1: requirements-dev.txt has it")

from fault_a2a.cli.main import main
from fault_a2a.kernels.triton import layout
from fault_a2a.kernels.triton.compiled import ARCHS, VARIANTS, kernel_rows, ptx_of
from fault_a2a.kernels.triton.words import SWITCHES

KEYS = {"kernel", "arch", "variant", "registers", "spill_bytes", "shared_bytes"}
MAX_REGISTERS = 128
KERNELS = {
    *("check_choices", "pass_gate", "route", "open_dispatch", "store_claims", "store_rows", "signal", "show_phase"),
    *("wait_for_words", "take_headers", "rank_rows", "assign_places", "copy_rows", "recheck", "refuse"),
    *("open_answers", "return_rows", "count_answers", "reduce_rows", "tell_lost"),
    *("route_tokens", "permute_rows", "unpermute_rows", "sum_rows", "quantize_blocks", "dequantize_blocks"),
}
# In which a guard can be out, besides the signal of a combine: "signal" is compiled as a dispatch has it.
GUARDED = (
    *("pass_gate", "open_dispatch", "wait_for_words", "take_headers", "rank_rows", "recheck"),
    *("open_answers", "count_answers"),
)
NUM_OF_QUANTISED = 7  # kernels that are listed once more, for rows that are quantised


def check(rows: list[dict], archs: tuple[str, ...], variants: tuple[str, ...]) -> None:
    assert all(set(row) == KEYS for row in rows)
    for arch in archs:
        for variant in variants:
            of_variant = ("all", variant, f"{variant}-fp8")
            names = [row["kernel"] for row in rows if row["arch"] == arch and row["variant"] in of_variant]
            assert len(names) == len(KERNELS) + NUM_OF_QUANTISED
            assert set(names) == {f"triton.{name}" for name in KERNELS}
    assert all(0 < row["registers"] <= MAX_REGISTERS for row in rows)
    # Eight bytes: two registers around the division that makes a scale, on three of the chips.
    assert all(row["spill_bytes"] <= 8 for row in rows)


def test_every_kernel_compiles(capsys: pytest.CaptureFixture) -> None:
    """As the command lists them."""
    assert main(["compile", "--kernels", "triton", "--arch", "90a", "--variant", "bfloat16", "--json"]) == 0
    check(json.loads(capsys.readouterr().out)["rows"], ("90",), ("bfloat16",))


@pytest.mark.slow
def test_every_kernel_compiles_for_an_amd_chip() -> None:
    """Which says that nothing in them is NVIDIA's alone, and not that they work there."""
    check(kernel_rows(("gfx942",), ("bfloat16",)), ("gfx942",), ("bfloat16",))


@pytest.mark.slow
def test_every_kernel_compiles_for_every_chip() -> None:
    check(kernel_rows(), ARCHS, VARIANTS)


def test_ptx_has_the_scopes_and_rounds_apart() -> None:
    ptx = ptx_of(("wait_for_words", "pass_gate", "signal", "reduce_rows", "sum_rows"))
    for kernel, words in {
        "wait_for_words": ("atom.global.sys.acquire.or.b64", "atom.global.sys.release.or.b64", "%globaltimer"),
        "pass_gate": ("fence.sc.sys", "atom.global.sys.release.exch.b64", "%globaltimer"),
        "signal": ("atom.global.sys.release.exch.b64",),
        **dict.fromkeys(("reduce_rows", "sum_rows"), ("mul.rn.f32", "add.rn.f32")),
    }.items():
        assert all(word in ptx[kernel] for word in words), f"{kernel}: no {words}"
    assert "fma" not in ptx["reduce_rows"] + ptx["sum_rows"]


def test_kernels_compile_without_their_guards() -> None:
    """Kernels compile without them, as the test build would run them on a GPU."""
    off = sum(layout.GUARDS[guard] for guard in SWITCHES)
    ptx = ptx_of(GUARDED, off)
    assert set(ptx) == set(GUARDED)
    # Which says that the switches reach the compiler; with the guard in it is there, as the test above says.
    assert "fence.sc.sys" not in ptx["pass_gate"]


@pytest.mark.parametrize(("options", "text"), [({"archs": ("75",)}, "archs"), ({"variants": ("fp8",)}, "variants")])
def test_what_is_not_known_is_refused(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        kernel_rows(**options)
