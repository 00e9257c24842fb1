"""The drill as it is run: real processes, real faults, nothing left behind. The long runs are `make prove`'s."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.apart import command
from tests.drills import ROOT, SMALL, run_drills
from tests.test_drill_report import KEYS

SHARED_MEMORY = Path("/dev/shm")
QUICK = ["--silence-ms", "200"]
DRILLS = {
    "healthy": [],
    "kill": ["--kill", "1@10"],
    "kill rank 0": ["--kill", "0@10:combine.send_rows"],
    "kill from outside": ["--kill", "2@10+1500"],
    "two in one step": ["--kill", "1@10", "--kill", "2@10:dispatch.taken"],
    "one after another": ["--kill", "1@5", "--kill", "3@6"],
    "all but one": ["--kill", "0@10", "--kill", "1@10", "--kill", "2@10"],
    "in the last step": ["--kill", "1@19:combine.closed"],
    "judged later": ["--kill", "1@10", "--judge-later", "20"],
    "short stop": ["--stop", "1@10:40", "--silence-ms", "2000"],
    "long stop": ["--stop", "1@10:900", *QUICK],
    "long stop from outside": ["--stop", "3@10+500:900", *QUICK],
    # Red without `silent_go`: by accusations and numbers alone the two that accuse them would go.
    "half stopped": ["--stop", "1@10:900", "--stop", "2@10:900", *QUICK],
    "cut": ["--cut", "1-2@10", *QUICK],
    "slow": ["--slow", "1@10:1300", "--stall-ms", "500"],
    "a little slow": ["--slow", "1@10:200"],
    "other formats": [
        *("--kill", "1@10", "--recv-format", "packed", "--reduce", "expert"),
        *("--on-lost", "renormalize", "--dtype", "fp32"),
    ],
    "streams": ["--tokens", "24", "--chunk-tokens", "4", "--kill", "1@10:dispatch.chunk_taken", "--dtype", "fp16"],
    "cuda-host": ["--kill", "1@10", "--backend", "cuda-host", "--hidden", "256"],
    "cuda-host with cpu": [
        *("--kill", "1@6:combine.half_signalled", "--kill", "2@12:dispatch.copy"),
        *("--backend", "cuda-host,cpu", "--reduce", "expert", "--recv-format", "packed"),
    ],
    "cuda-host with cpu, streams": [
        *("--tokens", "24", "--chunk-tokens", "4", "--backend", "cuda-host,cpu", "--hidden", "256"),
        *("--kill", "1@6:combine.chunk", "--kill", "2@12:dispatch.chunk_taken"),
    ],
    "cuda-host, rejoin": ["--kill", "1@5", "--rejoin", "1@10", "--backend", "cuda-host,cpu"],
    "rejoin on cuda-host": ["--kill", "1@5", "--rejoin", "1@10", "--backend", "cpu,cuda-host"],
    # Red without the wait at the last step start: the steps are over before the process has found its members.
    "rejoin in the last step": ["--kill", "1@5", "--rejoin", "1@19"],
    "dies again": [
        *("--kill", "1@4", "--rejoin", "1@6", "--kill", "1@8:combine.send_rows"),
        *("--rejoin", "1@9", "--kill", "1@12+300", "--rejoin", "1@18"),
    ],
    # Red while a rank kept the steps that it had not judged to itself: nobody knew that this step had come.
    "dies right before the last step": ["--kill", "1@18", "--rejoin", "1@19"],
    "cuda-host, cut": ["--cut", "1-2@10", *QUICK, "--backend", "cuda-host,cpu"],
    "cuda-host, long stop": ["--stop", "1@10:900", *QUICK, "--backend", "cpu,cuda-host"],
    "no tokens": ["--tokens", "0", "--kill", "1@10"],
    "slow experts": ["--kill", "1@3", "--steps", "6", "--compute-us", "0-60000", "--silence-ms", "100"],
}


def names_in_shared_memory():
    return {path.name for path in SHARED_MEMORY.glob("fa2a-*")}


def come_true(condition, timeout_s=20):
    """Within the time. Another group that is just being built on this machine has names of its own for a moment."""
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.fixture(scope="module")
def answers():
    before = names_in_shared_memory()
    answers = run_drills([[*SMALL, *drill] for drill in DRILLS.values()], timeout_s=240)
    assert come_true(lambda: names_in_shared_memory() <= before)
    return dict(zip(DRILLS, answers, strict=True))


@pytest.fixture(autouse=True)
def drilled_anew(request):
    """A test that CI runs once more looks at new drills, and not at the ones that it was red with."""
    if getattr(request.node, "execution_count", 1) == 1 or "answers" not in request.fixturenames:
        return
    answers = request.getfixturevalue("answers")
    named = request.node.callspec.params["name"] if hasattr(request.node, "callspec") else None
    names = [named] if named else list(DRILLS)
    answers.update(zip(names, run_drills([[*SMALL, *DRILLS[name]] for name in names], timeout_s=240), strict=True))


@pytest.mark.parametrize("name", DRILLS)
def test_every_promise_holds(answers, name):
    answer = answers[name]
    assert answer["ok"] and answer["exit_code"] == 0, answer["problems"]
    assert answer["corrupt_rows"] == 0 and answer["false_suspicions"] == 0
    assert answer["accounting_exact"] and answer["views_agree"]
    assert set(KEYS) <= set(answer)
    steps = 6 if name == "slow experts" else 20
    assert answer["steps_completed"] == steps and all(line["happened"] for line in answer["faults"])


@pytest.mark.parametrize(
    ("name", "evicted", "evidence"),
    [
        ("healthy", [], None),
        ("kill", [1], "exit"),
        ("kill rank 0", [0], "exit"),
        ("kill from outside", [2], "exit"),
        ("two in one step", [1, 2], "exit"),
        ("one after another", [1, 3], "exit"),
        ("all but one", [0, 1, 2], "exit"),
        ("in the last step", [1], "exit"),
        ("short stop", [], None),
        ("long stop", [1], "silence"),
        ("long stop from outside", [3], "silence"),
        ("half stopped", [1, 2], "silence"),
        ("slow", [1], "stall"),
        ("a little slow", [], None),
        ("cuda-host", [1], "exit"),
        ("cuda-host with cpu", [1, 2], "exit"),
        ("cuda-host, long stop", [1], "silence"),
    ],
)
def test_who_goes_and_why(answers, name, evicted, evidence):
    answer = answers[name]
    assert answer["evicted"] == evicted
    assert answer["survivors"] == [rank for rank in range(4) if rank not in evicted]
    assert {kind for line in answer["faults"] for kind in line["evidence"]} <= {evidence}
    for line in answer["faults"]:
        assert (line["detect_ms"] is None) == (line["evicted"] is None)
        if line["evicted"] is not None:
            assert 0 <= line["suspect_ms"] <= line["detect_ms"] <= line["agree_ms"]


@pytest.mark.parametrize("name", ["cut", "cuda-host, cut"])
def test_a_cut_link_costs_one_rank(answers, name):
    answer = answers[name]
    assert len(answer["evicted"]) == 1 and answer["evicted"][0] in (1, 2)
    assert answer["agree_ms"] >= 200


def test_a_stop_is_noticed_by_its_silence_and_not_before(answers):
    for name in ("long stop", "long stop from outside"):
        # Since its last beat, which lies up to beat_ms before the stop.
        assert answers[name]["detect_ms"] >= 200 - 10


def test_a_new_process_comes_back_as_the_rank_that_died():
    drill = ["--steps", "200", "--compute-us", "4000", "--kill", "1@10", "--rejoin", "1@30"]
    (answer,) = run_drills([[*SMALL, *drill]])
    assert answer["ok"] and answer["exit_code"] == 0, answer["problems"]
    assert answer["survivors"] == [0, 1, 2, 3] and answer["evicted"] == []
    assert [view["active"] for view in answer["views"]] == [[0, 1, 2, 3], [0, 2, 3], [0, 1, 2, 3]]
    assert answer["steps_completed"] == 200 and answer["corrupt_rows"] == answer["false_suspicions"] == 0
    kill, rejoin = answer["faults"]
    assert kill["evicted"] == 1 and rejoin["evicted"] is None and rejoin["back_ms"] > 0


def test_each_life_of_a_rank_pays_for_what_struck_it(answers):
    answer = answers["dies again"]
    kills = [line for line in answer["faults"] if line["kind"] == "kill"]
    assert [line["evicted"] for line in kills] == [1, 1, 1] and all(set(line["evidence"]) == {"exit"} for line in kills)
    assert answer["survivors"] == [0, 1, 2, 3] and answer["epochs"] == 6
    assert all(line["back_ms"] > 0 for line in answer["faults"] if line["kind"] == "rejoin")


def test_what_is_counted(answers):
    answer = answers["kill"]
    assert answer["ranks"] == 4 and answer["epochs"] == 1
    assert answer["tokens_total"] == (3 * 20 + 10) * 8 and answer["choices_total"] == 2 * answer["tokens_total"]
    assert answer["choices_unroutable"] > 0 and answer["choices_repaired"] == 0
    assert answer["choices_lost"] + answer["choices_unroutable"] < answer["choices_total"]
    assert answers["healthy"]["choices_lost"] == answers["healthy"]["choices_unroutable"] == 0
    assert answers["no tokens"]["choices_total"] == 0


def test_without_beats_the_slow_experts_are_red():
    """The same as "slow experts", which is green: the judge can tell a slow rank that beats from one that does not."""
    slow = ["--steps", "5", "--compute-us", "0-400000", "--silence-ms", "100", "--agreement-ms", "1000"]
    well, sick = run_drills([[*SMALL, *slow], [*SMALL, *slow, "--without-guard", "beat"]])
    assert well["ok"] and well["false_suspicions"] == 0, well["problems"]
    assert not sick["ok"] and sick["exit_code"] == 1 and sick["false_suspicions"] > 0


# ---- the command ----------------------------------------------------------------------------------------------------
def test_json_is_all_that_stands_on_stdout():
    program = [sys.executable, "-m", "fault_a2a", "drill", *SMALL, "--kill", "1@10", "--json"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["survivors"] == [0, 2, 3] and done.stdout.count("\n") == 1 and not done.stderr


def test_plain_lines_in_a_pipe(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the same few words again and again")
    done = command("fault_a2a.cli.main", "drill", *SMALL, "--kill", "1@10+500", "--text", str(text))
    assert done.returncode == 0 and "\x1b" not in done.stdout and not done.stderr
    lines = " ".join(done.stdout.split())
    for sentence in (
        "4 processes run a mixture-of-experts layer over text.txt",
        "rank 1 is killed in step 10, 500 us after it began (SIGKILL)",
        "drops rank 1: its process is gone",
        "epoch 1 begins with ranks 0 2 3",
        "Ranks 0 2 3 completed 20 steps",
        "OK: every promise held",
    ):
        assert sentence in lines


def test_help_lists_the_phases():
    done = command("fault_a2a.cli.main", "drill", "--help")
    text = "".join(done.stdout.split())
    from fault_a2a import phases

    assert done.returncode == 0 and all(phase in text for phase in phases())
    assert "--without-guard" not in done.stdout and "--repair" not in done.stdout


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--kill", "9@1"], "there is no rank 9 among 8"),
        (["--kill", "1@1:lunch"], 'there is no phase "lunch"'),
        (["--rejoin", "1@1"], "rank 1 has not lost its place by then"),
        (["--repair"], "--repair: repairing a step from replicas comes with a later release"),
        (["--replicas", "2"], "--replicas: .* comes with a later release"),
        (
            ["--backend", "rocm"],
            "--backend rocm: 'rocm' is not known; pass some of cpu, cuda, triton, cuda-host, auto",
        ),
        (["--backend", "cpu,triton", "--chunk-tokens", "2"], "backend: 'triton' sends every batch in one chunk"),
        (["--hidden", "12"], "hidden: 12 is not a multiple of 8"),
        (["--topk", "40"], r"--topk \(num_topk: 40 is out of range"),
        (["--tokens", "524288"], r"--tokens \(num_max_tokens_per_rank: 524288 is out of range"),
        (["--agreement-ms", "0"], r"--agreement-ms \(agreement_timeout_ms: 0 is out of range"),
        (["--chunk-tokens", "0"], r"--chunk-tokens \(num_chunk_tokens: 0 is out of range"),
        (["--text", "/nowhere"], "--text /nowhere: No such file"),
        (["--compute-us", "5-1"], "--compute-us 5-1: expected microseconds"),
        (["--steps", "0"], "--steps 0: pass at least 1"),
        (["--judge-later", "-1"], "--judge-later -1: pass at least 0"),
        (["--ranks", "many"], "invalid int value"),
    ],
)
def test_wrong_options_are_refused_before_anything_starts(options, why):
    from fault_a2a.cli.main import main

    with pytest.raises(SystemExit) as error, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", lines := Lines())
        patch.delenv("FAULT_A2A_CORE", raising=False)
        main(["drill", *options])
    assert error.value.code == 2
    assert re.search(why, lines.text)


class Lines:
    text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


@pytest.mark.parametrize(
    ("strike", "number"),
    [
        (os.kill, signal.SIGINT),
        (os.kill, signal.SIGTERM),
        (os.kill, signal.SIGKILL),
        # Red when the store dies of it and is asked all the same.
        (os.killpg, signal.SIGTERM),
    ],
)
def test_an_interrupted_drill_leaves_no_process(strike, number):
    before = names_in_shared_memory()
    parent = subprocess.Popen(
        [sys.executable, "-m", "fault_a2a", "drill", *SMALL, "--steps", "100000", "--stop", "1@10:60000"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite behind `&` ignores it
    )
    try:
        for line in parent.stdout:
            if "is stopped" in line:
                break
        ranks = children_of(parent.pid)
        assert len(ranks) == 4 + 1, "and their store"
        strike(parent.pid, number)
        assert parent.wait(20) == {signal.SIGKILL: -signal.SIGKILL}.get(number, 130)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    assert come_true(lambda: not any(alive(rank) for rank in ranks))
    assert come_true(lambda: names_in_shared_memory() <= before)


def test_a_stopped_rank_stays_so_when_the_shell_goes_that_began_the_drill(tmp_path):
    """A soak is begun with nohup, and whoever began it logs out: the system wakes all that is stopped in its group."""
    said = tmp_path / "said"
    said.touch()
    # With jobs of its own (set -m) the shell keeps the drill's group from being an orphan for as long as it is there.
    script = 'set -m; nohup "$@" >"$SAID" 2>&1 & until grep -q "is stopped" "$SAID"; do sleep 0.01; done'
    drill = [sys.executable, "-m", "fault_a2a", "drill", *SMALL, "--stop", "1@10:2000", "--silence-ms", "400"]
    environment = {**os.environ, "SAID": str(said)}
    subprocess.run(
        ["bash", "-c", script, "bash", *drill], cwd=ROOT, env=environment, start_new_session=True, timeout=60
    )
    assert come_true(lambda: "promise" in said.read_text(), timeout_s=60)
    assert "OK: every promise held" in said.read_text() and "agreed to go on without rank 1" in " ".join(
        said.read_text().split()
    )


def children_of(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except OSError:
        return False


def test_a_group_that_cannot_be_built_is_reported(tmp_path):
    """Ranks that fail are the drill's answer, not its crash."""
    done = command("fault_a2a.cli.main", "drill", *SMALL, "--json", "--without-guard", "no such guard")
    answer = json.loads(done.stdout)
    assert done.returncode == 1 and not answer["ok"] and set(KEYS) <= set(answer)
    assert any("failed" in problem for problem in answer["problems"]) and "Traceback" in done.stderr


def test_no_command_has_picked_a_core_before_it_knows_its_options():
    """A fault at a phase needs the test build; the suite itself runs on that, so only a process without it can tell."""
    environment = {name: value for name, value in os.environ.items() if name != "FAULT_A2A_CORE"}
    program = "import sys, fault_a2a.cli.main; sys.exit('fault_a2a._core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, check=False).returncode == 0


def test_a_thread_that_is_just_ending_is_waited_for_and_one_that_stays_is_not(monkeypatch):
    from fault_a2a.cli.drill import parent

    listings = iter([["1", "2"], ["1", "2"], ["1"]])
    monkeypatch.setattr(parent.os, "listdir", lambda path: next(listings))
    assert parent._count_threads() == 1
    monkeypatch.setattr(parent.os, "listdir", lambda path: ["1", "2"])
    monkeypatch.setattr(parent, "_ENDING_THREAD_S", 0.01)
    assert parent._count_threads() == 2
