"""The soak of one group: whom it strikes and who comes back follows from its seed; a short run keeps every promise."""

import json
import subprocess
import sys

import pytest

from fault_a2a.cli.drill.faults import Fault, parse_faults
from fault_a2a.cli.drill.options import LateHelpParser, add_arguments, read_drill
from fault_a2a.cli.drill.story import Holdings, RankStory, Story
from fault_a2a.cli.one_group import (
    SILENCE_MS,
    STEPS,
    OneGroup,
    episode_faults,
    group_options,
    growth_problems,
    witness,
)
from fault_a2a.cli.soak import closing
from fault_a2a.core_fields import phases

PHASES = ["dispatch.copy", "combine.wait"]


def faults_of(seed: int, episode: int, num_ranks: int) -> list[Fault]:
    texts = episode_faults(seed, episode, num_ranks, PHASES)
    return parse_faults(**texts, num_ranks=num_ranks, num_steps=(episode + 1) * STEPS, phases=PHASES)


def is_long(fault: Fault) -> bool:
    return fault.kind == "stop" and (fault.duration_ms or 0) > SILENCE_MS


@pytest.mark.parametrize("num_ranks", [2, 3, 5, 8, 16])
def test_every_episode_ends_with_all_who_are_in_at_its_begin(num_ranks: int) -> None:
    kinds, most_lives = set(), 0
    for episode in range(200):
        assert episode_faults(7, episode, num_ranks, PHASES) == episode_faults(7, episode, num_ranks, PHASES)
        faults = faults_of(7, episode, num_ranks)
        assert faults and all(episode * STEPS <= fault.step < (episode + 1) * STEPS for fault in faults)
        gone = sorted(fault.lives[0] for fault in faults if fault.kind == "kill" or is_long(fault))
        back = sorted(fault.lives[0] for fault in faults if fault.kind == "rejoin")
        assert back == [(rank, life + 1) for rank, life in gone], "whoever loses its place is replaced"
        assert witness(7, num_ranks) not in {rank for rank, _ in gone}
        unproven = [fault for fault in faults if fault.kind in ("stop", "slow")]
        assert len(unproven) <= 1 and (not unproven or 2 < num_ranks - len({rank for rank, _ in gone}) + 1)
        most_lives = max([most_lives, *(life for _, life in back)])
        kinds |= {"long" if is_long(fault) else fault.kind for fault in faults}
    assert most_lives == 2, "some rank dies, comes back and dies again"
    assert kinds == ({"kill", "stop", "long", "slow", "rejoin"} if num_ranks >= 5 else {"kill", "rejoin"})


def test_a_seed_is_one_course_and_no_other() -> None:
    assert episode_faults(7, 0, 8, PHASES) != episode_faults(8, 0, 8, PHASES)
    assert episode_faults(7, 0, 8, PHASES) != episode_faults(7, 1, 8, PHASES)
    assert {witness(seed, 3) for seed in range(20)} == {0, 1, 2}


def drill_of(num_ranks: int):
    parser = LateHelpParser()
    add_arguments(parser)
    return read_drill(parser.parse_args(group_options(3, num_ranks)))


def ended_episode(drill, holdings: Holdings | None = None) -> Story:
    """Nothing was told but how the processes stand."""
    ranks = [RankStory(rank, state="finished", goes_on=True, holdings=holdings) for rank in range(drill.ranks)]
    return Story(ranks, [])


def test_a_broken_promise_ends_it_and_is_reported_with_what_repeats_it() -> None:
    soak = OneGroup(3, 4, 1000.0, drill_of(4), quiet=True)
    assert soak.next_episode(ended_episode(soak.drill)) is None, "nothing was completed in it"
    soak.take_last(ended_episode(soak.drill))
    answer = soak.report()
    assert answer["ok"] is False and answer["episodes"] == 1
    assert any("ranks [0, 1, 2, 3] should be in, and are not" in problem for problem in answer["problems"])
    assert all("fault-a2a soak --one-group --ranks 4 --seed 3" in problem for problem in answer["problems"])
    assert "BROKEN (seed 3)" in closing(answer) and "4 lives of 4 ranks" in closing(answer)


def test_nothing_finished_is_not_ok() -> None:
    answer = OneGroup(3, 4, 1000.0, drill_of(4), quiet=True).report()
    assert answer["ok"] is False and "no episode was finished" in answer["problems"][0]


