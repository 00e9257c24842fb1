"""What an operator sees of a death: log lines, status and metrics, and that the runbook knows every line."""

import ast
import json
import logging
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fault_a2a
from fault_a2a import Buffer, Config, View, metrics
from fault_a2a.log_events import EVENTS, tell
from fault_a2a.testing import VirtualRanks

ROOT = Path(__file__).resolve().parents[1]
NUM_RANKS, DEAD = 3, 2

pytestmark = pytest.mark.usefixtures("one_thread")


def one_round(buffer: Buffer) -> None:
    x = torch.ones([4, 16], dtype=torch.bfloat16)
    topk_idx = torch.tensor([[0, 4], [1, 5], [2, 4], [3, 5]])  # experts 4 and 5 stand on rank 2
    received, handle = buffer.dispatch(x, topk_idx, torch.ones([4, 2]))
    buffer.combine(received.x, handle)


@pytest.fixture
def after_a_death() -> Iterator[list[Buffer]]:
    """The survivors of a group of three, once they have agreed, and a round later."""
    config = Config(num_experts=6, hidden=16, num_topk=2, num_max_tokens_per_rank=4)
    with VirtualRanks(NUM_RANKS, config) as ranks:
        ranks.run(one_round)
        ranks.buffers[DEAD].arm("dispatch.half_signalled", ranks.buffers[DEAD].num_rounds, "crash")
        ranks.run(one_round)
        survivors = [rank for rank in range(NUM_RANKS) if rank != DEAD]
        ranks.run(one_round, survivors)
        yield [ranks.buffers[rank] for rank in survivors]


# -- status ------------------------------------------------------------------------------------------------------------


def check_shape(found: dict[str, Any]) -> None:
    """vLLM's: a version, a count, and of each engine its number, its status and, if that is not good, why."""
    assert set(found) == {"schema_version", "total_engines", "engines"}
    assert found["schema_version"] == 1 and found["total_engines"] == len(found["engines"]) == NUM_RANKS
    for rank, engine in enumerate(found["engines"]):
        assert engine["id"] == rank and engine["status"] in ("healthy", "unhealthy", "dead")
        assert set(engine) == {"id", "status"} | ({"fault_info"} if engine["status"] != "healthy" else set())
        assert isinstance(engine.get("fault_info", ""), str)


def test_status_tells_who_is_dead_in_the_shape_that_vllm_has(after_a_death: list[Buffer]) -> None:
    for buffer in after_a_death:
        found = json.loads(json.dumps(fault_a2a.status(buffer)))
        check_shape(found)
        assert [engine["status"] for engine in found["engines"]] == ["healthy", "healthy", "dead"]
        assert found["engines"][DEAD]["fault_info"] == "epoch 1: rank 2 evicted: proven dead"


def test_status_of_a_healthy_group_and_of_a_suspect(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(num_experts=6, hidden=16, num_topk=2, num_max_tokens_per_rank=4)
    with VirtualRanks(NUM_RANKS, config) as ranks:
        found = fault_a2a.status(ranks.buffers[0])
        check_shape(found)
        assert {engine["status"] for engine in found["engines"]} == {"healthy"}

        class Suspicious:
            """The core, but for one answer."""

            def __getattr__(self, name: str, real: Any = ranks.buffers[0].core) -> Any:
                return (lambda: [1]) if name == "suspects" else getattr(real, name)

        monkeypatch.setattr(ranks.buffers[0], "core", Suspicious())
        found = fault_a2a.status(ranks.buffers[0])
        monkeypatch.undo()
        check_shape(found)
        assert found["engines"][1] == {"id": 1, "status": "unhealthy", "fault_info": "suspected: stall"}


def test_status_of_a_newcomer_in_a_group_with_room() -> None:
    class Newcomer:
        """Rank 1 came in epoch 4, when rank 0 was gone; there is room for a fourth rank."""

        class core:
            @staticmethod
            def suspects() -> list[int]:
                return []

        def views(self) -> list[tuple[View, int]]:
            return [(View(4, (0, 1, 1, 0), 9, "rank 1 joins", (7, 8, 9, 0)), 1)]

        def evidence(self) -> list[Any]:
            return []

    found = fault_a2a.status(Newcomer())  # type: ignore[arg-type]
    check_shape(found)
    assert [engine["status"] for engine in found["engines"]] == ["dead", "healthy", "healthy"]
    assert found["engines"][0]["fault_info"] == "it was gone when this rank came, in epoch 4"


# -- metrics -----------------------------------------------------------------------------------------------------------


def scraped(buffer: Buffer) -> dict[str, float]:
    """By HTTP, as Prometheus does."""
    end, port = None, 0
    for port in range(21700, 21800):
        try:
            end = metrics.serve(lambda: [buffer], port)
            break
        except OSError:
            continue
    assert end is not None
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    finally:
        end()
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines}


