"""Peers with permutes in C++: their plan is torch's, their answers are checked, and who lacks them is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import native_permutes, peers
from benchmarks.mpi import Mpi
from benchmarks.native_permutes import NativePermutes, missing_library
from benchmarks.permuted import Permuted
from benchmarks.work import Batch, Shape

ROOT = Path(__file__).resolve().parent.parent
needs_library = pytest.mark.skipif(missing_library() != "", reason=f"C++ permutes: {missing_library()}")


class Alone(NativePermutes):
    """One rank of a group that is not there: it is told everybody's routing, and nothing moves."""

    routings: torch.Tensor

    def gather(self, gathered: torch.Tensor, mine: torch.Tensor) -> None:
        gathered.copy_(self.routings.view(-1))

    def exchange(self, arrived, sent, recv_counts, send_counts) -> None:
        self.moved = sent.clone()
        arrived.zero_()


@needs_library
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("experts", [6, 7])
def test_the_plan_is_the_one_that_torch_makes(rank, experts):
    shape = Shape(3, 9, 16, 3, experts, "f32", "packed", "owner")
    batches = [Batch(shape, one, seed=5) for one in range(3)]
    alone, torchs = Alone(shape, rank), Permuted(shape, rank)
    alone.routings = torch.stack(
        [torch.stack([one.topk_idx.int(), one.topk_weights.view(torch.int32)]) for one in batches]
    )
    want = torchs._plan(
        torchs.rank_of[batches[rank].topk_idx], torchs.local_of[torch.stack([one.topk_idx for one in batches])]
    )
    _, handle = alone.dispatch(batches[rank])
    arrays, plan = alone.arrays, alone.plan
    assert arrays["sent_tokens"][: plan.num_sent].tolist() == want["sent_tokens"].tolist()
    assert (handle["send_counts"], handle["recv_counts"]) == (want["send_counts"], want["recv_counts"])
    assert arrays["choice_counts"].tolist() == want["choice_counts"]
    assert torch.equal(alone.moved, batches[rank].x[want["sent_tokens"]])
    by_expert = want["expert_of_choice"].argsort(stable=True)
    assert arrays["row_of_place"][: plan.num_choices].tolist() == want["row_of_choice"][by_expert].tolist()
    assert arrays["place_of_choice"][: plan.num_choices].tolist() == by_expert.argsort().tolist()
    weights = torch.stack([one.topk_weights for one in batches]).view(-1)[want["choices"]]
    assert torch.equal(arrays["weights_here"][: plan.num_choices], weights)
    rank_of_mine = want["rank_of_mine"].view(-1)
    assert arrays["answer_counts"].tolist() == rank_of_mine.bincount(minlength=3).tolist()
    assert arrays["answer_of_mine"].tolist() == rank_of_mine.argsort(stable=True).argsort().tolist()


@needs_library
@pytest.mark.parametrize("extra", [(), ("--dtype", "f16", "--reduce", "expert", "--hidden", "40")])
def test_they_answer_rightly_and_are_timed(extra):
    names = ["gloo-cpp", *([] if Mpi.missing() else ["mpi-cpp"])]
    command = [
        *(sys.executable, str(ROOT / "benchmarks" / "dispatch_combine.py"), "--json", "--peers", ",".join(names)),
        *("--ranks", "3", "--tokens", "7", "--hidden", "64", "--topk", "4", "--experts", "12"),
        *("--iterations", "2", "--warm-up", "1", *extra),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = json.loads(done.stdout)["rows"]
    assert [row["system"] for row in rows] == ["fault_a2a", *names]
    assert all(row["correct"] and row["pair_us"] > 0 for row in rows)


def test_who_did_not_build_them_is_told_how(monkeypatch, tmp_path):
    monkeypatch.setattr(native_permutes, "LIBRARY", tmp_path / "_permutes.so")
    with pytest.raises(ValueError, match=r"--peers: gloo-cpp: .*-DFA2A_BENCH_PERMUTES=ON make build"):
        peers.chosen_peers("gloo,gloo-cpp")
    assert "gloo-cpp" not in peers.chosen_peers("all") and "gloo" in peers.chosen_peers("all")
