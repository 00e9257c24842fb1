"""Where every byte lies, as the kernels see it: the core's own numbers, and the memory that a rank's kernels share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from fault_a2a._core import core

OFFSETS = core.word_offsets()
NUMBERS = core.word_numbers()
FIELDS = core.word_fields()

# Columns of the table of peers: what one lane knows of each of them. int64 each.
COLUMNS = (
    *("active", "trusted", "inbound", "opened", "rows_to", "answers", "heard", "word", "bad", "rows_from"),
    *("choices_from", "taken", "answered", "seen", "seen_ns", "since_ns", "late_ns", "max_late_ns", "wait_ns"),
)
# How far the wait for one peer has come, in the column `heard`.
WAITING, PRESENT, OUT = 0, 1, 2
# Words of a lane, int64 each: what the host reads after a kernel.
LANE_WORDS = ("status", "round", "epoch", "token", "choice", "value", "num_received", "num_lost", "num_unroutable")
# Words that both lanes of a rank share.
RANK_WORDS = ("tick", "last_tick_ns", "last_rest_ns", "clock_ns")
# What becomes of a kernel that waits, in `status`.
DONE, STILL_WAITING, RELEASED = 0, 1, 2
# What is wrong with a choice, in `status`.
BAD_EXPERT, REPEATED_EXPERT = 1, 2

DTYPES = {"bfloat16": 0, "float16": 1, "float32": 2}
QUANTIZE = {"never": 0, "float32": 1, "ue8m0": 2}

# As csrc/protocol/guards.hpp numbers them. Only in the test build one can be out.
GUARDS = {name: 1 << place for place, name in enumerate(core.guard_names())}

MAX_RANKS = NUMBERS["max_ranks"]
MAX_TOKENS_BLOCK, MAX_EXPERTS_BLOCK, MAX_COPY_BLOCK, MAX_SUM_BLOCK = 32, 64, 1024, 1024


def constant(value: int) -> Any:
    """A number that kernels may read as a global."""
    return tl.constexpr(value)


@dataclass(frozen=True)
class Layout:
    """One rank's sizes and offsets, in bytes unless a name says otherwise; a constant of every kernel.

    ``*_step``: from what round r uses to what round r + 1 uses.
    """

    rank: int
    num_ranks: int
    num_experts: int
    num_local_experts: int
    max_local_experts: int
    num_topk: int
    max_choices: int
    num_tokens: int
    num_combine_rows: int
    hidden: int
    hidden_bytes: int
    dtype: int
    quantize: int
    payload_bytes: int
    scale_bytes: int
    scales_at: int
    dispatch_bytes: int
    packed: int
    capacity: int
    renormalize: int
    weights_at_expert: int
    reduce_at_expert: int
    # In a partition.
    partition_bytes: int
    header: int
    progress: int
    dispatch_signal: int
    dispatch_signal_step: int
    combine_signal: int
    combine_signal_step: int
    dispatch_taken: int
    dispatch_taken_step: int
    combine_taken: int
    combine_taken_step: int
    claims: int
    claims_step: int
    row_headers: int
    row_headers_step: int
    header_stride: int
    dispatch_rows: int
    dispatch_rows_step: int
    dispatch_stride: int
    combine_rows: int
    combine_rows_step: int
    combine_stride: int
    # How many a program looks at together: powers of two.
    ranks_block: int
    topk_block: int
    choices_block: int
    tokens_block: int
    experts_block: int
    copy_block: int
    sum_block: int
    # In a lane's memory.
    lane_peers: int
    lane_expert: int
    lane_dst: int
    lane_row: int
    lane_answer: int
    lane_weight: int
    lane_expert_rows: int
    lane_headers: int
    lane_first_choice: int
    lane_place: int
    lane_position: int
    lane_claims: int
    lane_first: int
    lane_bytes: int
    # Whose guards are out, one bit each: a constant, so that in production nothing of a switch is left.
    guards_off: int = 0

    @property
    def element_bytes(self) -> int:
        return self.hidden_bytes // self.hidden


def layout_of(fields: dict[str, Any], copy_block: int = MAX_COPY_BLOCK, sum_block: int = MAX_SUM_BLOCK) -> Layout:
    """The layout of one rank, out of what its native core was made from (``core_fields``). The blocks: at most."""
    window = core.window_layout(fields)
    ranks, topk, tokens = fields["num_ranks"], fields["num_topk"], fields["num_max_tokens_per_rank"]
    local, choices = fields["max_local_experts"], window["max_choices"]
    hidden = fields["hidden_bytes"] // (4 if fields["dtype"] == "float32" else 2)
    block = triton.next_power_of_2
    sizes = {
        "lane_peers": 8 * len(COLUMNS) * block(ranks) + 8 * len(LANE_WORDS),
        **dict.fromkeys(("lane_expert", "lane_dst", "lane_row", "lane_answer", "lane_weight"), 4 * tokens * topk),
        "lane_expert_rows": 4 * fields["num_experts"],
        "lane_headers": ranks * tokens * window["header_stride"],
        "lane_first_choice": 4 * ranks * tokens,
        **dict.fromkeys(("lane_place", "lane_position"), 4 * ranks * tokens * choices),
        **dict.fromkeys(("lane_claims", "lane_first"), 4 * ranks * local),
    }
    lane, at = {}, 0
    for name, num_bytes in sizes.items():
        lane[name] = at
        at += -(-num_bytes // 64) * 64
    return Layout(
        rank=fields["rank"],
        num_ranks=ranks,
        num_experts=fields["num_experts"],
        num_local_experts=fields["num_local_experts"],
        max_local_experts=local,
        num_topk=topk,
        max_choices=choices,
        num_tokens=tokens,
        num_combine_rows=window["num_combine_rows"],
        hidden=hidden,
        hidden_bytes=fields["hidden_bytes"],
        dtype=DTYPES[fields["dtype"]],
        quantize=QUANTIZE[fields["quantize"]],
        **{name: fields[name] for name in ("payload_bytes", "scale_bytes", "scales_at", "dispatch_bytes")},
        **{name: int(fields[name]) for name in ("packed", "renormalize", "weights_at_expert", "reduce_at_expert")},
        capacity=ranks * tokens,
        partition_bytes=window["partition_bytes"],
        header=window["header"] + OFFSETS["incarnation"],
        progress=window["progress"],
        **_by_parity(window),
        **{name: window[name] for name in ("header_stride", "dispatch_stride", "combine_stride")},
        ranks_block=block(ranks),
        topk_block=block(topk),
        choices_block=block(choices),
        tokens_block=min(block(tokens), MAX_TOKENS_BLOCK),
        experts_block=min(block(local), MAX_EXPERTS_BLOCK),
        copy_block=min(block(max(fields["payload_bytes"], fields["hidden_bytes"]) // 8), copy_block),
        sum_block=min(block(hidden), sum_block),
        **lane,
        lane_bytes=at,
    )


def _by_parity(window: dict[str, Any]) -> dict[str, int]:
    """The two places of what alternates by the parity of the round: the first, and the way from it to the second."""
    names = ("dispatch_signal", "combine_signal", "dispatch_taken", "combine_taken", "claims", "row_headers")
    out = {}
    for name in (*names, "dispatch_rows", "combine_rows"):
        even, odd = window[name]
        out[name], out[f"{name}_step"] = even, odd - even
    return out
