"""Deaths at every phase and in any order among free-running ranks: exact accounting, one view a round."""

from __future__ import annotations

import pytest
import torch

from fault_a2a import phases
from fault_a2a._core import core
from fault_a2a.testing.virtual import VirtualRanks
from tests import scenarios
from tests.rig import Work, run_checked, run_two_open, suspicions_of

torch.set_num_threads(1)
NUM_ROUNDS = 12


@pytest.mark.parametrize("two_open", [False, True], ids=["one_open", "two_open"])
@pytest.mark.parametrize("phase", phases())
@pytest.mark.parametrize("victims", [(2,), (0,), (0, 3)], ids=str)
def test_death_at_every_phase(phase: str, victims: tuple[int, ...], two_open: bool) -> None:
    config = scenarios.small()
    work = Work(config, 5)
    dead = set(victims)
    with VirtualRanks(5, config, poison=True) as ranks:
        for victim in victims:
            ranks.buffers[victim].arm(phase, 5, "crash")
        tallies = (run_two_open if two_open else run_checked)(ranks, work, NUM_ROUNDS)
        assert scenarios.corrupt(tallies) == []
        assert scenarios.one_view_per_round(ranks, work, tallies) == []
        assert scenarios.lost_between_live(ranks, work, tallies, dead) == []
        assert suspicions_of(ranks, set(range(5)) - dead) == []
        for tally in tallies:
            if tally.rank not in dead:
                assert (tally.rounds, tally.error) == (NUM_ROUNDS, None)
        survivors = tuple(sorted(set(range(5)) - dead))
        assert all(ranks.buffers[rank].view.active_ranks == survivors for rank in survivors)


@pytest.mark.parametrize("seed", range(6))
def test_evictions_until_two_are_left(seed: int) -> None:
    wrong, num_evictions = scenarios.evictions(seed, two_open=seed % 2 == 0)
    assert wrong == []
    assert num_evictions == 6


@pytest.mark.parametrize(
    ("first_round", "first_epoch"), [((1 << 24) - 6, 254), ((1 << 25) - 7, 255), (0, (1 << 40) - 1)]
)
def test_fields_wrap_in_the_middle_of_a_run(first_round: int, first_epoch: int) -> None:
    config = scenarios.small()
    work = Work(config, 4)
    with VirtualRanks(4, config, poison=True, first_round=first_round, first_epoch=first_epoch) as ranks:
        ranks.buffers[1].arm("dispatch.send_rows", first_round + 5, "crash")
        ranks.buffers[3].arm("combine.half_signalled", first_round + 9, "crash")
        tallies = run_two_open(ranks, work, 20)
        assert scenarios.corrupt(tallies) == []
        assert scenarios.one_view_per_round(ranks, work, tallies) == []
        assert scenarios.lost_between_live(ranks, work, tallies, {1, 3}) == []
        assert tallies[0].rounds == tallies[2].rounds == 20
        assert ranks.buffers[0].view.epoch == first_epoch + 2


def test_every_field_of_the_word_wraps() -> None:
    for bits, field in ((24, "round"), (8, "epoch"), (19, "count"), (8, "chunk"), (3, "attempt")):
        end = 1 << bits
        for value in (0, 1, end - 1, end, end + 1, 2 * end):
            fields = {"round": 0, "epoch": 0, "count": 0, "chunk": 0, "attempt": 0, field: value}
            found = core.unpack_signal(core.pack_signal(**fields))
            assert {name: found[name] for name in fields} == {**fields, field: value % end}


@pytest.mark.parametrize("number", [0, 1, (1 << 24) - 2, (1 << 24) - 1, 1 << 24, (1 << 24) + 1, 3 << 24])
def test_words_are_read_by_how_far_ahead_they_are(number: int) -> None:
    def word(ahead: int, epoch: int = 3, declined: bool = False) -> int:
        return core.pack_signal(round=(number + ahead) % (1 << 24), epoch=epoch, count=1, declined=declined)

    for ahead in (-4, -2, -1):
        assert core.read_signal(word(ahead), number, 3) == "absent"
    for ahead in (1, 2, 1000):
        assert core.read_signal(word(ahead), number, 3) == "declined"
    assert core.read_signal(word(0), number, 3) == "present"
    assert core.read_signal(word(0), number, 3 + 256) == "present"
    assert core.read_signal(word(0, epoch=2), number, 3) == "declined"
    assert core.read_signal(word(0, declined=True), number, 3) == "declined"


@pytest.mark.parametrize("first_round", [0, 1, 7, (1 << 24) - 1, 1 << 24])
def test_a_fresh_partition_has_no_special_word(first_round: int) -> None:
    for number in (first_round, first_round + 1):
        word = core.fresh_word(first_round, number % 2)
        assert core.unpack_signal(word)["declined"]
        assert core.read_signal(word, number, 0) == "absent"
        assert core.slot_is_free(word, number)
        assert not core.slot_is_free(word, number + 2)
