"""The command compile: CUDA kernels become machine code without a GPU, in a budget of registers, and are kept."""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fault_a2a import kernel_compiler, nvrtc
from fault_a2a.backends import Machine, why_not
from fault_a2a.cli.main import main
from fault_a2a.kernel_compiler import ARCHS, KERNELS, VARIANTS, compile_kernels
from fault_a2a.kernels.triton import compiled as triton_compiler

ROOT = Path(__file__).resolve().parents[1]
ALL_KERNELS = [kernel for kernels in KERNELS.values() for kernel in kernels]
# A block has at most 512 threads, so one of 128 registers a thread fills a multiprocessor; these leave room for two
# blocks where rows are copied and summed. A kernel that grows past its number has lost something: look before raising.
MOST_REGISTERS = {"dispatch_send": 128, "combine_answer": 96, "combine_reduce": 80, "dispatch_expand": 72}
MOST_REGISTERS |= {"stream_send_rows": 128, "stream_expand": 128, "stream_send_answers": 96, "stream_reduce": 96}
MOST_OF_A_WAITER = 80  # kernels of one block

needs_nvrtc = pytest.mark.skipif(nvrtc.load() is None, reason="no libnvrtc here: pip install nvidia-cuda-nvrtc")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FAULT_A2A_CACHE", str(tmp_path))
    yield tmp_path


def check_rows(rows: list[dict], archs: list[str], variants: list[str]) -> None:
    wanted = {(kernel, arch, variant) for kernel in ALL_KERNELS for arch in archs for variant in variants}
    assert {(row["kernel"], row["arch"], row["variant"]) for row in rows} == wanted and len(rows) == len(wanted)
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert 0 < row["registers"] <= MOST_REGISTERS.get(row["kernel"], MOST_OF_A_WAITER), row
        assert 0 <= row["shared_bytes"] < 48 << 10, row


