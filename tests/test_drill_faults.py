"""The drill's fault options: what they mean, and that each refusal names the option and shows a right one."""

from __future__ import annotations

import argparse

import pytest

from fault_a2a.cli.drill.faults import DEFAULT_PHASE, KINDS, Fault, add_fault_options, parse_faults
from fault_a2a.cli.drill.options import Drill

GROUP = {"num_ranks": 8, "num_steps": 200, "phases": ["dispatch.gate", "combine.reduce"]}


@pytest.mark.parametrize(
    ("option", "text", "fault"),
    [
        ("kill", "3@50", Fault("kill", rank=3, step=50)),
        ("kill", "0@0:dispatch.gate", Fault("kill", rank=0, step=0, phase="dispatch.gate")),
        ("kill", "7@199:combine.reduce", Fault("kill", rank=7, step=199, phase="combine.reduce")),
        ("stop", "3@50:4000", Fault("stop", rank=3, step=50, duration_ms=4000)),
        ("cut", "2-5@7", Fault("cut", rank=2, peer=5, step=7)),
        ("slow", "3@50:40000", Fault("slow", rank=3, step=50, duration_ms=40000)),
        ("cut", "5-2@7", Fault("cut", rank=2, peer=5, step=7)),
        ("kill", " 3@50 ", Fault("kill", rank=3, step=50)),
        ("kill", "3@50+1500", Fault("kill", rank=3, step=50, after_us=1500)),
        ("stop", "3@50+0:4000", Fault("stop", rank=3, step=50, after_us=0, duration_ms=4000)),
    ],
)
def test_reads(option, text, fault):
    (got,) = parse_faults(**{option: [text]}, **GROUP)
    assert got == fault
    kind, again = str(got).split(" ")
    assert parse_faults(**{kind: [again]}, **GROUP) == [fault], "it writes itself as it is read"


def test_none():
    assert parse_faults(**GROUP) == []


def test_several_stand_by_step():
    faults = parse_faults(kill=["3@50", "0@20:dispatch.gate"], stop=["1@30:100", "1@40:100"], cut=["4-5@50"], **GROUP)
    assert [str(fault) for fault in faults] == [
        "kill 0@20:dispatch.gate",
        "stop 1@30:100",
        "stop 1@40:100",
        "kill 3@50",
        "cut 4-5@50",
    ]


def test_two_victims_in_one_step_and_a_stop_before_a_kill():
    assert len(parse_faults(kill=["3@50", "4@50"], stop=["3@10:5"], **GROUP)) == 3


@pytest.mark.parametrize(
    ("option", "text", "why"),
    [
        ("kill", "", r"expected R@S\[:PHASE\]"),
        ("kill", "3", r"expected R@S\[:PHASE\]"),
        ("kill", "-1@3", r"expected R@S\[:PHASE\]"),
        ("kill", "3@5@6", r"expected R@S\[:PHASE\]"),
        ("kill", "3@50:", r"expected R@S\[:PHASE\]"),
        ("kill", "٣@50", r"expected R@S\[:PHASE\]"),
        ("kill", "8@50", "there is no rank 8 among 8 .ranks 0 to 7."),
        ("kill", "3@200", "there is no step 200 among 200 .steps 0 to 199."),
        ("kill", "3@50:lunch", 'there is no phase "lunch"; the phases are dispatch.gate, combine.reduce'),
        ("kill", "3@50+", r"expected R@S\[:PHASE\]"),
        ("kill", "3@50+9:dispatch.gate", r"expected R@S\[:PHASE\]"),
        ("kill", "3@50+60000001", "a step is over after"),
        ("stop", "3@50", r"expected R@S\[\+US\]:MS"),
        ("stop", "3@50:4s", r"expected R@S\[\+US\]:MS"),
        ("stop", "3@50:0", "a stop lasts 1 to"),
        ("stop", "3@50:99999999", "a stop lasts 1 to"),
        ("stop", "9@50:10", "there is no rank 9"),
        ("cut", "2@7", "expected A-B@S"),
        ("slow", "3@50", "expected R@S:MS"),
        ("slow", "3@50:0", "a slow rank is late by 1 to"),
        ("cut", "2-9@7", "there is no rank 9"),
        ("cut", "2-2@7", "a rank has no link to itself"),
        ("rejoin", "3", "expected R@S"),
    ],
)
def test_refusals_name_the_option_and_show_a_right_one(option, text, why):
    with pytest.raises(
        ValueError, match=rf"^--{option} .*: {why}.*; a right one looks like --{option} (?P<right>\S+)$"
    ) as e:
        parse_faults(**{option: [text]}, **GROUP)
    right = str(e.value).rsplit(" ", 1)[1]
    if option != "rejoin":
        assert parse_faults(**{option: [right]}, **GROUP), "the example it shows is accepted"


def test_rejoin_follows_a_fault_that_cost_the_place():
    rejoin = parse_faults(kill=["3@50"], rejoin=["3@80"], **GROUP)[-1]
    assert (rejoin.kind, rejoin.rank, rejoin.step, rejoin.needs_hooks) == ("rejoin", 3, 80, False)


