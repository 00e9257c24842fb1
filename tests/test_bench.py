"""The command `bench`: a row for each shape and system, one JSON object, a table, a picture, and clear refusals."""

import importlib.util
import json
import subprocess

import pytest
import torch

from fault_a2a.cli.main import main
from tests.apart import command, refusals

SMALL = (
    "--ranks",
    "2",
    "--hidden",
    "64",
    "--num-topk",
    "2",
    "--num-experts",
    "8",
    "--iterations",
    "2",
    "--warm-up",
    "1",
)
KEYS = {
    *("system", "backend", "num_ranks", "num_tokens", "hidden", "num_topk", "dtype", "moved_bytes"),
    *("dispatch_us", "combine_us", "pair_us", "p95_us"),
}


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    return command("fault_a2a.cli.main", "bench", *options)


def test_a_sweep_gives_a_row_for_each_shape_and_system(tmp_path):
    table, picture = tmp_path / "rows.md", tmp_path / "pairs.svg"
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    done = bench(
        *(*SMALL, "--num-tokens", "3,6", "--reduce", "owner,expert", "--peers", "gloo", "--json"),
        *("--markdown", str(table), "--out", str(tmp_path / "rows.jsonl")),
        *(("--plot", str(picture)) if has_matplotlib else ()),
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    found = [(row["num_tokens"], row["reduce"], row["system"]) for row in record["rows"]]
    assert found == [
        (tokens, reduce, system)
        for tokens in (3, 6)
        for reduce in ("owner", "expert")
        for system in ("fault_a2a", "gloo")
    ]
    for row in record["rows"]:
        assert row.keys() >= KEYS and row["correct"]
        assert row["moved_bytes_per_s"] == pytest.approx(row["moved_bytes"] / row["pair_us"] * 1e6, rel=0.01)
    assert record["ok"] and len(record["runs"]) == 4
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == record
    lines = table.read_text().splitlines()
    assert sum(line.startswith("| fault_a2a | 2 |") for line in lines) == 4
    assert all(f"{row['pair_us']:.0f}" in table.read_text() for row in record["rows"])
    assert not has_matplotlib or "<svg" in picture.read_text()


REFUSED = [
    (("--num-topk", "9", "--num-experts", "8"), ("num_topk", "pass at most 8")),
    (("--peers", "ncll"), ("--peers", "'ncll'", "gloo", "mpi")),
    (("--num-tokens", "8,none"), ("--num-tokens", "'none' is no number from 1 up")),
    (("--ranks", "1000", "--num-experts", "1000"), ("--ranks 1000", "GiB", "give fewer --ranks")),
    (("--dtype", "bf16,int3"), ("--dtype", "'int3'", "bf16, f16, f32")),
    (("--backend", "tpu"), ("--backend", "'tpu'", "cpu, cuda-host, triton, cuda")),
    (("--backend", "cpu,cpu"), ("--backend", "'cpu' is given twice")),
    (("--plot", "pairs.gif"), ("--plot", ".svg")),
]


def test_what_cannot_be_run_is_refused_before_anything_is_measured():
    for answer, (_, words) in zip(refusals(main, [["bench", *one] for one, _ in REFUSED]), REFUSED, strict=True):
        assert all(word in answer for word in (*words, "exit 2")), answer


def test_backends_are_measured_side_by_side_and_emulated_ones_are_said_to_be():
    has_triton = importlib.util.find_spec("triton") is not None
    backends = ["cpu", "cuda-host", *(["triton"] if has_triton else [])]
    # One token of few elements: a round that is interpreted takes half a second, whatever else is measured.
    few = ("--iterations", "1", "--num-tokens", "1", "--hidden", "16")
    done = bench(*SMALL, *few, "--peers", "gloo", "--backend", ",".join(backends), "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["system"] for row in rows] == [*(f"fault_a2a-{backend}" for backend in backends), "gloo"]
    assert [row["backend"] for row in rows] == [*backends, "gloo"] and all(row["correct"] for row in rows)
    interpreted = ["triton"] if has_triton and not torch.cuda.is_available() else []
    assert [row["backend"] for row in rows if row["emulated"]] == ["cuda-host", *interpreted]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused_before_anything_is_measured():
    done = bench(*SMALL, "--backend", "cuda")
    assert done.returncode == 2 and "--backend: cuda does not run here: torch finds no GPU" in done.stderr


def test_a_wrong_peer_is_said_to_be_wrong_in_the_table_too():
    from benchmarks.sweep import as_markdown

    run = {
        "date": "2026-11-24T00:00:00",
        "commit": "abc",
        "machine": {"num_cores": 2, "cpu": "one"},
        "versions": {"torch": "2"},
        "num_iterations": 1,
        "load_average": [0.0],
        "load_average_after": [0.0],
    }
    row = dict.fromkeys(["num_ranks", "num_tokens", "hidden", "num_topk", "num_experts", "dtype"], 1)
    row |= {"system": "peer", "emulated": False, "failure": "rank 1: wrong answer"}
    text = as_markdown({"runs": [run], "rows": [row]})
    assert text.splitlines()[-1].startswith("| peer | 1 |") and "no time: rank 1: wrong answer" in text


def test_the_benchmarks_are_part_of_the_package():
    from fault_a2a.benchmarks import machine

    assert machine.PACKAGE == "fault_a2a.benchmarks"
    assert (machine.IMPORT_ROOT / "fault_a2a" / "__init__.py").exists()


def test_small_collectives_are_timed_beside_gloo_and_checked():
    small = ("benchmarks.collectives", "--ranks", "2", "--iterations", "3", "--json")
    done = command(*small, "--sizes", "8,64")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [(row["system"], row["num_bytes"]) for row in rows] == [
        (system, size) for size in (8, 64) for system in ("fault_a2a", "gloo")
    ]
    assert all(row["all_reduce_us"] > 0 and row["spread_us"]["count"] == 3 for row in rows)
    refused = command(*small, "--sizes", "7")
    assert refused.returncode == 2 and "multiples of 8" in refused.stderr
