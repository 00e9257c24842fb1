"""The benchmark of the experts' output memory: rows, ratio, and that what the machine cannot hold is refused."""

from __future__ import annotations

import json

import pytest

from benchmarks import options
from benchmarks.expert_output import SYSTEMS, as_text, parse
from tests.apart import command


@pytest.mark.parametrize("recv_format", ["batched", "packed"])
def test_each_way_of_writing_is_checked_and_timed(recv_format):
    done = command(
        *("benchmarks.expert_output", "--ranks", "2", "--tokens", "6", "--hidden", "64"),
        *("--topk", "2", "--experts", "8", "--iterations", "3", "--recv-format", recv_format, "--json"),
    )
    assert done.returncode == 0, done.stderr + done.stdout
    record = json.loads(done.stdout)
    assert [row["system"] for row in record["rows"]] == list(SYSTEMS) and record["ok"]
    assert all(row["correct"] and row["pair_us"]["count"] == 3 for row in record["rows"])
    assert 0 < record["ratio"]["low"] <= record["ratio"]["median"] <= record["ratio"]["high"]
    assert "lent output / new tensor, same turn" in as_text(record)


def test_windows_are_counted_for_each_group_of_ours(monkeypatch, capsys):
    small = ("--ranks", "2", "--tokens", "64", "--hidden", "1024", "--topk", "2", "--experts", "8")
    needed = options.ask_library(options.shape_of(parse(small)), num_teams=3).window_bytes * 2
    monkeypatch.setattr(options, "shared_memory_bytes", lambda: 2 * needed)  # room for two groups, not for three
    with pytest.raises(SystemExit):
        parse(small)
    assert "free in /dev/shm; give fewer --ranks" in capsys.readouterr().err
