"""The detector on made-up samples (tests/native/detector.cpp): what takes an accusation of a stall back."""

from tests.ballots import run


def test_a_stall_is_taken_back_by_another_round_or_phase_and_not_by_a_tick():
    # Red when any tick takes a stall back, the way it once was: four of the lines. And one each when `comes_on` is out
    # of Detector::judge, or the gate out of has_come_on.
    done = run("detector")
    assert done.returncode == 0 and "FAILED" not in done.stdout, done.stdout
    assert done.stdout.count("ok: ") == 11, done.stdout
