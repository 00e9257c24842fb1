"""The command bench in processes that torchrun or mpirun started, and the peers that would need a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import launched, peers
from benchmarks.launched import Launch, find_launch, peers_of
from benchmarks.mpi import Mpi
from tests.apart import command

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    *("--hidden", "64", "--num-topk", "2", "--num-experts", "8", "--num-tokens", "6"),
    *("--iterations", "2", "--warm-up", "1", "--json"),
]
BENCH = "import sys\nfrom fault_a2a.cli.main import main\nsys.exit(main(['bench', *sys.argv[1:]]))\n"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
MPIRUN = ["mpirun", "--oversubscribe", *(["--allow-run-as-root"] if os.geteuid() == 0 else []), "-n", "2"]
LAUNCHERS = [
    # What this shows of torchrun the next test does as well, but for rows of several shapes.
    pytest.param("torchrun", TORCHRUN, "gloo", marks=pytest.mark.slow),
    pytest.param(
        *("mpirun", [*MPIRUN, sys.executable], "gloo,mpi"),
        marks=pytest.mark.skipif(Mpi.missing() != "", reason=f"mpirun: {Mpi.missing()}"),
    ),
]

# Both are wrong on one rank only; everybody must hear of it, and nobody may wait for ever.
PLANTED = """
from fault_a2a.benchmarks import peers

class WrongSum(peers.Gloo):
    def combine(self, received, handle):
        out = super().combine(received, handle)
        out[-1, -1] += self.rank
        return out

class NoStart(peers.Gloo):
    def __init__(self, shape, rank, store):
        if rank == 1:
            raise OSError("no start")

peers.PEERS |= {"WrongSum": WrongSum, "NoStart": NoStart}
"""

# The two dialects stand in for the libraries themselves, which need a GPU.
DIALECTS = """
from fault_a2a.integrations import deep_ep, nixl_ep
deep_ep.install()
nixl_ep.install()
from fault_a2a.benchmarks import gpu_peers
gpu_peers.DeepEp.missing = gpu_peers.NixlEp.missing = staticmethod(lambda: "")
"""


def launch(start: list[str], program: str, tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "program.py"
    file.write_text(program)
    return subprocess.run(
        [*start, str(file), *SMALL, *options], capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.parametrize(("launcher", "start", "chosen"), LAUNCHERS)
def test_the_ranks_of_a_launcher_run_the_contest_themselves(launcher, start, chosen, tmp_path):
    done = launch(start, BENCH, tmp_path, "--peers", chosen, "--reduce", "owner,expert")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)  # and nothing else: the other rank is silent
    names = ["fault_a2a", *chosen.split(",")]
    assert [row["system"] for row in record["rows"]] == names * 2 and record["ok"]
    for row in record["rows"]:
        assert row["num_ranks"] == 2 and row["correct"]
        assert all(row[part] > 0 for part in ("dispatch_us", "combine_us", "pair_us", "p95_us"))
        assert row["spread_us"]["pair"]["count"] == 2
    assert all(run["launcher"] == launcher and run["num_local_ranks"] == 2 for run in record["runs"])


def test_who_is_wrong_on_one_rank_has_no_time_on_any(tmp_path):
    """And the others have: the calls of DeepEP and NIXL EP, made to stand-ins, give right answers."""
    done = launch(TORCHRUN, PLANTED + DIALECTS + BENCH, tmp_path, "--peers", "WrongSum,NoStart,gloo,deep-ep,nixl-ep")
    assert done.returncode == 1, done.stderr
    record = json.loads(done.stdout)  # and nothing else: the other rank is silent
    rows = {row["system"]: row for row in record["rows"]}
    assert not record["ok"] and all(run["launcher"] == "torchrun" for run in record["runs"])
    for name in ("fault_a2a", "gloo", "deep-ep", "nixl-ep"):
        assert rows[name]["correct"] and rows[name]["pair_us"] > 0, rows[name]
    assert rows["WrongSum"]["pair_us"] is None and "rank 1: wrong answer" in rows["WrongSum"]["failure"]
    assert rows["NoStart"]["pair_us"] is None and "rank 1: OSError: no start" in rows["NoStart"]["failure"]


def test_ranks_that_contradict_the_launcher_are_refused(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    done = command("fault_a2a.cli.main", "bench", "--ranks", "5")
    assert done.returncode == 2 and "--ranks: torchrun started 2" in done.stderr


def test_who_started_this_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert find_launch() is None
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "16"), ("LOCAL_WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    assert find_launch() == Launch("torchrun", 3, 16, 8) and not find_launch().one_host
    for name, value in (("RANK", "1"), ("SIZE", "2"), ("LOCAL_SIZE", "2")):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    assert find_launch() == Launch("mpirun", 1, 2, 2) and find_launch().one_host


def test_a_peer_of_another_launcher_is_refused_or_left_out():
    by_torch, by_mpi = Launch("torchrun", 0, 2, 2), Launch("mpirun", 0, 2, 2)
    with pytest.raises(ValueError, match="--peers: mpi needs ranks that mpirun started"):
        peers_of(by_torch, ["gloo", "mpi"], everybody=False)
    with pytest.raises(ValueError, match="--mca btl_vader_single_copy_mechanism none"):
        peers_of(by_mpi, ["mpi-no-cma"], everybody=False)
    everybody = ["gloo", "mpi", "mpi-no-cma"]
    assert peers_of(by_torch, everybody, everybody=True) == ["gloo"]
    assert peers_of(by_mpi, everybody, everybody=True) == ["gloo", "mpi"]


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU here")
@pytest.mark.parametrize(
    ("name", "why"),
    [("nccl", "no CUDA device here"), ("deep-ep", "DeepEP is not installed"), ("nixl-ep", "NIXL EP is")],
)
def test_a_peer_that_is_not_here_says_so(name, why):
    with pytest.raises(ValueError, match=f"--peers: {name}: .*{why}.*or leave it out"):
        peers.chosen_peers(f"gloo,{name}")
    assert name not in peers.chosen_peers("all")


def test_times_between_hosts_need_no_common_clock(monkeypatch):
    # Rank 1's host booted long after rank 0's: its clock reads less.
    told = [[1_000_000, 1_400_000, 0], [5_000, 705_000, 0]]

    def gathered(into, mine):
        into.copy_(launched.torch.tensor(told).view(-1))

    monkeypatch.setattr(launched, "all_gather_single", gathered)
    assert launched.Meeting(Launch("torchrun", 0, 2, 1)).end(0, "") == (700.0, "")
    assert launched.Meeting(Launch("torchrun", 0, 2, 2)).end(0, "") == (1395.0, "")
