"""The benchmarks: their rows, their arithmetic, and that whoever is wrong, dead or impossible gets no time."""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from benchmarks.dispatch_combine import parse
from benchmarks.floor import floor_us, traffic
from benchmarks.peers import PEERS
from benchmarks.spread import bootstrap_median, percentile, spread
from benchmarks.work import Shape
from tests.apart import command, completed, refusals

ROOT = Path(__file__).resolve().parent.parent
BENCHMARK = "benchmarks.dispatch_combine"
SMALL = ("--ranks", "2", "--tokens", "6", "--hidden", "64", "--topk", "2", "--experts", "8")
QUICK = (*SMALL, "--iterations", "3", "--warm-up", "1", "--json")
KEYS = {
    *("system", "backend", "num_ranks", "num_tokens", "hidden", "num_topk", "dtype"),
    *("dispatch_us", "combine_us", "pair_us", "p95_us"),
}
TIMES = ("dispatch_us", "combine_us", "pair_us", "p95_us")

# Peers, and changes of ours, that no user has: each is planted for one test.
PLANTED = """
import os, signal, sys, time, torch
from benchmarks import dispatch_combine, peers, systems

class WrongSum(peers.Gloo):
    def combine(self, received, handle):
        out = super().combine(received, handle)
        out[-1, -1] += 1
        return out

class WrongExpert(peers.Gloo):  # the sums of identities come out right
    def dispatch(self, batch):
        rows, handle = super().dispatch(batch)
        handle["place_of_choice"] = len(rows) - 1 - handle["place_of_choice"]
        return rows.flip(0), handle

class StaleLater(peers.Gloo):  # right while it is checked alone, and then the answer of an earlier round
    num_rounds = 0
    def combine(self, received, handle):
        out, self.num_rounds = super().combine(received, handle), self.num_rounds + 1
        if self.num_rounds == 3:
            self.old = out
        return self.old if self.num_rounds == 6 else out

class Dies(peers.Gloo):
    def combine(self, received, handle):
        if self.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().combine(received, handle)

class OneSlowRank(peers.Gloo):
    def combine(self, received, handle):
        out = super().combine(received, handle)
        if self.rank == 1:
            time.sleep(0.03)
        return out

class WrongBit(systems.FaultA2A):  # within any tolerance
    def combine(self, received, handle):
        out = super().combine(received, handle)
        out.view(torch.int16)[0, 0] ^= 1
        return out

for planted in (WrongSum, WrongExpert, StaleLater, Dies, OneSlowRank):
    peers.PEERS[planted.__name__] = planted
if sys.argv[1] == "WrongBit":
    systems.OURS["cpu"] = WrongBit
sys.exit(dispatch_combine.main(sys.argv[2:]))
"""


PLANTED_MPI = f"""
import os, sys
if "OMPI_COMM_WORLD_RANK" in os.environ and "benchmarks.mpi_team" in " ".join(sys.orig_argv):
    sys.path.insert(0, {str(ROOT)!r})
    from benchmarks import mpi

    class Wrong(mpi.Mpi):
        def combine(self, received, handle):
            return super().combine(received, handle) + 1

    class NoStart(mpi.MpiNoCma):
        def __init__(self, *arguments):
            raise RuntimeError("no start")

    Wrong.__name__, NoStart.__name__ = "Mpi", "MpiNoCma"
    mpi.Mpi, mpi.MpiNoCma = Wrong, NoStart
"""


def run(*options: str, planted: str = "") -> tuple[int, str, str]:
    done = completed(partial(run_planted, planted, options)) if planted else command(BENCHMARK, *options)
    return done.returncode, done.stdout, done.stderr


def run_planted(planted: str, options: tuple[str, ...]) -> None:
    sys.argv = ["planted", planted, *options]
    exec(PLANTED, {})


def rows_of(stdout: str) -> dict[str, dict]:
    return {row["system"]: row for row in json.loads(stdout)["rows"]}


