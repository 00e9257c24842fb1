"""Accidents in streams of chunks: each scenario returns what went wrong in it, which must be nothing."""

from __future__ import annotations

import ctypes

from fault_a2a._core import core
from fault_a2a.core_fields import window_fields
from tests import scenarios
from tests.rig import Work, run_checked
from tests.scenarios import Wrong, corrupt, lost_between_live, small


def stream_after_an_age() -> Wrong:
    """Rounds of one chunk for longer than half the numbers of rounds last, and then a stream. What its readers say of
    the stream before is that old; two rounds of one chunk have passed the place where it is said anew."""
    renewal, age = 17 << 21, (1 << 23) + 1000
    config = small(num_max_tokens_per_rank=24, num_chunk_tokens=4)
    work = Work(config, 3, num_tokens=lambda _, number: 24 if number >= renewal + 2 else 3)
    with scenarios.VirtualRanks(3, config, first_round=renewal - 2) as ranks:
        layout = core.window_layout(window_fields(config, 3))
        partitions = [at for buffer in ranks.buffers for at in buffer.core.addresses()["inbound"]]
        for parity in (0, 1):
            for offsets in (layout["dispatch_taken"], layout["combine_taken"]):
                for partition in partitions:
                    word = ctypes.c_uint64.from_address(partition + offsets[parity])
                    word.value = core.fresh_word(renewal - age, parity)
        tallies = run_checked(ranks, work, 6)
        return corrupt(tallies) + lost_between_live(ranks, work, tallies, set())
