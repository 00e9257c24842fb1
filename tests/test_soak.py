"""The soak: what it does to whom follows from its seed, and one short run of it keeps every promise."""

import json

import pytest

from fault_a2a.cli.drill.faults import parse_faults
from fault_a2a.cli.drill.options import LateHelpParser, add_arguments, read_drill
from fault_a2a.cli.soak import STEPS, Soak, closing, episode_options
from fault_a2a.core_fields import phases
from tests.apart import command

PHASES = ["dispatch.copy", "combine.wait"]


def faults_of(options: list[str], num_ranks: int) -> list:
    texts = {
        kind: [value for option, value in zip(options, options[1:], strict=False) if option == f"--{kind}"]
        for kind in ("kill", "stop", "cut", "rejoin")
    }
    return parse_faults(**texts, num_ranks=num_ranks, num_steps=STEPS, phases=PHASES)


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8, 16])
def test_every_episode_has_faults_that_leave_a_quorum(num_ranks: int) -> None:
    kinds = set()
    for episode in range(200):
        options = episode_options(7, episode, num_ranks, PHASES)
        assert options == episode_options(7, episode, num_ranks, PHASES)
        faults = faults_of(options, num_ranks)
        assert faults
        unproven = [fault for fault in faults if fault.kind in ("stop", "cut")]
        killed = {fault.rank for fault in faults if fault.kind == "kill"}
        assert 2 * len(unproven) < num_ranks - len(killed) or not unproven
        kinds |= {fault.kind for fault in faults}
    assert kinds == ({"kill", "stop", "cut", "rejoin"} if num_ranks >= 8 else kinds) and "kill" in kinds
    assert episode_options(7, 0, num_ranks, PHASES) != episode_options(8, 0, num_ranks, PHASES)


def test_every_episode_is_a_drill_that_can_be_run() -> None:
    for episode in range(100):
        parser = LateHelpParser()
        add_arguments(parser)
        drill = read_drill(parser.parse_args(episode_options(11, episode, 8, list(phases()))))
        assert drill.ranks == 8 and drill.faults


def test_a_broken_promise_is_reported_with_what_repeats_it() -> None:
    soak = Soak(3, 4)
    soak.reports = []
    answer = soak.report()
    assert answer["ok"] is False and "more minutes" in answer["problems"][0]
    assert "BROKEN (seed 3)" in closing(answer)


def test_a_short_soak_keeps_every_promise() -> None:
    done = command("fault_a2a.cli.main", "soak", "--minutes", "0.02", "--ranks", "3", "--seed", "1", "--json")
    answer = json.loads(done.stdout)
    assert done.returncode == 0 and answer["ok"] is True, done.stdout + done.stderr
    assert answer["episodes"] >= 1 and answer["seed"] == 1 and sum(answer["faults_by_kind"].values()) >= 1
    assert answer["corrupt_rows"] == 0 and answer["false_suspicions"] == 0 and answer["views_agree"] is True


@pytest.mark.parametrize(("option", "value"), [("--ranks", "1"), ("--minutes", "0")])
def test_misuse_names_the_option(option: str, value: str) -> None:
    done = command("fault_a2a.cli.main", "soak", option, value)
    assert done.returncode == 2 and f"{option} {value}" in done.stderr.replace(".0:", ":") and "pass" in done.stderr
