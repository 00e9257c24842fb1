"""One rank of a drill: a forked process that runs the layer's steps, judges them, and tells the parent in JSON."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import logging
import os
import random
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed

import fault_a2a
from fault_a2a._core import core
from fault_a2a.buffer import Buffer
from fault_a2a.cli.drill import story
from fault_a2a.cli.drill.faults import Fault
from fault_a2a.cli.drill.judge import Judge
from fault_a2a.cli.drill.model import Expectation, MoELayer
from fault_a2a.cli.drill.options import Drill

if TYPE_CHECKING:
    from fault_a2a.membership import View
    from fault_a2a.rounds import Received

GROUP_NAME = "drill"
SETTLE_S = 10.0  # for the last view changes, once all steps are done
LIVE_POLL_S = 0.1
_START_LOOK_S = 0.001  # between two looks of a rank that waits at a step start
FIRST_ROUND = 1  # of step 0; round 0 is construction's
MOST_VIEWS = 64  # that a rank remembers, beside one for each step that may wait for the judge
MOST_LOSSY_UNJUDGED = 4  # steps with losses in a row that wait for the judge, at least
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Work:
    """What the parent computed once; its pages are shared by the fork."""

    drill: Drill
    layer: MoELayer
    expectation: Expectation


@dataclass(frozen=True)
class Unjudged:
    """What a step left to the judge. ``rows`` in the order of ``sources``; ``spans`` as the step is told."""

    step: int
    round_number: int
    rows: torch.Tensor
    sources: torch.Tensor
    num_tokens: torch.Tensor
    out: torch.Tensor
    codes: torch.Tensor
    lost: bool
    spans: list[tuple[str, int, int, int]]


class Pipes:
    """The two pipes of a rank: lines of JSON to the parent, lines of text from it."""

    def __init__(self, told_fd: int, orders_fd: int) -> None:
        self._told_fd = told_fd
        self._orders = os.fdopen(orders_fd, "r")
        self._lock = threading.Lock()

    def tell(self, what: str, **fields: Any) -> None:
        line = json.dumps({"is": what, **fields}, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            while line:
                line = line[os.write(self._told_fd, line) :]

    def has_order(self) -> bool:
        """The parent's next line is there. Between two orders only: what is read ahead does not show."""
        return bool(select.select([self._orders], [], [], 0)[0])

    def order(self, *expected: str) -> tuple[str, str]:
        """Waits for the parent's next line, and returns which of ``expected`` it is and what stands behind it."""
        line = self._orders.readline()
        word, _, rest = line.strip().partition(" ")
        if word not in expected:
            raise RuntimeError(f"the parent said {line.strip()!r}, not {expected}: it is gone or confused")
        return word, rest


def run_rank(rank: int, work: Work, pipes: Pipes, parent_pid: int, live: bool, life: int) -> NoReturn:
    """A life of a rank, in a forked process. Ends the process, whatever happens.

    ``life``: which one. All but the first wait for their turn, and take the place of the one before.
    """
    status = 1
    try:
        die_with_the_parent(parent_pid)
        # The system wakes whoever is stopped in a group of processes whose shell has gone, and that is a fault's to do.
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        logging.getLogger("fault_a2a").setLevel(logging.CRITICAL)  # the drill tells it in its own words
        store = torch.distributed.TCPStore("127.0.0.1", int(pipes.order("store")[1]), is_master=False)
        DrillRank(rank, work, store, pipes, live, life).run()
        status = 0
    except BaseException:
        text = traceback.format_exc()
        print(text, file=sys.stderr, flush=True)
        try:
            pipes.tell("end", how=story.FAILED, why=text)
        except OSError:
            pass
    finally:
        sys.stderr.flush()
        os._exit(status)


