"""Where a round's time goes: symbols in their parts, clear refusals, and a run where this machine lets one sample."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.hot_spots import PARTS, as_text, main, sorted_into_parts

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--ranks", "2", "--tokens", "16", "--hidden", "1024", "--topk", "2", "--experts", "8", "--rounds", "400"]


def test_every_symbol_is_in_one_part_and_the_largest_are_named():
    symbols = [
        (40.0, "_C.cpython-311.so", "fa2a::stream_lines_avx2"),
        (10.0, "_C.cpython-311.so", "fa2a::weighted_sum_Bfloat16"),
        (5.0, "libc.so.6", "__memmove_avx512_unaligned_erms"),
        (3.0, "_C_hooks.cpython-311.so", "fa2a::Pulse::look_at"),
        (2.0, "_C.cpython-311.so", "fa2a::dispatch_send"),
        (20.0, "[kernel.kallsyms]", "finish_task_switch"),
        (1.0, "[kernel.kallsyms]", "futex_wait"),
        (4.0, "libpython3.11.so.1.0", "_PyEval_EvalFrameDefault"),
        (3.0, "libc.so.6", "malloc"),
        (2.0, "libtorch_cpu.so", "at::empty"),
        (1.0, "libc10.so", "c10::alloc"),
    ]
    parts = sorted_into_parts(symbols)
    by_name = {part["part"]: part["percent"] for part in parts}
    assert [by_name[name] for name, _, _ in PARTS] == [40.0, 10.0, 5.0, 3.0, 2.0, 21.0, 10.0]
    assert [part["percent"] for part in parts] == sorted(by_name.values(), reverse=True)
    rest = next(part for part in parts if part["part"] == PARTS[-1][0])
    assert list(rest["symbols"]) == ["_PyEval_EvalFrameDefault", "malloc", "at::empty"]


def test_without_perf_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit) as refused:
        main([])
    assert refused.value.code == 2 and "linux-perf" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("perf") is None, reason="there is no perf here")
def test_a_run_finds_the_rounds_at_work():
    command = [sys.executable, "-m", "benchmarks.hot_spots", *SMALL, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=ROOT)
    if "Permission" in done.stderr or "perf_event_paranoid" in done.stderr:
        pytest.skip("this process may not sample others")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    shares = {part["part"]: part["percent"] for part in record["parts"]}
    assert 95 <= sum(shares.values()) <= 105 and record["num_rounds"] == 400 and record["pair_us"] > 0
    assert shares["the rest of the native core"] > 0 and "the operating system" in as_text(record)