def test_metrics_of_a_survivor(after_a_death: list[Buffer]) -> None:
    for buffer in after_a_death:
        found, me = scraped(buffer), f'rank="{buffer.rank}"'
        assert found[f"fault_a2a_view_epoch{{{me}}}"] == 1
        assert found[f"fault_a2a_active_ranks{{{me}}}"] == 2
        assert found[f'fault_a2a_suspicions_total{{evidence="exit",{me}}}'] == 1
        # Every choice of the step after the death, and of the one it fell into, lost or unroutable.
        lost = found[f"fault_a2a_lost_choices_total{{{me}}}"]
        assert lost in (0, 4) and found[f"fault_a2a_unroutable_choices_total{{{me}}}"] in (4, 8)
        assert lost + found[f"fault_a2a_unroutable_choices_total{{{me}}}"] in (4, 8)
        assert found[f'fault_a2a_detect_seconds_count{{evidence="exit",{me}}}'] == 1
        assert 0 <= found[f'fault_a2a_detect_seconds_sum{{evidence="exit",{me}}}'] < 5
        assert found[f"fault_a2a_agree_seconds_count{{{me}}}"] == 1
        assert 0 < found[f"fault_a2a_agree_seconds_sum{{{me}}}"] < 5
        for source in range(NUM_RANKS):
            assert found[f'fault_a2a_wait_seconds_total{{{me},source="{source}"}}'] >= 0
        assert found[f'fault_a2a_source_rows_total{{{me},source="{1 - buffer.rank}"}}'] > 0


def test_histograms_count_what_is_at_most_a_bound() -> None:
    rows = dict(metrics._in_buckets([0.001, 0.3, 100.0]))
    assert (rows["0.001"], rows["0.1"], rows["0.5"], rows["60.0"], rows["+Inf"]) == (1, 1, 2, 2, 3)


def test_metrics_of_no_buffer_are_none() -> None:
    assert list(metrics.Metrics(list).collect()) == []


# -- log lines ---------------------------------------------------------------------------------------------------------


def test_lines_name_rank_evidence_epoch_and_what_to_do(
    caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    caplog.set_level(logging.INFO, logger="fault_a2a")
    survivors = request.getfixturevalue("after_a_death")
    deadline = time.monotonic() + 10  # lines come from a thread of their own
    while time.monotonic() < deadline:
        records = [record for record in caplog.records if record.name == "fault_a2a"]
        told = {(record.fault_a2a["event"], record.fault_a2a["rank"]) for record in records}  # type: ignore[attr-defined]
        if {("ranks_evicted", buffer.rank) for buffer in survivors} <= told:
            break
        time.sleep(0.01)
    suspicion = next(record for record in records if record.fault_a2a["event"] == "peer_suspected")  # type: ignore[attr-defined]
    assert re.match(r"rank 2 is suspected by rank [01] in epoch 0: exit; next: ", suspicion.getMessage())
    eviction = next(record for record in records if record.fault_a2a["event"] == "ranks_evicted")  # type: ignore[attr-defined]
    assert re.match(
        r"rank [01] is in epoch 1 without ranks \[2\]: rank 2 evicted: proven dead; next: replace",
        eviction.getMessage(),
    )
    assert eviction.fault_a2a["gone"] == [DEAD] and eviction.fault_a2a["epoch"] == 1  # type: ignore[attr-defined]


def loud_events() -> list[str]:
    return [name for name, event in EVENTS.items() if event.level >= logging.WARNING]


def test_the_runbook_covers_every_line_from_a_warning_upwards() -> None:
    runbook = (ROOT / "docs/runbook.md").read_text()
    missing = [
        name
        for name in loud_events()
        if f"| `{name}` | {logging.getLevelName(EVENTS[name].level).lower()} |" not in runbook
    ]
    assert not missing, f"docs/runbook.md has no row with the level of {missing}"
    rows = re.findall(r"^\| `(\w+)` \| (?:warning|error|critical) \|", runbook, re.MULTILINE)
    assert sorted(rows) == sorted(loud_events()), "the runbook explains lines that nobody logs"


def test_every_loud_line_says_what_to_do() -> None:
    assert all(EVENTS[name].next_step for name in loud_events())


def log_calls(text: str) -> list[int]:
    """Lines that call a logger directly."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("warning", "error", "exception", "critical", "log", "info")
        and re.search(r"\b_?log(ger|ging)?$", ast.unparse(node.func.value))
    ]


def test_whoever_was_left_out_is_told_how_to_come_back(caplog: pytest.LogCaptureFixture) -> None:
    tell("evicted_here", rank=2, epoch=1, reason="rank 2 evicted: silence")
    for words in ("call buffer.rejoin(), or", "join=True under the same rank number", "FAULT_A2A_JOIN=1"):
        assert words in caplog.text


def test_nobody_logs_beside_the_table() -> None:
    for path in (ROOT / "fault_a2a").rglob("*.py"):
        if path.name != "log_events.py":
            assert not log_calls(path.read_text()), f"{path}: logs a line that log_events does not know"
    assert log_calls("import logging\n_log = logging.getLogger()\n_log.warning('planted')") == [3]


def test_a_field_that_is_missing_is_an_error() -> None:
    with pytest.raises(KeyError):
        tell("quorum_lost", rank=0)