def test_the_next_episode_follows_in_steps_and_the_last_is_judged_when_it_has_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    soak = OneGroup(3, 4, 1000.0, drill_of(4), quiet=True)
    assert all(fault.step < STEPS for fault in soak.drill.faults)
    well = dict.fromkeys(("corrupt_rows", "false_suspicions"), 0)

    def judge(story: Story) -> dict:
        from fault_a2a.cli.drill.report import report

        lines = [{"fault": str(fault), "kind": fault.kind, "happened": True} for fault in soak.drill.faults]
        epochs = 5 * (len(soak.reports) + 1)
        return report(soak.drill, story) | well | {"ok": True, "problems": [], "faults": lines, "epochs": epochs}

    monkeypatch.setattr(soak, "_judge", judge)
    held = Holdings(rss_kb=1000, files=20, threads=3, mappings=100)
    for number in (1, 2):
        drill = soak.next_episode(ended_episode(soak.drill, held))
        assert drill is not None and (drill.first_step, drill.steps) == (number * STEPS, (number + 1) * STEPS)
        assert drill.faults and all(drill.first_step <= fault.step < drill.steps for fault in drill.faults)
    soak.deadline = 0.0
    assert soak.next_episode(ended_episode(soak.drill, held)) is None and len(soak.reports) == 2
    soak.take_last(ended_episode(soak.drill, Holdings(rss_kb=1000, files=60, threads=3, mappings=100)))
    answer = soak.report()
    rejoins = [fault for number in range(3) for fault in faults_of_real(3, number, 4) if fault.kind == "rejoin"]
    assert answer["episodes"] == 3 and answer["lives"] == 4 + len(rejoins)
    assert answer["last_epoch"] == 15 and answer["epochs"] == 15, "epochs count on from episode to episode"
    assert not answer["ok"] and len(answer["problems"]) == 1 and "20 open files" in answer["problems"][0]
    assert answer["held"]["first"]["files"] == 20 and answer["held"]["last"]["files"] == 60


@pytest.mark.parametrize(
    ("name", "leak", "noise"), [("rss_kb", 40, 12_000), ("files", 1, 11), ("threads", 1, 1), ("mappings", 1, 20)]
)
def test_what_grows_with_every_replacement_is_found_and_what_comes_and_goes_is_not(
    name: str, leak: int, noise: int
) -> None:
    first = {"rss_kb": 300_000, "files": 40, "threads": 4, "mappings": 700}
    grown = first | {name: first[name] + leak * 1000}
    assert growth_problems([Holdings(**first), Holdings(**first | {name: first[name] + noise})], 8, 1000) == []
    (problem,) = growth_problems([Holdings(**first), Holdings(**grown)], 8, 1000)
    assert f"{grown[name]} " in problem and "after 1000 replacements" in problem


def test_it_is_not_judged_by_one_look() -> None:
    assert growth_problems([], 3, 9) == [] and growth_problems([Holdings()], 3, 9) == []


def soak_one_group(minutes: float, num_ranks: int, seed: int) -> dict:
    command = [sys.executable, "-m", "fault_a2a", "soak", "--one-group", "--json", "--minutes", str(minutes)]
    command += ["--ranks", str(num_ranks), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300 + 60 * minutes)
    assert done.stdout, done.stderr
    answer = json.loads(done.stdout)
    assert done.returncode == 0 and answer["ok"] is True, done.stdout + done.stderr
    assert answer["corrupt_rows"] == 0 and answer["false_suspicions"] == 0 and answer["views_agree"] is True
    assert answer["survivors"] == list(range(num_ranks)) and answer["evicted"] == []
    replaced = answer["faults_by_kind"]["rejoin"]
    assert answer["lives"] == num_ranks + replaced
    assert answer["last_epoch"] > replaced, "a view for each that comes in, and one at least for those who go"
    assert answer["held"]["rank"] == witness(seed, num_ranks)
    return answer


def test_a_short_soak_of_one_group_keeps_every_promise() -> None:
    answer = soak_one_group(0.05, 3, seed=5)
    most_lives = max(fault.life for fault in faults_of_real(5, 0, 3))
    assert answer["episodes"] >= 1 and most_lives == 2, "with this seed one rank dies twice in the first episode"


def faults_of_real(seed: int, episode: int, num_ranks: int) -> list[Fault]:
    texts = episode_faults(seed, episode, num_ranks, list(phases()))
    return parse_faults(**texts, num_ranks=num_ranks, num_steps=(episode + 1) * STEPS)


@pytest.mark.slow
def test_a_longer_soak_of_one_group_keeps_every_promise() -> None:
    answer = soak_one_group(1.5, 6, seed=6)
    assert answer["episodes"] >= 3 and answer["held"]["first"] != {}
