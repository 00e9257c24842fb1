"""The fault path timed: what is run, what its record holds, and that whoever breaks a promise gets no time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import fault_path
from benchmarks.fault_path import KINDS, Cell, main, measure, parse
from benchmarks.fault_path_report import PARTS, as_line, as_markdown
from tests.apart import command

ROOT = Path(__file__).resolve().parent.parent


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "benchmarks.fault_path", *options]
    return subprocess.run(program, capture_output=True, text=True, timeout=240, check=False, cwd=ROOT)


def test_real_faults_are_timed_and_their_record_is_read_again(tmp_path):
    record_file, table, picture = (tmp_path / name for name in ("fault_path.jsonl", "table.md", "picture.svg"))
    done = bench(
        *("--kinds", "exit,slow", "--victims", "1,2", "--ranks", "4", "--runs", "2", "--json"),
        *("--out", str(record_file), "--markdown", str(table)),
    )
    assert done.returncode == 0, done.stderr + done.stdout
    answer = json.loads(done.stdout)
    assert [(row["kind"], row["num_victims"]) for row in answer["rows"]] == [("exit", 1), ("exit", 2), ("slow", 1)]
    assert [(one["kind"], one["num_victims"]) for one in answer["not_run"]] == [("slow", 2)] and answer["ok"]
    for row in answer["rows"]:
        assert row["held"] == row["runs"] == 2 and not row["failures"]
        assert all(len(row["samples"][part]) == 2 for part in PARTS)
        for suspect, agree, good in zip(
            *(row["samples"][part] for part in ("suspect_ms", "agree_ms", "first_good_step_ms")), strict=True
        ):
            assert 0 < suspect <= agree < good
    slow = answer["rows"][-1]
    assert (
        set(slow["evidence"]) == {"stall"} and slow["spread"]["suspect_ms"]["least"] >= slow["timeouts_ms"]["stall_ms"]
    )
    assert [json.loads(line) for line in record_file.read_text().splitlines()] == answer["rows"]
    assert table.read_text() == as_markdown(answer["rows"])
    rendered = [*("--render", str(record_file)), *(("--plot", str(picture)) if has_matplotlib() else ())]
    again = command("benchmarks.fault_path", *rendered, "--json")
    assert again.returncode == 0 and json.loads(again.stdout)["rows"] == answer["rows"]
    assert not has_matplotlib() or "<svg" in picture.read_text()


def has_matplotlib() -> bool:
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def test_a_run_that_breaks_a_promise_has_no_time_and_is_red(monkeypatch, capsys):
    def planted(ask):
        _, _, numbers = ask.args
        good = {part: 1.0 + number for part in PARTS for number in numbers}
        runs = [
            {**good, "problems": [], "faults": ["kill 1@8+5"], "evidence": {"exit": 3}, "shape": {}} for _ in numbers
        ]
        runs[1]["problems"], runs[1]["suspect_ms"] = ["2 received rows are corrupt"], 99.0
        return runs

    monkeypatch.setattr(fault_path, "in_a_fork", planted)
    monkeypatch.setattr(fault_path, "check_can_fork", lambda: None)
    record = measure(Cell("exit", 1, 4), 3, seed=0)
    assert not record["ok"] and (record["held"], record["runs"]) == (2, 3)
    assert record["spread"]["suspect_ms"]["most"] < 99.0 and len(record["samples"]["suspect_ms"]) == 2
    assert "kill 1@8+5: 2 received rows are corrupt" in as_line(record)
    assert main(["--kinds", "exit", "--victims", "1", "--ranks", "4", "--runs", "3"]) == 1
    assert "RED" in capsys.readouterr().out


def test_a_drill_that_cost_the_wrong_number_of_ranks_is_a_problem():
    answer = dict.fromkeys(PARTS, 1.0) | {"step_ms": {"median": 5.0}, "problems": [], "evicted": [1], "faults": []}
    assert fault_path._kept(answer, Cell("exit", 1, 4))["problems"] == []
    assert fault_path._kept(answer, Cell("exit", 2, 4))["problems"] == ["1 ranks were evicted, not 2"]
    answer["agree_ms"] = None
    assert fault_path._kept(answer, Cell("exit", 1, 4))["problems"] == ["there is no agree_ms"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_struck_follows_from_the_seed(kind):
    from fault_a2a.cli.drill.faults import parse_faults

    cell = Cell(kind, 2, 8)
    assert cell.faults(3, 1) == cell.faults(3, 1)
    drawn = [cell.faults(0, run) for run in range(20)]
    assert len({json.dumps(one) for one in drawn}) > 10
    for one in drawn:
        faults = parse_faults(**one, num_ranks=8, num_steps=fault_path.NUM_STEPS)
        assert len({rank for fault in faults for rank in fault.ranks}) == (4 if kind == "cut" else 2)
        assert all(fault.needs_hooks is (kind == "cut") for fault in faults)


def test_what_cannot_be_measured_says_why():
    assert "no quorum" in Cell("stop", 3, 4).impossible and not Cell("stop", 3, 8).impossible
    assert "with rank 0 in it" in Cell("stop", 2, 4).impossible and not Cell("stop", 1, 4).impossible
    assert "which of them is ill" in Cell("slow", 2, 4).impossible and not Cell("slow", 1, 4).impossible
    assert "6 ranks" in Cell("cut", 3, 4).impossible and not Cell("cut", 2, 4).impossible
    assert "nobody" in Cell("exit", 4, 4).impossible and not Cell("exit", 3, 4).impossible


REFUSED = [
    (("--kinds", "exit,fire"), ("--kinds", "'fire'", "exit, stop, cut, slow")),
    (("--victims", "0"), ("--victims", "'0' is no number from 1 up")),
    (("--ranks", "4,many"), ("--ranks", "'many' is no number")),
    (("--ranks", "64"), ("--ranks 64", "at most 32")),
    (("--ranks", "2", "--kinds", "stop", "--victims", "2"), ("--victims", "give more ranks or fewer victims")),
    (("--plot", "way.gif"), ("--plot", ".svg")),
    (("--render", "/no/such/file"), ("--render", "name a file that --out wrote")),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_what_cannot_be_run_is_refused_with_what_to_change(options, words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(options)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and all(word in said for word in words), said


def test_the_record_in_the_repository_can_be_read():
    path = ROOT / "benchmarks" / "results" / "fault_path.jsonl"
    if path.exists():
        for record in fault_path._read(str(path)):
            assert record["spread"]["agree_ms"]["median"] > 0 and record["held"] == len(record["samples"]["agree_ms"])
