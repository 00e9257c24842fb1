"""The healthy tail: its percentiles and its histogram, and that whoever is wrong has no time."""

from __future__ import annotations

import importlib.util
import json

import pytest

from benchmarks import tail
from benchmarks.contest import Score
from benchmarks.peers import Gloo
from benchmarks.systems import FaultA2A
from tests.apart import command


def test_as_many_steps_as_were_asked_for_beside_the_peer(tmp_path):
    picture = tmp_path / "tail.svg"
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    done = command(
        *("benchmarks.tail", "--steps", "40", "--hidden", "64", "--tokens", "3", "--json"),
        *("--out", str(tmp_path / "tail.jsonl"), *(("--plot", str(picture)) if has_matplotlib else ())),
    )
    assert done.returncode == 0, done.stderr + done.stdout
    record = json.loads(done.stdout)
    assert [row["system"] for row in record["rows"]] == ["fault_a2a", "gloo"] and record["ok"]
    for row in record["rows"]:
        times = [row[f"p{percent:g}_us"] for percent in tail.PERCENTS]
        assert row["steps"] == 40 and times == sorted(times) and times[0] > 0
        assert sum(count for _, count in row["histogram"]) == 40
    assert json.loads((tmp_path / "tail.jsonl").read_text()) == record
    assert not has_matplotlib or "<svg" in picture.read_text()


def test_percentiles_of_a_known_sample():
    times = [float(time) for time in range(1, 100_001)]
    row = tail._row(Score("fault_a2a", pair=times), FaultA2A)
    assert (row["p50_us"], row["p99_us"], row["p99.9_us"]) == (50_000, 99_000, 99_900)
    assert (row["p99.99_us"], row["p100_us"], row["steps"]) == (99_990, 100_000, 100_000)


def test_a_bucket_ends_just_above_what_is_in_it():
    buckets = tail.histogram([0.5, 1.0, 100.0, 101.0, 1e6])
    assert sum(count for _, count in buckets) == 5 and buckets[0] == (1.0, 2)
    assert all(1 <= end / time < 1.1 for (end, _), time in zip(buckets[1:], (100.0, 1e6), strict=True))


def test_who_failed_has_no_time():
    row = tail._row(Score("gloo", failure="wrong answer"), Gloo)
    assert not row["correct"] and row["p99_us"] is None and row["histogram"] == []
    record = {"ok": False, "shape": dict.fromkeys(("ranks", "tokens", "hidden", "dtype", "topk", "experts"), 1)}
    record |= {"machine": {"num_cores": 2, "cpu": "one"}, "commit": "abc", "date": "today"}
    record |= {"load_average": [0.0], "load_average_after": [0.0], "rows": [row]}
    assert "no time: wrong answer" in tail.as_text(record) and "RED" in tail.as_text(record)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--steps", "0"), ("--steps", "no number from 1 up")),
        (("--peers", "mpy"), ("--peers", "'mpy'", "gloo")),
        (("--plot", "tail.gif"), ("--plot", ".svg")),
    ],
)
def test_what_cannot_be_run_is_refused(options, words, capsys):
    with pytest.raises(SystemExit) as ended:
        tail.parse(options)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and all(word in said for word in words), said
