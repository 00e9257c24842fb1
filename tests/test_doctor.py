"""What the doctor finds, and the promise about the size of a window."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

import fault_a2a
from fault_a2a import nvrtc
from fault_a2a.backends import Machine
from fault_a2a.cli import doctor
from fault_a2a.config import Config
from fault_a2a.core_fields import window_bytes
from tests import apart
from tests.drills import ROOT


@pytest.fixture(scope="module")
def answer():
    program = [sys.executable, "-m", "fault_a2a", "doctor", "--json", "--window"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr
    return json.loads(done.stdout)


def test_keys(answer):
    assert answer["version"] == fault_a2a.__version__
    assert set(answer["backends"]) == {"cpu", "triton", "cuda"}
    for backend in answer["backends"].values():
        assert isinstance(backend["available"], bool) and backend["why"]
    auto = answer["auto"]
    first = auto["backend"] == "cuda"  # on a machine with a GPU and NVRTC
    assert auto["backend"] in answer["backends"]
    assert auto["why"] == "the first choice" if first else auto["why"].startswith("cuda: ")


def test_it_says_what_runs_here_and_what_does_not(answer):
    assert answer["backends"]["cpu"]["available"]
    cuda = answer["backends"]["cuda"]
    assert ("devices are here" if cuda["available"] else "run on a GPU") in cuda["why"]
    assert cuda["available"] or ("kernels compile here" in cuda["why"]) is (nvrtc.load() is not None)
    triton = answer["backends"]["triton"]
    assert ("interpreter" if triton["available"] else "not installed") in triton["why"]


GPU = Machine(gpu="NVIDIA GH200", compiles_cuda=True, reaches_host=True, has_triton=True, interprets=False)


@pytest.mark.parametrize(
    ("changes", "available", "why"),
    [
        ({}, True, "on NVIDIA GH200; this release has not been run on a GPU"),
        ({"interprets": True}, True, "in its interpreter on the CPU"),
        ({"reaches_host": False}, False, "cannot reach by the host's addresses"),
    ],
)
def test_what_triton_runs_on_beside_a_gpu(monkeypatch, changes, available, why):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    found = doctor._triton(dataclasses.replace(GPU, **changes))
    assert found["available"] is available and why in found["why"]


def test_kernels_of_cuda_need_a_compiler(monkeypatch):
    monkeypatch.setattr(doctor, "_gpus", lambda: ("1 devices are here: NVIDIA GH200", True))
    assert doctor._cuda(GPU)["available"]
    found = doctor._cuda(dataclasses.replace(GPU, compiles_cuda=False))
    assert not found["available"] and "need NVRTC to compile (`pip install 'fault_a2a[cuda13]'`)" in found["why"]
    monkeypatch.setattr(doctor, "_gpus", lambda: ("no device", False))
    for library, why in ((None, "kernels need NVRTC"), (object(), "kernels compile here (fault-a2a compile)")):
        monkeypatch.setattr(doctor.nvrtc, "load", lambda library=library: library)
        assert why in doctor._cuda(None)["why"]


def test_the_machine(answer):
    machine = answer["machine"]
    assert machine["cores"] >= 1 and machine["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert machine["shared_memory"]["writable"] and machine["shared_memory"]["size_bytes"] > 0
    assert isinstance(machine["futex_waitv"], bool) and isinstance(machine["pidfd"], bool)
    windows = machine["gpu_windows"]
    assert set(windows) == {"file_descriptors", "fabric"}
    assert all(found["available"] is not bool(found["why"]) for found in windows.values())
    evidence = machine["exit_evidence"]
    assert evidence["works"], evidence["why"]
    assert 0 <= evidence["took_ms"] < 1000


def test_a_window_of_deepseek_size_fits(answer):
    """256 experts, top-8, 128 tokens, 7168 elements of bfloat16, eight ranks, spare partition included."""
    window = answer["window"]
    assert window["window_bytes"] <= 320e6 and window["num_spare_partitions"] == 1
    assert sum(window["parts"].values()) == window["window_bytes"]
    assert sum(window["partition_parts"].values()) == window["partition_bytes"] == window["spare_bytes"]
    assert window["recv_x_bytes"] == 2 * 32 * 8 * 128 * 7168 * 2, "beside the window, for two open rounds"
    config = Config(num_experts=256, hidden=7168, num_topk=8, num_max_tokens_per_rank=128)
    assert window["window_bytes"] == window_bytes(config, 8)


def test_sums_at_the_expert_need_a_smaller_window(answer):
    config = Config(num_experts=256, hidden=7168, num_topk=8, num_max_tokens_per_rank=128, reduce="expert")
    assert doctor.window_parts(config, 8)["window_bytes"] < answer["window"]["window_bytes"] / 3


def test_for_people():
    done = apart.command(
        "fault_a2a.cli.main", "doctor", "--window", "--experts", "32", "--hidden", "1024", "--ranks", "4"
    )
    assert done.returncode == 0 and "exit evidence  yes" in done.stdout
    assert "gpu windows    " in done.stdout and "gpu fabric     " in done.stdout
    assert "without recv.x; 5 partitions, 1 of them spare" in done.stdout and "recv.x" in done.stdout


@pytest.mark.parametrize(
    "options", [["--topk", "999"], ["--ranks", "0"], ["--hidden", "7"], ["--tokens", "0"], ["--spare-partitions", "99"]]
)
def test_a_shape_that_cannot_be_is_refused(options, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: {"backends": {"cpu": {"available": True}}})
    from fault_a2a.cli.main import main

    with pytest.raises(SystemExit) as error:
        main(["doctor", "--window", *options])
    told = capsys.readouterr().err
    assert error.value.code == 2 and "pass" in told and f"{options[0]} (" in told


def test_without_the_core_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_core_failure", lambda: "the native core cannot be loaded. Run `pip install .`")
    from fault_a2a.cli.main import main

    assert main(["doctor", "--json", "--window"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert not answer["backends"]["cpu"]["available"] and "pip install" in answer["backends"]["cpu"]["why"]
    assert "window" not in answer and any("exit evidence is off" in sentence for sentence in answer["advice"])


def test_a_machine_that_lacks_something_gets_advice():
    machine = {
        "exit_evidence": {"works": False, "why": "separate pods"},
        "futex_waitv": False,
        "pidfd": False,
        "shared_memory": {"size_bytes": 64 << 20},
    }
    advice = " ".join(doctor._advice(machine))
    for word in ("separate pods", "futex_waitv", "pidfd", "--shm-size"):
        assert word in advice


def test_a_probe_whose_child_dies_early_says_so(monkeypatch):
    class Dead:
        def __init__(self, rank, *_, **__):
            if rank == 1:
                raise RuntimeError("no")

        def join(self):
            raise RuntimeError("the other process of the probe died while the group was built")

    monkeypatch.setattr(doctor, "_Probe", Dead)
    found = doctor._probe_exit_evidence()
    assert not found["works"] and "died while the group was built" in found["why"]