@pytest.mark.parametrize("extra", [(), ("--reduce", "expert", "--recv-format", "packed", "--dtype", "f32")])
def test_a_row_for_each_system_with_its_times(extra, tmp_path):
    record_file = tmp_path / "new folder" / "record.jsonl"
    options = (*QUICK, *extra, "--peers", "gloo,gloo-per-choice", "--out", str(record_file))
    # Once as a file, from anywhere; what that adds is the same with other options.
    program = [sys.executable, str(ROOT / "benchmarks" / "dispatch_combine.py"), *options]
    if extra:
        done = command(BENCHMARK, *options)
    else:
        done = subprocess.run(program, capture_output=True, text=True, timeout=240, cwd="/", check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    record, rows = json.loads(done.stdout), rows_of(done.stdout)
    assert list(rows) == ["fault_a2a", "gloo", "gloo-per-choice"]
    for row in rows.values():
        assert row.keys() >= KEYS
        assert all(row[name] > 0 for name in TIMES)
        assert row["spread_us"]["pair"]["count"] == 3
        assert row["num_ranks"] == 2 and row["num_topk"] == 2
    assert record["ok"] and record["commit"] and record["date"] and len(record["load_average"]) == 3
    assert record["floor_us"] > 0 and record["copied_bytes_per_s"]["median"] > 0
    assert record["fastest_peer"]["times_ours"] > 0
    assert json.loads(record_file.read_text()) == record


@pytest.mark.skipif(PEERS["mpi"].missing() != "", reason=f"the MPI peers: {PEERS['mpi'].missing()}")
def test_mpi_is_timed_in_the_same_turns():
    status, stdout, stderr = run(*QUICK, "--peers", "mpi,mpi-no-cma")
    assert status == 0, stderr + stdout
    rows = rows_of(stdout)
    assert list(rows) == ["fault_a2a", "mpi", "mpi-no-cma"]
    assert all(rows["mpi"][name] > 0 and rows["mpi-no-cma"][name] > 0 for name in TIMES)
    assert rows["mpi"]["spread_us"]["pair"]["count"] == 3


@pytest.mark.skipif(PEERS["mpi"].missing() != "", reason=f"the MPI peers: {PEERS['mpi'].missing()}")
def test_ranks_of_mpirun_that_cannot_start_or_answer_wrongly_get_no_time(tmp_path):
    # mpirun gives its ranks the environment of this process: the planted module is imported before anything else.
    (tmp_path / "sitecustomize.py").write_text(PLANTED_MPI)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    program = [sys.executable, str(ROOT / "benchmarks" / "dispatch_combine.py"), *QUICK, "--peers", "mpi,mpi-no-cma"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=240, env=environment, check=False)
    rows = rows_of(done.stdout)
    assert done.returncode == 1 and rows["fault_a2a"]["pair_us"] > 0
    assert "beyond the tolerance" in rows["mpi"]["failure"] and rows["mpi"]["pair_us"] is None
    assert "mpirun ended" in rows["mpi-no-cma"]["failure"] and "no start" in rows["mpi-no-cma"]["failure"]


def test_the_text_names_what_it_rests_on():
    status, stdout, stderr = run(*(option for option in QUICK if option != "--json"))
    assert status == 0, stderr
    for words in ("load average", "commit", "GB/s copied", "must move", "formula", "OK: every answer was right"):
        assert words in stdout


REASONS = {
    "WrongSum": "beyond the tolerance",
    "WrongExpert": "beyond the tolerance",
    "StaleLater": "beyond the tolerance",
    "Dies": "rank 1 ended with signal 9",
}


def test_peers_that_fail_get_no_time_and_the_run_is_red():
    peers = [*REASONS, "OneSlowRank"]
    status, stdout, stderr = run(*QUICK, "--peers", ",".join(peers), planted="peers")
    assert status == 1, stderr + stdout
    record, rows = json.loads(stdout), rows_of(stdout)
    assert not record["ok"]
    for peer, reason in REASONS.items():
        assert [rows[peer][name] for name in TIMES] == [None] * len(TIMES)
        assert not rows[peer]["correct"] and reason in rows[peer]["failure"]
    # The others' times count. A round lasts until its last rank is done.
    assert rows["fault_a2a"]["correct"] and rows["fault_a2a"]["pair_us"] > 0
    assert rows["OneSlowRank"]["combine_us"] >= 30_000 and rows["OneSlowRank"]["pair_us"] >= 30_000
    assert record["fastest_peer"]["system"] == "OneSlowRank"


def test_one_wrong_bit_of_ours_is_red():
    status, stdout, _ = run(*QUICK, "--dtype", "bf16", planted="WrongBit")
    rows = rows_of(stdout)
    assert status == 1 and rows["fault_a2a"]["pair_us"] is None and rows["gloo"]["pair_us"] > 0
    assert "other bits than the reference" in rows["fault_a2a"]["failure"]


REFUSED = [
    (("--topk", "9", "--experts", "8"), ("--topk", "9 is more than num_experts (8)", "pass at most 8")),
    (("--peers", "ncll"), ("--peers", "'ncll'", "gloo, gloo-cpp")),
    (("--tokens", "0"), ("--tokens", "'0' is no number from 1 up")),
    (("--hidden", "100"), ("--hidden", "pad the rows to 104")),
    (("--ranks", "1000", "--experts", "1000"), ("--ranks 1000", "GiB", "give fewer --ranks")),
]


def test_what_cannot_be_run_is_refused_with_what_to_change():
    for answer, (_, words) in zip(refusals(parse, [one for one, _ in REFUSED]), REFUSED, strict=True):
        for word in (*words, "exit 2"):
            assert word in answer


def test_ranks_of_a_killed_benchmark_end_even_while_they_are_stopped():
    options = [option for option in QUICK if option != "3"]
    options.insert(options.index("--iterations") + 1, "100000")
    program = [sys.executable, str(ROOT / "benchmarks" / "dispatch_combine.py"), *options]
    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as benchmark:
        children: list[int] = []
        deadline = time.monotonic() + 60
        while sum(state_of(child) == "T" for child in children) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
            children = [
                int(child) for child in Path(f"/proc/{benchmark.pid}/task/{benchmark.pid}/children").read_text().split()
            ]
        benchmark.send_signal(signal.SIGKILL)
    assert len(children) == 6  # two ranks of ours, of gloo's and of the copy's
    while any(state_of(child) not in ("", "Z") for child in children) and time.monotonic() < deadline + 10:
        time.sleep(0.02)
    assert [child for child in children if state_of(child) not in ("", "Z")] == []


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


# -- arithmetic


def test_percentiles_of_a_known_sample():
    values = list(range(1, 101))
    random.Random(1).shuffle(values)
    assert [percentile(values, percent) for percent in (1, 25, 50, 95, 100)] == [1, 25, 50, 95, 100]
    assert percentile([7.0], 95) == 7.0
    found = spread([3.0, 1.0, 2.0])
    assert (found.count, found.least, found.median, found.p95, found.most) == (3, 1.0, 2.0, 3.0, 3.0)
    with pytest.raises(ValueError, match="measure at least once"):
        percentile([], 50)


def test_the_bootstrap_is_seeded_and_right_on_a_known_sample():
    values = [float(value) for value in range(1, 102)]
    found = bootstrap_median([values], seed=3)
    assert found == bootstrap_median([values], seed=3)
    # By the binomial distribution the median of 101 lies between the 41st and the 61st with 95 %.
    assert found.median == 51 and 39 <= found.low <= 43 and 59 <= found.high <= 63
    assert bootstrap_median([values], seed=3, num_resamples=9) != bootstrap_median([values], seed=4, num_resamples=9)
    assert bootstrap_median([[1.25] * 9], seed=0) == bootstrap_median([[1.25]], seed=1)
    with pytest.raises(ValueError, match="at least one pair"):
        bootstrap_median([], seed=0)


def test_the_bootstrap_interval_covers_the_true_median_as_often_as_it_says():
    chance = random.Random(5)
    num_covered = 0
    for seed in range(200):
        found = bootstrap_median([[chance.gauss(1, 0.1) for _ in range(60)]], seed, num_resamples=200)
        num_covered += found.low <= 1 <= found.high
    assert 180 <= num_covered <= 198


def test_traffic_by_hand():
    # Two ranks with an expert each, top-2: each of the 6 tokens goes to both ranks.
    shape = Shape(2, 3, 8, 2, 2, "bf16", "batched", "owner")
    moved = traffic(shape, [0, 1], seed=0)
    assert (moved.send_bytes, moved.expand_bytes) == (2 * 12 * 16, (12 + 12) * 16)
    assert (moved.return_bytes, moved.sum_bytes) == ((12 + 12) * 16, (12 + 6) * 16)
    # Both experts on rank 1: one row of a token goes there and is expanded to two.
    for reduce, num_returned in (("owner", 12), ("expert", 6)):
        shape = Shape(2, 3, 8, 2, 2, "f32", "batched", reduce)
        moved = traffic(shape, [1, 1], seed=0)
        assert (moved.send_bytes, moved.expand_bytes) == (2 * 6 * 32, (6 + 12) * 32)
        assert (moved.return_bytes, moved.sum_bytes) == ((12 + num_returned) * 32, (num_returned + 6) * 32)
    assert floor_us(total_bytes=4_000_000, copied_bytes_per_s=1e9) == pytest.approx(2000)


def test_the_record_in_the_repository_can_be_read():
    for path in (ROOT / "benchmarks" / "results").glob("dispatch_combine*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            assert record["ok"] and statistics.median(row["pair_us"] for row in record["rows"]) > 0
            assert os.path.basename(record["command"].split()[1]) == "dispatch_combine.py"