def die_with_the_parent(parent_pid: int) -> None:
    """However the parent goes."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(1)


class DrillRank:
    """A rank's buffer, its share of the layer, and its judge."""

    def __init__(self, rank: int, work: Work, store: Any, pipes: Pipes, live: bool, life: int = 0) -> None:
        self.rank, self.drill, self.layer, self.pipes = rank, work.drill, work.layer, pipes
        self.life = life  # of those in this episode
        self.expectation = work.expectation
        self.judge = Judge(work.expectation, rank, self.drill.on_lost, self.drill.reduce, self.drill.chunk_tokens)
        self.local_experts = work.expectation.placement.local_experts(rank)
        self.random = random.Random(f"{self.drill.seed}/{rank}")
        self.layer.prepare(self.local_experts)
        if self.drill.guards_off:
            names = core.guard_names()
            core.set_guards_off(sum(1 << names.index(name) for name in self.drill.guards_off))
        group = fault_a2a.Group(store, rank, self.drill.ranks, name=GROUP_NAME)
        self.buffer = Buffer(group, self.drill.config(self.rank), join=life > 0)
        self._num_evidence_told = 0
        self._told_epoch = -1
        self._views: list[tuple[View, int]] = []
        self._telling = threading.Lock()
        self._ended = threading.Event()
        self._stops_armed: list[int] = []
        self._late_by: Fault | None = None  # of this step
        self._unjudged: list[Unjudged] = []
        self._live = live

    def run(self) -> None:
        self.pipes.tell("ready", at=core.now_ns(), round=self.buffer.num_rounds)
        self._tell_seen()
        if self._live:
            threading.Thread(target=self._tell_while_waiting, daemon=True).start()
        while self._run_episode():
            pass
        self.buffer.close()

    def _run_episode(self) -> bool:
        """Runs the steps of the drill, or of an episode of it. True: there is another one for this process."""
        how, why = story.FINISHED, ""
        try:
            for step in range(self.buffer.num_rounds - FIRST_ROUND, self.drill.steps):
                self._step(step)
        except fault_a2a.RankEvictedError as error:
            how, why = story.EVICTED, str(error)
        except fault_a2a.QuorumLostError as error:
            how, why = story.SUSPENDED, str(error)
        self._judge()
        self._tell_stops_survived()
        self.pipes.tell("end", how=how, why=why)
        if how == story.FINISHED:
            self._settle({int(rank) for rank in self.pipes.order("settle")[1].split()})
            self.pipes.tell("settled", epoch=self.buffer.view.epoch)
            self._come_to(int(self.pipes.order("report")[1]))
        self._tell_last()
        if how != story.FINISHED:
            return False
        # An earlier leave could be taken for a fault by those who still run.
        word, rest = self.pipes.order("close", "more")
        if word == "more":
            more = json.loads(rest)
            faults = tuple(Fault(**fields) for fields in more["faults"])
            self.drill = replace(self.drill, first_step=more["first_step"], steps=more["steps"], faults=faults)
            self.life = 0
        return word == "more"

    # -- one step ----------------------------------------------------------------------------------------------------

    def _step(self, step: int) -> None:
        words = self.expectation.batches.words(step, self.rank)
        x = self.layer.embed(words)
        topk_idx, topk_weights = self.layer.route(x)
        round_number = self.buffer.num_rounds
        if step in self.drill.meetings:
            self._wait_for_newcomers(step)
        self._bring_about_faults(step, round_number)

        began_ns = core.now_ns()
        self.buffer.begin_step()
        device, waited = self.buffer.device, [self._waited_ns()]
        recv, handle = self.buffer.dispatch(x.to(device), topk_idx.to(device), topk_weights.to(device))
        recv = recv.to(torch.device("cpu"))
        at_ns = [began_ns, core.now_ns()]
        waited.append(self._waited_ns())
        sources = handle.sources()
        rows = recv.x.reshape(-1, self.drill.hidden)[sources[:, 0].long()]  # a copy: recv.x ends with its combine
        y = self._experts(recv).to(device)
        at_ns.append(core.now_ns())
        out, outcome = self.buffer.combine(y, handle)
        end_ns = core.now_ns()
        waited.append(self._waited_ns())

        spans = [
            ("dispatch", at_ns[0], at_ns[1], waited[1] - waited[0]),
            ("compute", at_ns[1], at_ns[2], 0),
            ("combine", at_ns[2], end_ns, waited[2] - waited[1]),
        ]
        lost = bool(outcome.lost)
        done = Unjudged(step, round_number, rows, sources, recv.num_tokens, out.cpu(), outcome.codes.cpu(), lost, spans)
        self._unjudged.append(done)
        self._tell_seen()
        self._tell_stops_survived()
        # No engine recomputes its answers on the processors that the others' first good step needs.
        if len(self._unjudged) > max(self.drill.judge_later, MOST_LOSSY_UNJUDGED if lost else 0):
            self._judge()

    def _judge(self) -> None:
        """Judges and tells what is left to it."""
        for done in self._unjudged:
            num_corrupt = self.judge.num_corrupt_rows(done.step, done.rows, done.sources, done.num_tokens)
            accounts = self.judge.accounts(done.step, done.out, done.codes, self._active_mask(done.round_number))
            exact, why = accounts.exact, accounts.why
            if done.lost != bool(accounts.lost_on):
                exact, why = False, f"outcome.lost says {done.lost}, its codes say {bool(accounts.lost_on)}"
            began_ns, end_ns = done.spans[0][1], done.spans[-1][2]
            self.pipes.tell(
                "step",
                step=done.step,
                round=done.round_number,
                at=end_ns,
                us=(end_ns - began_ns) // 1000,
                lost_on=accounts.lost_on,
                unroutable=accounts.num_unroutable,
                corrupt=num_corrupt,
                exact=exact,
                why=why,
                spans=done.spans,
            )
        self._unjudged.clear()

    def _wait_for_newcomers(self, step: int) -> None:
        """Comes to this step start again and again until the parent has no newcomer on its way."""
        self._judge()  # the parent goes by the steps that it has heard of
        self.pipes.tell("waits", step=step)
        while not self.pipes.has_order():
            self.buffer.begin_step()
            self._tell_seen()  # of a death that shows only now, before the next life's page has taken the place
            time.sleep(_START_LOOK_S)
        self.pipes.order("go")

    def _waited_ns(self) -> int:
        """In which this rank did nothing but wait for peers, since construction."""
        return sum(line[0] for line in self.buffer.verbs.source_stats())

    def _experts(self, recv: Received) -> torch.Tensor:
        late, self._late_by = self._late_by, None
        if late is not None:
            # Told before and not after: by then the rank is evicted, and a sleep that is over explains nothing.
            self.pipes.tell("fault", step=late.step, kind="slow", peer=None, at=core.now_ns())
            time.sleep((late.duration_ms or 0) / 1e3)
        least, most = self.drill.compute_us
        if most:
            time.sleep(self.random.uniform(least, most) / 1e6)
        offsets = recv.offsets if self.drill.recv_format == "packed" else None
        return self.layer.recv_rows(recv.x, recv.num_tokens, self.local_experts, offsets)

    def _active_mask(self, round_number: int) -> tuple[int, ...]:
        """Of the view that the round ran in: the newest one that begins with it or earlier."""
        if not self._views or self._views[-1][0].epoch != self.buffer.view.epoch:
            known = self._views[-1][0].epoch + 1 if self._views else 0
            self._views = [*self._views, *self.buffer.views(known)][-(MOST_VIEWS + self.drill.judge_later) :]
        return next(view.active_mask for view, _ in reversed(self._views) if view.first_round <= round_number)

    # -- faults ------------------------------------------------------------------------------------------------------

    def _bring_about_faults(self, step: int, round_number: int) -> None:
        for fault in self.drill.faults:
            if fault.step != step or (self.rank, self.life) not in fault.lives or fault.kind == "rejoin":
                continue
            if fault.kind == "cut" and fault.peer is not None:
                peer = fault.peer if self.rank == fault.rank else fault.rank
                at_ns = core.now_ns()
                self.buffer.cut(peer)
                self.pipes.tell("fault", step=step, kind="cut", peer=peer, at=at_ns)
            elif fault.kind == "slow":
                self._late_by = fault
            elif fault.armed_phase is not None:
                self.buffer.arm(fault.armed_phase, round_number, fault.kind, 0)
                if fault.kind == "stop":
                    self._stops_armed.append(step)
            else:
                self.pipes.tell("begin", step=step, at=core.now_ns())

    def _tell_stops_survived(self) -> None:
        """Only now does this rank run again; and it must tell the instant before another fault writes over the word."""
        for step in self._stops_armed:
            self.pipes.tell("fault", step=step, kind="stop", peer=None, at=self.buffer.core.fault_at_ns(self.rank))
        self._stops_armed.clear()

    # -- what it tells -----------------------------------------------------------------------------------------------

    def _tell_seen(self) -> None:
        """Evidence and views that the parent has not heard of yet."""
        with self._telling:
            new_evidence = self.buffer.evidence(self._num_evidence_told)
            new_views = self.buffer.views(self._told_epoch + 1)
            if not new_evidence and not new_views:
                return
            self._num_evidence_told += len(new_evidence)
            self._told_epoch = max([self._told_epoch, *(view.epoch for view, _ in new_views)])
            self.pipes.tell(
                "seen",
                suspects=self.buffer.core.suspects(),
                evidence=[(one.rank, one.kind, one.at_ns) for one in new_evidence],
                views=[_fields(view, at_ns) for view, at_ns in new_views],
                fault_at_ns={one.rank: self.buffer.core.fault_at_ns(one.rank) for one in new_evidence},
            )

    def _tell_while_waiting(self) -> None:
        while not self._ended.wait(LIVE_POLL_S):
            self._tell_seen()

    def _settle(self, dead: set[int]) -> None:
        """Waits until nobody who is in is dead or suspected: a fault in the last step is still being dealt with."""
        self._wait_for(lambda: not (dead | set(self.buffer.core.suspects())) & set(self.buffer.view.active_ranks))

    def _come_to(self, epoch: int) -> None:
        """Waits for a view that another rank has already."""
        self._wait_for(lambda: self.buffer.view.epoch >= epoch)

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline and not condition() and not self._is_evicted():
            time.sleep(0.001)

    def _is_evicted(self) -> bool:
        return not self.buffer.views()[-1][0].active_mask[self.rank]

    def _tell_last(self) -> None:
        self._ended.set()
        self._tell_seen()
        words = [self.buffer.core.fault_at_ns(rank) for rank in range(self.drill.ranks)]
        suspects, evicted = self.buffer.core.suspects(), self._is_evicted()
        self.pipes.tell("final", fault_at_ns=words, suspects=suspects, evicted=evicted, holdings=_holdings())


def _holdings() -> dict[str, int]:
    """What this process holds of the system."""
    own = Path("/proc/self")
    status = dict(line.split(":", 1) for line in (own / "status").read_text().splitlines())
    return {
        "rss_kb": int(status["VmRSS"].split()[0]),
        "files": len(os.listdir(own / "fd")),
        "threads": int(status["Threads"]),
        "mappings": len((own / "maps").read_text().splitlines()),
    }


def _fields(view: View, installed_at_ns: int) -> dict[str, Any]:
    return {
        "epoch": view.epoch,
        "active": view.active_ranks,
        "first_round": view.first_round,
        "incarnations": view.incarnations,
        "reason": view.reason,
        "installed_at_ns": installed_at_ns,
    }