@needs_nvrtc
def test_one_chip_within_budget(cache: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["compile", "--kernels", "cuda", "--arch", "90a", "--variant", "bfloat16", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    check_rows(answer["rows"], ["90a"], ["bfloat16"])
    assert len(list(cache.glob("*.cubin"))) == len(KERNELS) and not list(cache.glob("*.part"))


@needs_nvrtc
@pytest.mark.slow
def test_every_chip_and_variant_within_budget(cache: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["compile", "--kernels", "cuda", "--json"]) == 0
    check_rows(json.loads(capsys.readouterr().out)["rows"], list(ARCHS), list(VARIANTS))


def test_every_kernel_is_listed() -> None:
    for name, kernels in KERNELS.items():
        text = (ROOT / "kernels" / "cuda" / name).read_text()
        assert tuple(re.findall(r"^FA2A_KERNEL (\w+)\(", text, re.MULTILINE)) == kernels
    assert {path.name for path in (ROOT / "kernels" / "cuda").glob("*.cu")} == set(KERNELS)


def test_variants_are_numbered_as_the_kernels_number_them() -> None:
    enum = re.search(r"enum class DType : u32 \{ (.*?) \}", (ROOT / "kernels" / "verbs.hpp").read_text())
    assert enum and {name: number for number, name in enumerate(enum[1].split(", "))} == VARIANTS


LOG = "".join(
    f"ptxas info    : Compiling entry function '{kernel}' for 'sm_90a'\n"
    "ptxas         .     8 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads\n"
    "ptxas info    : Used 40 registers, used 1 barriers, 24 bytes smem\n"
    for kernel in ALL_KERNELS
)


class FakeCompiler:
    """In NVRTC's place: counts its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, log: str = LOG) -> None:
        self.calls: list[list[str]] = []
        self.log = log
        monkeypatch.setattr(nvrtc, "load", lambda: self)
        monkeypatch.setattr(nvrtc, "version", lambda library: "13.0")
        monkeypatch.setattr(nvrtc, "compile_program", self.compile_program)

    def compile_program(self, library: object, text: str, options: list[str]) -> nvrtc.Compiled:
        self.calls.append(options)
        return nvrtc.Compiled(f"code {len(self.calls)}".encode(), self.log)


def test_what_is_known_is_not_compiled_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = FakeCompiler(monkeypatch)
    first = compile_kernels("90a", "bfloat16")
    assert compile_kernels("90a", "bfloat16") == first and len(compiler.calls) == len(KERNELS)
    assert [row.spill_bytes for _, rows in first for row in rows] == [32] * len(ALL_KERNELS)
    compile_kernels("100a", "bfloat16")
    compile_kernels("90a", "float32")
    assert len(compiler.calls) == 3 * len(KERNELS)
    assert "-arch=sm_100a" in compiler.calls[-2 * len(KERNELS)] and "-DFA2A_DTYPE=1" in compiler.calls[-1]


@pytest.mark.parametrize("what", ["*.cubin", "*.json"])
@pytest.mark.parametrize("content", [b"", b"half of wh"])
def test_what_a_crash_left_is_compiled_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, what: str, content: bytes
) -> None:
    compiler = FakeCompiler(monkeypatch)
    compile_kernels("90a", "bfloat16")
    next(cache.glob(what)).write_bytes(content)
    cubins = [cubin.read_bytes() for cubin, _ in compile_kernels("90a", "bfloat16")]
    assert len(compiler.calls) == len(KERNELS) + 1 and all(code.startswith(b"code") for code in cubins)


def test_changed_sources_are_compiled_again(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = FakeCompiler(monkeypatch)
    compile_kernels("90a", "bfloat16")
    sources = kernel_compiler._sources
    extra = tmp_path / "changed.hpp"
    extra.write_text("// another protocol\n")
    monkeypatch.setattr(kernel_compiler, "_sources", lambda *folders: [*sources(*folders), extra])
    compile_kernels("90a", "bfloat16")
    assert len(compiler.calls) == 2 * len(KERNELS)


def test_a_silent_compiler_is_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCompiler(monkeypatch, log="")
    with pytest.raises(RuntimeError, match="says nothing of dispatch_route, dispatch_send"):
        compile_kernels("90a", "bfloat16")


def test_refusals(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for options, why in (
        (["--arch", "90a,h100"], "arch: 'h100' is no compute capability"),
        (["--variant", "fp8"], "variant: 'fp8' is no dtype of rows"),
    ):
        FakeCompiler(monkeypatch)
        with pytest.raises(SystemExit) as error:
            main(["compile", *options])
        assert error.value.code == 2 and why in capsys.readouterr().err
    monkeypatch.setattr(nvrtc, "load", lambda: None)
    assert main(["compile", "--kernels", "cuda", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["rows"] == [] and "install 'fault_a2a[cuda13]'" in answer["why"]


# --- which NVRTC: one whose code the driver runs


class Library:
    """In the place of a library of CUDA, which says its version by the function that it has for that."""

    def __init__(self, major: int, minor: int) -> None:
        self.major, self.minor = major, minor

    def nvrtcVersion(self, major: Any, minor: Any) -> int:
        major._obj.value, minor._obj.value = self.major, self.minor
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 1000 * self.major + 10 * self.minor
        return 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Library]]:
    """The libraries of a machine, by name; there are no others."""
    libraries: dict[str, Library] = {}

    def load(name: str, mode: int = 0) -> Library:
        if name not in libraries:
            raise OSError(name)
        return libraries[name]

    monkeypatch.setattr(nvrtc, "_candidates", lambda: ["libnvrtc.so.13", "libnvrtc.so.12"])
    monkeypatch.setattr(ctypes, "CDLL", load)
    nvrtc._choice.cache_clear()
    yield libraries
    nvrtc._choice.cache_clear()


THIRTEEN, TWELVE = Library(13, 1), Library(12, 9)


@pytest.mark.parametrize(
    ("driver", "found", "wanted"),
    [
        (None, [THIRTEEN, TWELVE], THIRTEEN),  # code for chips that are elsewhere
        (Library(13, 0), [THIRTEEN, TWELVE], THIRTEEN),
        (Library(12, 4), [THIRTEEN, TWELVE], TWELVE),
        (Library(13, 0), [TWELVE], TWELVE),
        (Library(12, 4), [THIRTEEN], None),
        (Library(12, 4), [], None),
    ],
)
def test_the_newest_compiler_that_the_driver_can_follow(
    machine: dict[str, Library], driver: Library | None, found: list[Library], wanted: Library | None
) -> None:
    machine |= {f"libnvrtc.so.{library.major}": library for library in found}
    machine |= {"libcuda.so.1": driver} if driver else {}
    assert nvrtc.load() is wanted
    assert bool(nvrtc.why_not()) == (wanted is None and found != [])


def test_an_nvrtc_that_is_too_new_is_named_with_the_driver(machine: dict[str, Library]) -> None:
    machine |= {"libnvrtc.so.13": THIRTEEN, "libcuda.so.1": Library(12, 4)}
    words = r"NVRTC 13\.1 .* the driver here runs, 12\.4; run `pip install 'fault_a2a\[cuda12\]'`, or install"
    with pytest.raises(RuntimeError, match=words):
        compile_kernels("90a", "bfloat16")
    gpu = Machine(gpu="a GPU", compiles_cuda=False, reaches_host=False, has_triton=False, interprets=False)
    assert re.match(words, why_not("cuda", gpu))


# --- both kinds of kernels

TRITON_ROW = {**dict.fromkeys(("registers", "spill_bytes", "shared_bytes"), 0), "kernel": "triton.route"}


@pytest.fixture
def asked_of_triton(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], list[str]]]:
    """In the place of Triton's compiler: what it was asked for."""
    asked: list[tuple[list[str], list[str]]] = []

    def rows(archs: list[str], variants: list[str]) -> list[dict]:
        asked.append((archs, variants))
        return [{**TRITON_ROW, "arch": arch, "variant": variant} for arch in archs for variant in variants]

    monkeypatch.setattr(triton_compiler, "kernel_rows", rows)
    return asked


def test_all_kernels_stand_in_one_list(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, asked_of_triton: list
) -> None:
    FakeCompiler(monkeypatch)
    assert main(["compile", "--arch", "90a,90,100f", "--variant", "bfloat16", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert asked_of_triton == [(["90", "100"], ["bfloat16"])]
    assert {tuple(sorted(row)) for row in answer["rows"]} == {tuple(sorted([*TRITON_ROW, "arch", "variant"]))}
    names = [row["kernel"] for row in answer["rows"]]
    assert names == 3 * ALL_KERNELS + 2 * ["triton.route"] and "why" not in answer
    assert main(["compile", "--kernels", "triton", "--arch", "90a", "--variant", "float16"]) == 0
    assert re.search(r"triton.route +90 +float16", capsys.readouterr().out)


def test_what_one_compiler_lacks_the_other_still_lists(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, asked_of_triton: list
) -> None:
    monkeypatch.setattr(nvrtc, "load", lambda: None)
    assert main(["compile", "--arch", "90a", "--variant", "bfloat16", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert [row["kernel"] for row in answer["rows"]] == ["triton.route"] and "no libnvrtc" in answer["why"]


def test_without_triton_its_kernels_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(triton_compiler, "find_spec", lambda name: None)
    assert main(["compile", "--kernels", "triton"]) == 1
    out, err = capsys.readouterr()
    assert "pip install 'fault_a2a[triton]'" in err and "triton." not in out