@pytest.mark.parametrize(
    ("faults", "why"),
    [
        ({"rejoin": ["3@80"]}, "has not lost its place"),
        ({"kill": ["3@80"], "rejoin": ["3@80"]}, "has not lost its place"),
        ({"kill": ["3@50"], "rejoin": ["3@80", "3@90"]}, "has not lost its place"),
        ({"kill": ["3@50", "3@90", "3@95"], "rejoin": ["3@80"]}, r"rank 3 is dead by then \(--kill 3@90\)"),
        ({"kill": ["3@50"], "rejoin": ["3@80", "3@90"], "stop": ["2@10:50"]}, "rank 3 has not lost its place"),
    ],
)
def test_rejoin_that_does_not_fit_is_refused(faults, why):
    with pytest.raises(ValueError, match=why):
        parse_faults(**faults, **GROUP)


def test_a_fault_strikes_the_life_that_leads_the_rank_by_then():
    faults = parse_faults(kill=["3@50", "3@90+7"], cut=["3-2@130"], rejoin=["3@80", "3@120"], **GROUP)
    assert [(str(fault), fault.lives) for fault in faults] == [
        ("kill 3@50", ((3, 0),)),
        ("rejoin 3@80", ((3, 1),)),
        ("kill 3@90+7", ((3, 1),)),
        ("rejoin 3@120", ((3, 2),)),
        ("cut 2-3@130", ((2, 0), (3, 2))),
    ]
    drill = Drill(ranks=8, steps=200, faults=tuple(faults))
    assert drill.meetings == {90, 130, 199}, "steps that begin only once whom they strike is in, and the last one"
    assert Drill(faults=tuple(faults[:2])).meetings == {199} and not Drill(faults=tuple(faults[:1])).meetings


def test_any_phase_will_do_until_they_are_known():
    (fault,) = parse_faults(kill=["3@5:lunch"], num_ranks=8, num_steps=9)
    assert fault.phase == "lunch"


@pytest.mark.parametrize(
    ("option", "text", "armed", "needs_hooks", "ranks"),
    [
        ("kill", "3@5", DEFAULT_PHASE, True, (3,)),
        ("kill", "3@5:dispatch.gate", "dispatch.gate", True, (3,)),
        ("kill", "3@5+100", None, False, (3,)),
        ("stop", "3@5:100", DEFAULT_PHASE, True, (3,)),
        ("stop", "3@5+7:100", None, False, (3,)),
        ("cut", "5-2@5", None, True, (2, 5)),
        ("slow", "3@5:100", None, False, (3,)),
    ],
)
def test_where_a_fault_comes_from(option, text, armed, needs_hooks, ranks):
    """At a phase the rank does it to itself, which only the test build can; from outside any build will do."""
    (fault,) = parse_faults(**{option: [text]}, **GROUP)
    assert (fault.armed_phase, fault.needs_hooks, fault.ranks) == (armed, needs_hooks, ranks)


def test_the_default_phase_exists():
    from fault_a2a import phases

    assert DEFAULT_PHASE in phases()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"kill": ["3@50", "3@60"]}, r"^--kill 3@60: rank 3 is dead by then \(--kill 3@50\)"),
        ({"kill": ["3@50"], "stop": ["3@60:10"]}, r"^--stop 3@60:10: rank 3 is dead by then"),
        ({"kill": ["3@50"], "cut": ["1-3@60"]}, r"^--cut 1-3@60: rank 3 is dead by then"),
        ({"kill": ["3@50", "3@50:dispatch.gate"]}, r"rank 3 has a fault in that step already \(--kill 3@50\)"),
        ({"kill": ["3@50"], "stop": ["3@50:10"]}, r"rank 3 has a fault in that step already"),
        ({"cut": ["1-3@50", "3-1@60"]}, r"^--cut 1-3@60: this link is cut already \(--cut 1-3@50\)"),
        ({"kill": [f"{rank}@5" for rank in range(8)]}, r"^--kill: all 8 ranks would be dead; leave at least one"),
    ],
)
def test_faults_that_do_not_fit_each_other(options, why):
    with pytest.raises(ValueError, match=why):
        parse_faults(**options, **GROUP)


def test_command_line():
    parser = argparse.ArgumentParser(prog="drill")
    add_fault_options(parser)
    args = parser.parse_args(["--kill", "3@50", "--kill=4@50", "--stop", "1@2:3", "--cut", "1-2@3"])
    given = {kind: getattr(args, kind) for kind in KINDS}
    assert given == {"kill": ["3@50", "4@50"], "stop": ["1@2:3"], "cut": ["1-2@3"], "slow": [], "rejoin": []}
    assert len(parse_faults(**given, **GROUP)) == 4
    text = parser.format_help()
    assert all(f"--{kind}" in text for kind in KINDS)
    assert vars(parser.parse_args([])) == {kind: [] for kind in KINDS}
