"""Scenarios as data: what a plan means, and how a wrong one is refused."""

from pathlib import Path

import pytest

from fault_a2a.cli.drill.faults import parse_faults
from fault_a2a.cli.drill.plan import missed, parse_plan, read_plan


def test_a_line_a_membership() -> None:
    plan = parse_plan("# who is in\nsteps 20\n[0, 1, 2, 3]\n[0,1,-2,3]  # rank 2 dies\n[0, 1, 3]\nstop 1@5:100\n")
    assert (plan.ranks, plan.steps) == (4, 60)
    assert plan.texts == {"kill": ["2@30"], "stop": ["1@5:100"], "cut": [], "slow": [], "rejoin": []}
    assert plan.members is None, "whether the stop costs rank 1 its place is the verdict's business"


def test_all_memberships_in_one_line_and_a_rank_that_comes_back() -> None:
    plan = parse_plan("[[0,1,2,3],[0,1,-2,3],[0,1,2,3]]")
    assert (plan.ranks, plan.steps, plan.members) == (4, 120, (0, 1, 2, 3))
    assert plan.texts["kill"] == ["2@60"] and plan.texts["rejoin"] == ["2@80"]
    faults = parse_faults(**plan.texts, num_ranks=plan.ranks, num_steps=plan.steps)
    assert [str(fault) for fault in faults] == ["kill 2@60", "rejoin 2@80"]


def test_a_rank_that_dies_comes_back_and_dies_again() -> None:
    plan = parse_plan("[0, 1, -2]\n[0, 1]\n[0, 1, 2]\n[0, 1, -2]\n[0, 1]")
    assert plan.texts["kill"] == ["2@20", "2@140"] and plan.texts["rejoin"] == ["2@80"] and plan.members == (0, 1)
    assert len(parse_faults(**plan.texts, num_ranks=plan.ranks, num_steps=plan.steps)) == 3
    by_lines = "[0, 1, 2]\n[0, 1, 2]\nkill 2@9\nrejoin 2@20\nkill 2@30"
    assert parse_plan(by_lines).members == (0, 1)
    assert parse_plan(f"{by_lines}\nrejoin 2@40").members == (0, 1, 2)


def test_rank_0_dies_by_its_minus_and_others_by_lines_of_their_own() -> None:
    plan = parse_plan("[-0, 1, 2]\n[1, 2]\nkill 2@70:combine.wait\n")
    assert plan.texts["kill"] == ["2@70:combine.wait", "0@20"] and plan.members == (1,)


def test_what_it_asks_for_is_read_like_options() -> None:
    plan = parse_plan("[0, 1, -2, 3]\n[0, 1, 3]\ncut 0-3@50\n")
    faults = parse_faults(**plan.texts, num_ranks=plan.ranks, num_steps=plan.steps)
    assert [str(fault) for fault in faults] == ["kill 2@20", "cut 0-3@50"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there is no membership"),
        ("steps 10", "there is no membership"),
        ("[0, 1]\nsteps one", "line 2: 'steps one': a stage has at least 2 steps"),
        ("[0, 1]\nsteps 1", "at least 2 steps"),
        ("[0, 2]", "line 1: the first membership has ranks \\[0, 2\\]; give it all ranks"),
        ("[0, 1, 1]", "rank 1 stands there twice"),
        ("[0, x]", "'x' is no rank; write 2, or -2"),
        ("[0, 1", "brackets do not match"),
        ("[[0, 1],[0, -1]", "brackets do not match"),
        ("[0, 1], [0]", "brackets do not match"),
        ("[0, 1, 2]\n[0, 1]", "line 2: rank 2 was in and did not die; write -2"),
        ("[0, 1]\n[0, 1, 2]", "line 2: rank 2 is not in the first membership"),
        ("[0, 1]\nshoot 1@3", "line 2: 'shoot 1@3': expected a membership"),
        ("[0, 1]\nkill", "expected a membership"),
    ],
)
def test_a_wrong_plan_is_refused_by_line_and_with_a_right_one(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"^--plan plan.*{said}"):
        parse_plan(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--plan .*missing: .*; name a text file"):
        read_plan(str(tmp_path / "missing"))


def test_who_must_be_left_is_held_against_who_is() -> None:
    assert missed(None, [0]) == [] and missed((0, 1), [0, 1]) == []
    assert missed((0, 1, 3), [0, 3]) == ["the plan ends with ranks [0, 1, 3], and the last view has [0, 3]"]
