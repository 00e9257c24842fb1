"""One rank whose kernels are Triton's: the verbs of the native core (``fault_a2a.rounds.Verbs``) by other means.

Membership, beats, doorbells and views stay in the core. A kernel that waits looks a bounded number of times and is
launched again; in between this rank sleeps on its doorbell, as the CPU's kernels do.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fault_a2a._core import core
from fault_a2a.kernels.triton import combine, dispatch, expand, layout, window, words
from fault_a2a.kernels.triton.lane import Lane
from fault_a2a.kernels.triton.layout import NUMBERS, layout_of
from fault_a2a.kernels.triton.target import HAS_PTX, INTERPRETED, SOME_ADDRESS, compile_ahead, launch
from fault_a2a.kernels.triton.tuning import blocks_for

T = TypeVar("T")
Dispatched = tuple[str, int, int, int, int, int]  # status, round, rows received; of a wrong choice: where, and what

# An interpreted kernel keeps all other threads of this process from theirs while it looks.
NUM_POLLS = 2 if INTERPRETED else 1 << 14
NUM_LANES = NUMBERS["num_parities"]
NO_PLANT, PLANT_UNBOUNDED, PLANT_SIGNAL_FIRST = 0, 1, 2  # beside the guards, for the tests that must find them
_POINTS = {name: idx for idx, name in enumerate(core.phases())}
_PHASES = {name: NUMBERS[f"phase_{name}"] for name in ("caller", "closed")}
_WRONG = {layout.BAD_EXPERT: "bad_expert", layout.REPEATED_EXPERT: "repeated_expert"}


class _Crashed(Exception):
    """A virtual rank was told to die here; only the test build does that."""


class Rank:
    """The verbs of one rank.

    Args:
        endpoint: its native core, opened.
        fields: what that was made from.

    One call at a time; a second one waits for the first.
    """

    def __init__(self, endpoint: Any, fields: dict[str, Any]) -> None:
        blocks = blocks_for(fields)
        self.endpoint, self.at = endpoint, layout_of(fields, blocks.copy, blocks.sum)
        self.plant = NO_PLANT
        self.num_ranks = fields["num_ranks"]
        self._device = "cpu" if INTERPRETED else "cuda"
        where = endpoint.addresses()
        self._state, self._page, self._windows = where["state"], where["page"], where["outbound"]
        self._inbound, self._outbound = self._table(where["inbound"]), self._table(where["outbound"])
        self._words = self._table([0] * len(layout.RANK_WORDS))
        self._lanes = [Lane(self.at, self._device) for _ in range(NUM_LANES)]
        self._expert_rank = self._table(fields["expert_rank"], torch.int32)
        self._expert_local = self._table(fields["expert_local"], torch.int32)
        self._experts_of_rank = self._table(_experts_of_rank(fields), torch.int32)
        self._has_scales = fields["scale_bytes"] > 0
        self._sink: torch.Tensor | None = None
        self._calls = threading.Lock()
        self._closed = False
        self._next_round = endpoint.stats()["next_round"]  # not 0 for one that comes later
        self._stats = {"num_rounds": 0, "num_rejected": 0, "num_rechecks": 0, "num_lost": 0, "num_unroutable": 0}
        self._from_source = torch.zeros(self.num_ranks, 3, dtype=torch.int64)  # rows, bytes, failures
        self._ns_per_poll = 0 if HAS_PTX else self._time_a_poll()
        self._compile()

    def _table(self, values: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)

    def _compile(self) -> None:
        """What the warm-up round does not come to, which has no tokens and so no rows.

        Its first use would be in a round in which time counts, and a compilation longer than ``stall_ms`` is a death.
        """
        lane, at, outbound = self._lanes[0].address, self.at, self._outbound.data_ptr()
        for is_64_bit in (0, 1):
            compile_ahead(dispatch.check_choices, SOME_ADDRESS, 1, lane, at, is_64_bit)
        quantizes = at.quantize != layout.QUANTIZE["never"]
        for has_scales in (0, 1) if quantizes else (int(at.scale_bytes > 0),):
            rows = (SOME_ADDRESS, SOME_ADDRESS if has_scales else 0, SOME_ADDRESS, SOME_ADDRESS, lane, 0)
            compile_ahead(dispatch.store_rows, *rows, at, has_scales)
        compile_ahead(dispatch.route, SOME_ADDRESS, SOME_ADDRESS, 1, lane, at)
        compile_ahead(combine.return_rows, SOME_ADDRESS, outbound, lane, at)
        compile_ahead(combine.reduce_rows, *[SOME_ADDRESS] * 3, lane, at)

    def _time_a_poll(self) -> int:
        """How long one look of a wait takes, for kernels without a clock: a wait's time is read at each launch, and
        this carries it on to the next. Measured on words of nobody."""
        num_polls, lane = 8, Lane(self.at, self._device)
        state = self._table([0] * (layout.OFFSETS["stall_ns"] // 8) + [1 << 62] * layout.MAX_RANKS)
        nothing = self._table([0] * (layout.OFFSETS["page_sent"] // 8))
        lane.set_word("round", 1 << 8)
        lane.fill("trusted", 1)
        lane.fill("inbound", nothing.data_ptr())
        fixed = (state.data_ptr(), nothing.data_ptr(), self._outbound.data_ptr(), lane.address, nothing.data_ptr())
        args = (*fixed, core.now_ns(), 0, 1 << 62, num_polls, 0, 0, -1, -1, self.at, *self._verb("dispatch"))
        took_ns = []
        for _ in range(2):  # the first one builds the kernel
            began_ns = core.now_ns()
            launch(window.wait_for_words, 1, *args, HAS_PTX, NO_PLANT)
            took_ns.append(core.now_ns() - began_ns)
        return max(took_ns[-1] // num_polls, 1)

    # -- the verbs, each in two halves -------------------------------------------------------------------------------

    def _call(self, work: Callable[[], T], answer: Callable[[str], T]) -> T:
        """What ended this rank answers before any work is begun."""
        with self._calls:
            status = "closed" if self._closed else self.endpoint.status()
            if status in ("evicted", "closed"):
                return answer(status)
            if core.has_hooks:
                self._take_guards_out()
                self._cut_off()
            try:
                return work()
            except _Crashed:
                self._closed = True
                return answer("closed")

    def dispatch_send(
        self, x: int, scales: int, topk_idx: int, idx_is_64_bit: bool, topk_weights: int, num_tokens: int
    ) -> Dispatched:
        def work() -> Dispatched:
            round_number, lane = self._next_round, self._lanes[self._next_round % NUM_LANES]
            launch(dispatch.check_choices, 1, topk_idx, num_tokens, lane.address, self.at, int(idx_is_64_bit))
            wrong = lane.word("status")
            if wrong:
                return _WRONG[wrong], 0, 0, lane.word("token"), lane.word("choice"), lane.word("value")
            if lane.stage != "closed" and not words.THIRD_ROUND.value & self.at.guards_off:
                return "third_round", round_number, 0, 0, 0, 0
            status = self._pass_gate(lane, round_number)
            if status != "ok":
                return status, 0, 0, 0, 0, 0
            lane.open(round_number, num_tokens)
            self._next_round += 1
            self.endpoint.set_next_round(self._next_round)
            self._send_rows(lane, x, scales, topk_weights)
            return "ok", round_number, 0, 0, 0, 0

        return self._call(work, lambda status: (status, 0, 0, 0, 0, 0))

    def dispatch_receive(
        self, round_number: int, recv_x: int, recv_scales: int, recv_weights: int, counts: int, offsets: int
    ) -> Dispatched:
        def work() -> Dispatched:
            lane = self._lanes[round_number % NUM_LANES]
            if lane.round_number != round_number or lane.stage != "sent":
                return "bad_handle", round_number, 0, 0, 0, 0
            self._reach("dispatch.wait", lane)
            status = self._wait(lane, "dispatch")
            if status != "ok":
                # A closing rank still owes its peers an answer to this round; close() sends it.
                lane.stage = lane.stage if status == "closed" else "closed"
                return status, round_number, 0, 0, 0, 0
            self._take_rows(lane, recv_x, recv_scales, recv_weights, counts, offsets)
            return "ok", round_number, lane.word("num_received"), 0, 0, 0

        return self._call(work, lambda status: (status, round_number, 0, 0, 0, 0))

    def combine_send(self, y: int, round_number: int) -> str:
        return self._call(lambda: self._answer(y, round_number, is_abandoned=False), str)

    def combine_receive(self, round_number: int, out: int, codes: int, lost: int, topk_weights: int = 0) -> str:
        def work() -> str:
            lane = self._lanes[round_number % NUM_LANES]
            if lane.round_number != round_number or lane.stage != "answered":
                return "bad_handle"
            return self._close_round(lane, (out, codes, lost, topk_weights))

        return self._call(work, str)

    def abandon(self, round_number: int) -> str:
        return self._call(lambda: self._abandon(round_number), str)

    def begin_step(self) -> tuple[str, bool]:
        def work() -> tuple[str, bool]:
            if any(lane.stage != "closed" for lane in self._lanes):
                return "open_round", False
            status, is_out = self.endpoint.begin_step()
            return status, is_out

        return self._call(work, lambda status: (status, False))

    def close(self) -> None:
        """Answers open rounds and leaves. A call in progress ends within one wake-up."""
        self.endpoint.end_waits()
        with self._calls:
            if not self._closed:
                self._closed = True
                # Peers wait for an answer to every round that was opened.
                for lane in self._lanes:
                    if lane.stage != "closed":
                        self._abandon(lane.round_number)
        self.endpoint.close()

    # -- what is known of rounds -------------------------------------------------------------------------------------

    def _lane_of(self, round_number: int) -> Lane | None:
        lane = self._lanes[round_number % NUM_LANES]
        return lane if lane.stage != "closed" and lane.round_number == round_number else None

    def open_tokens(self, round_number: int) -> int:
        lane = self._lane_of(round_number)
        return -1 if lane is None else lane.num_tokens

    def sources(self, round_number: int) -> list[list[int]]:
        lane = self._lane_of(round_number)
        return [] if lane is None else lane.sources()

    def stats(self) -> dict[str, int]:
        return {**self._stats, "next_round": self._next_round}

    def source_stats(self) -> list[list[int]]:
        late, longest, waited = (
            torch.stack([lane.column(name) for lane in self._lanes]) for name in ("late_ns", "max_late_ns", "wait_ns")
        )
        times = torch.stack([waited.sum(0), late.sum(0), longest.amax(0)], dim=1).cpu()
        return [[*line, *counts] for line, counts in zip(times.tolist(), self._from_source.tolist(), strict=True)]

    # -- dispatch ----------------------------------------------------------------------------------------------------

    def _pass_gate(self, lane: Lane, round_number: int) -> str:
        lane.round_number = round_number
        self._reach("dispatch.gate", lane)
        addresses = (self._state, self._page, self._outbound.data_ptr(), self._inbound.data_ptr(), lane.address)

        def look(is_first: int) -> int:
            clock = (core.now_ns(), self._ns_per_poll, self.endpoint.tick_ns(), NUM_POLLS)
            words_at = self._words.data_ptr()
            launch(window.pass_gate, 1, *addresses, words_at, round_number, *clock, is_first, self.at, HAS_PTX)
            return lane.word("status")

        while self._look_until(look) == layout.RELEASED:
            # ok: quorum came back between the two looks, and this round has not begun.
            status = str(self.endpoint.status())
            if status != "ok":
                return status
        self._reach("dispatch.started", lane)
        return "ok"

    def _send_rows(self, lane: Lane, x: int, scales: int, topk_weights: int) -> None:
        at, outbound = self.at, self._outbound.data_ptr()
        lane.forget_experts()
        launch(
            dispatch.route,
            self.num_ranks,
            topk_weights,
            self._expert_rank.data_ptr(),
            lane.num_tokens,
            lane.address,
            at,
        )
        addresses = (self._state, self._page, outbound, lane.address, self._words.data_ptr())
        launch(dispatch.open_dispatch, 1, *addresses, at)
        launch(dispatch.store_claims, self.num_ranks, outbound, self._experts_of_rank.data_ptr(), lane.address, at)
        if self.plant == PLANT_SIGNAL_FIRST:
            self._signal(lane, "dispatch")
            self._reach("dispatch.rows_sent", lane)
        halves = [(0, lane.num_tokens)]
        if core.has_hooks:
            halves = [(0, lane.num_tokens // 2), (lane.num_tokens // 2, lane.num_tokens)]
        for first, last in halves:
            if first and bool((lane.column("rows_to") * lane.column("opened")).any()):
                self._reach("dispatch.send_rows", lane)
            rows = (x, scales, self._expert_local.data_ptr(), outbound, lane.address, first)
            launch(dispatch.store_rows, last - first, *rows, at, int(scales != 0))
        self._reach("dispatch.rows_sent", lane)
        if self.plant != PLANT_SIGNAL_FIRST:
            self._signal(lane, "dispatch")
        self._show(lane, "caller")

    def _take_rows(
        self, lane: Lane, recv_x: int, recv_scales: int, recv_weights: int, counts: int, offsets: int
    ) -> None:
        at = self.at
        launch(expand.take_headers, self.num_ranks, lane.address, at)
        num_blocks = -(-at.num_local_experts // at.experts_block)
        launch(expand.rank_rows, self.num_ranks * num_blocks, lane.address, at)
        self._stats["num_rejected"] += int(((lane.column("heard") == layout.PRESENT) & (lane.column("bad") != 0)).sum())
        while True:
            launch(expand.assign_places, 1, counts, offsets, lane.address, at)
            self._reach("dispatch.copy", lane)
            kinds = (int(recv_scales != 0), int(recv_weights != 0))
            rows = (recv_x, recv_scales, recv_weights, lane.address)
            launch(expand.copy_rows, self.num_ranks * at.num_tokens, *rows, at, *kinds)
            if self._nobody_tore(lane, "dispatch"):
                break
        self._reach("dispatch.chunk_taken", lane)
        self._end_words(lane, "dispatch", lane.column("rows_from"), at.dispatch_bytes)
        lane.stage = "received"
        self._stats["num_rounds"] += 1
        self._show(lane, "caller")
        self._reach("dispatch.taken", lane)

    # -- combine -----------------------------------------------------------------------------------------------------

    def _answer(self, y: int, round_number: int, is_abandoned: bool) -> str:
        lane = self._lanes[round_number % NUM_LANES]
        if lane.round_number != round_number or lane.stage in ("closed", "answered"):
            return "bad_handle"
        if lane.stage == "sent" and not is_abandoned:
            return "not_received"
        self._reach("combine.begin", lane)
        outbound = self._outbound.data_ptr()
        if lane.stage == "sent":  # nothing of this dispatch was taken, and nothing will be
            self._refuse(lane, "dispatch")
        addresses = (self._state, self._page, outbound, lane.address, self._words.data_ptr())
        launch(combine.open_answers, 1, *addresses, int(is_abandoned), self.at)
        if not is_abandoned:
            launch(combine.return_rows, self.num_ranks * self.at.num_tokens, y, outbound, lane.address, self.at)
        self._reach("combine.send_rows", lane)
        self._signal(lane, "combine")
        lane.stage = "answered"
        self._show(lane, "caller")
        return "ok"

    def _close_round(self, lane: Lane, tensors: tuple[int, int, int, int] | None) -> str:
        """``tensors`` None: the round was abandoned here; answers are waited for and not looked at."""
        self._reach("combine.wait", lane)
        status = self._wait(lane, "combine")
        if status == "ok" and tensors is not None:
            out, codes, lost, late_weights = tensors
            weights = late_weights or lane.address + self.at.lane_weight
            while True:
                launch(combine.count_answers, 1, lane.address, self.at)
                self._reach("combine.reduce", lane)
                launch(combine.reduce_rows, lane.num_tokens, out, codes, weights, lane.address, self.at)
                if self._nobody_tore(lane, "combine"):
                    break
            launch(combine.tell_lost, 1, lost, lane.address)
            for name in ("num_lost", "num_unroutable"):
                self._stats[name] += lane.word(name)
            self._reach("combine.chunk_taken", lane)
        else:
            lane.fill("answered", 0)
        self._end_words(lane, "combine", lane.column("answers"), self.at.hidden_bytes)
        lane.stage = "closed"
        self._show(lane, "closed")
        self._reach("combine.closed", lane)
        return status

    def _abandon(self, round_number: int) -> str:
        lane = self._lane_of(round_number)
        if lane is None:
            return "bad_handle"
        if lane.stage != "answered":
            self._answer(0, round_number, is_abandoned=True)
        return self._close_round(lane, None)

    # -- what both verbs do ------------------------------------------------------------------------------------------

    def _verb(self, verb: str) -> tuple[int, int, int, int]:
        """Where the words of a verb stand in a partition, the phase in which they are waited for, and their kind."""
        at = self.at
        if verb == "dispatch":
            place = (at.dispatch_signal, at.dispatch_signal_step)
        else:
            place = (at.combine_signal, at.combine_signal_step)
        return *place, NUMBERS[f"phase_{verb}_wait"], NUMBERS[f"kind_{verb}_signal"]

    def _look_until(self, look: Callable[[int], int]) -> int:
        """Launches a kernel that waits until it has an answer."""
        # In this order: listen, look, sleep. A ring between look and sleep would be lost in any other.
        rest = core.Rest(self.endpoint)
        is_first = 1
        while True:
            heard = rest.listen()
            status = look(is_first)
            if status != layout.STILL_WAITING:
                return status
            is_first = 0
            if INTERPRETED:
                rest.sleep(heard)

    def _wait(self, lane: Lane, verb: str) -> str:
        addresses = (self._state, self._page, self._outbound.data_ptr(), lane.address, self._words.data_ptr())
        # Only another thread's call could change what I owe, and one call at a time is made.
        owed = [one.round_number if one.stage in ("sent", "received") else -1 for one in self._lanes]

        def look(is_first: int) -> int:
            clock = (core.now_ns(), self._ns_per_poll, self.endpoint.tick_ns(), NUM_POLLS)
            what = (is_first, self._next_round, *owed, self.at, *self._verb(verb), HAS_PTX, self.plant)
            launch(window.wait_for_words, 1, *addresses, *clock, *what)
            return lane.word("status")

        if self._look_until(look) == layout.RELEASED:
            return str(self.endpoint.status())
        return "ok"

    def _signal(self, lane: Lane, verb: str) -> None:
        opens, counts = words.OPENED, words.ROWS_TO
        if verb == "combine":
            opens = words.ANSWERED
            counts = words.ROWS_FROM if self.at.reduce_at_expert else words.CHOICES_FROM
        place, step, _, kind = self._verb(verb)
        constants = (self.at, opens.value, counts.value, place, step, kind)
        if bool(lane.column("opened" if verb == "dispatch" else "answered").any()):
            self._reach(f"{verb}.chunk", lane)
        half = self.num_ranks // 2 if core.has_hooks else 0
        if half:
            launch(window.signal, 1, self._page, self._outbound.data_ptr(), lane.address, 1, half, *constants)
            self.endpoint.ring()
        self._reach(f"{verb}.half_signalled", lane)
        last = (half + 1, self.num_ranks)
        launch(window.signal, 1, self._page, self._outbound.data_ptr(), lane.address, *last, *constants)
        self.endpoint.ring()
        self._reach(f"{verb}.signalled", lane)

    def _nobody_tore(self, lane: Lane, verb: str) -> bool:
        place, step, _, _ = self._verb(verb)
        kept = words.TAKEN if verb == "dispatch" else words.ANSWERED
        launch(window.recheck, 1, lane.address, self.at, kept.value, place, step)
        num_torn = lane.word("status")
        self._stats["num_rechecks"] += num_torn
        return num_torn == 0

    def _end_words(self, lane: Lane, verb: str, num_rows: torch.Tensor, row_bytes: int) -> None:
        self._refuse(lane, verb)
        kept = lane.column("taken" if verb == "dispatch" else "answered")
        rows = num_rows * kept
        failed = lane.column("active") * (1 - kept)
        self._from_source += torch.stack([rows, rows * row_bytes, failed], dim=1).cpu()

    def _refuse(self, lane: Lane, verb: str) -> None:
        """Whoever gives up says so, both ways: to peers of whom nothing was taken."""
        kept, at = (words.TAKEN if verb == "dispatch" else words.ANSWERED), self.at
        place = (at.dispatch_taken, at.dispatch_taken_step)
        if verb == "combine":
            place = (at.combine_taken, at.combine_taken_step)
        constants = (at, kept.value, *place, NUMBERS[f"kind_{verb}_taken"])
        launch(window.refuse, 1, self._page, self._outbound.data_ptr(), lane.address, *constants)

    def _show(self, lane: Lane, phase: str) -> None:
        addresses = (self._state, self._page, self._outbound.data_ptr(), lane.address, self._words.data_ptr())
        launch(window.show_phase, 1, *addresses, _PHASES[phase], self.at)

    # -- the test build ----------------------------------------------------------------------------------------------

    def _reach(self, point: str, lane: Lane) -> None:
        if core.has_hooks and self.endpoint.reach(_POINTS[point], lane.round_number):
            raise _Crashed

    def _take_guards_out(self) -> None:
        if self.at.guards_off != core.guards_off():
            self.at = dataclasses.replace(self.at, guards_off=core.guards_off())

    def _cut_off(self) -> None:
        """What goes to a rank that is cut off goes nowhere."""
        cut = self.endpoint.cut_ranks()
        if not cut:
            return
        if self._sink is None:
            self._sink = torch.zeros(self.at.partition_bytes // 8, dtype=torch.int64)
        for rank in cut:
            self._outbound[rank] = self._sink.data_ptr()


def _experts_of_rank(fields: dict[str, Any]) -> list[int]:
    """``[num_ranks, max_local_experts]``, -1 where a rank has fewer: the place of each expert, turned around."""
    width = fields["max_local_experts"]
    out = [-1] * (fields["num_ranks"] * width)
    for expert, (rank, local) in enumerate(zip(fields["expert_rank"], fields["expert_local"], strict=True)):
        out[rank * width + local] = expert
    return out
