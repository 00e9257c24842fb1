"""Windows handed from process to process: to those of the same user, and to no other (tests/native/doors.cpp)."""

import os

from tests.ballots import run


def test_a_door_opens_to_its_own_user_only():
    # Red without either look at who stands at the other end: the native program plays both, knowing neither.
    done = run("doors")
    assert done.returncode == 0 and "FAILED" not in done.stdout, done.stdout
    assert done.stdout.count("ok: ") == (7 if os.geteuid() == 0 else 5), done.stdout
