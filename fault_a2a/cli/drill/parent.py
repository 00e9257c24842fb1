"""The drill's parent: forks the ranks and their store, strikes from outside, listens, and leaves nothing behind."""

from __future__ import annotations

import ctypes
import gc
import heapq
import json
import os
import select
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import IO, Protocol

from fault_a2a._core import core
from fault_a2a.cli.drill.options import Drill
from fault_a2a.cli.drill.rank import Pipes, Work, run_rank
from fault_a2a.cli.drill.report import WAKING_NS
from fault_a2a.cli.drill.store import StoreProcess
from fault_a2a.cli.drill.story import DEAD, ENDED, FAILED, FINISHED, STARTING, STOPPED, FaultStory, RankStory, Story

_LOOK_S = 0.02  # how often the parent looks at its children while no message comes
_SPIN_NS = 2_000_000  # before an aimed signal the parent stays awake
_PATIENCE_S = 60.0  # beyond the timeouts: a loaded machine is no hang
_LAST_WORDS = 4000  # characters of a rank's stderr
_ENDING_THREAD_S = 1.0

# Called when an episode is over and all ranks stand: judges it, and says what the next one is. None: the group closes,
# and the story of this episode is what `conduct` returns.
NextEpisode = Callable[[Story], Drill | None]


class Screen(Protocol):
    """Who watches the drill."""

    live: bool

    def say(self, sentence: str, now_ns: int) -> None: ...
    def refresh(self, story: Story, now_ns: int) -> None: ...


@dataclass
class _Child:
    """The parent's ends of a rank's pipes, and the file that takes its stderr."""

    told_fd: int
    orders_fd: int
    words: IO[bytes]
    unread: bytes = b""
    open: bool = True


@dataclass(order=True)
class _Due:
    at_ns: int
    do: Callable[[], None] = field(compare=False)


def conduct(work: Work, screen: Screen, next_episode: NextEpisode = lambda story: None) -> Story:
    """Runs a drill to its end, whatever that is, and returns what was learnt. Bounded; every process is gone then.

    Args:
        work: the drill, and what its ranks share.
        screen: who watches.
        next_episode: for a group that goes on; what is returned is the story of its last episode.

    Raises:
        RuntimeError: this process has several threads, so it cannot fork safely.
    """
    num_threads = _count_threads()
    if num_threads != 1:
        raise RuntimeError(
            f"a drill forks its ranks, and this process has {num_threads} threads; run it as a command of its own"
        )
    _resolve_names_locally()
    parent = _Parent(work, screen, next_episode)
    try:
        parent.run()
    finally:
        parent.clean_up()
    return parent.story


def _count_threads() -> int:
    """Of this process. A thread that was joined is listed for a moment yet: a connection's, of a drill before."""
    deadline = time.monotonic() + _ENDING_THREAD_S
    while (num_threads := len(os.listdir("/proc/self/task"))) != 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    return num_threads


def _resolve_names_locally() -> None:
    """Keeps this process and its ranks from asking a name server who ::ffff:127.0.0.1 is.

    The store's server and clients do that for every connection, and where no name server answers each question costs
    five seconds. glibc only; elsewhere the drill is merely slower to start.
    """
    configure = getattr(ctypes.CDLL(None), "__nss_configure_lookup", None)
    if configure is not None:
        configure(b"hosts", b"files")


class _Parent:
    def __init__(self, work: Work, screen: Screen, next_episode: NextEpisode) -> None:
        self.drill, self.work, self.screen, self.next_episode = work.drill, work, screen, next_episode
        self.story = Story(
            ranks=[RankStory(rank, child=rank) for rank in range(self.drill.ranks)],
            faults=[FaultStory(fault) for fault in self.drill.faults],
            began_ns=core.now_ns(),
        )
        self.children: dict[int, _Child] = {}
        self.num_children = self.drill.ranks
        self.newcomers: list[RankStory] = []  # forked, and asleep until their step
        self.due: list[_Due] = []
        self.store: StoreProcess | None = None
        self.ending = ""  # what the finished ranks were told last: settle, report or close

    def run(self) -> None:
        self.store = StoreProcess()
        for one in self.story.ranks:
            self._fork(one, 0)
        self._fork_newcomers()
        for one in self.story.ranks:
            self._order(one, f"store {self.store.port}")
        quiet_since_ns = core.now_ns()
        while any(one.alive for one in self.story.lives):
            patience_ns = int((_PATIENCE_S + self.drill.longest_wait_ms / 1000) * 1e9)
            if self._turn():
                quiet_since_ns = core.now_ns()
            if core.now_ns() - quiet_since_ns > patience_ns:
                self._give_up(patience_ns)
                break
            self._let_go_on()
            self._end_together()
            self.screen.refresh(self.story, core.now_ns())
        self.story.ended_ns = core.now_ns()

    # -- processes ---------------------------------------------------------------------------------------------------

    def _fork_newcomers(self) -> None:
        """Of the whole episode. Early, because what a fork costs should not fall between a fault and its end."""
        for fault in self.drill.faults:
            if fault.kind == "rejoin":
                newcomer = RankStory(fault.rank, child=self.num_children, joined=True, due=fault.step)
                newcomer.first_step = fault.step
                self.num_children += 1
                self._fork(newcomer, fault.life)
                self.newcomers.append(newcomer)

    def _fork(self, one: RankStory, life: int) -> None:
        told_read, told_write = os.pipe()
        orders_read, orders_write = os.pipe()
        words = tempfile.TemporaryFile()  # noqa: SIM115 (closed in clean_up)
        parent_pid = os.getpid()
        gc.freeze()  # what the ranks share stays shared
        pid = os.fork()
        if pid == 0:
            try:
                for other in self.children.values():  # a pipe ends only when nobody holds its other end
                    os.close(other.told_fd)
                    os.close(other.orders_fd)
                os.close(told_read)
                os.close(orders_write)
                os.dup2(words.fileno(), 1)
                os.dup2(words.fileno(), 2)
                pipes = Pipes(told_write, orders_read)
                work = replace(self.work, drill=self.drill)
                run_rank(one.rank, work, pipes, parent_pid, self.screen.live, life)
            finally:
                os._exit(1)  # never back into the parent's code
        os.close(told_write)
        os.close(orders_read)
        os.set_blocking(told_read, False)
        self.children[one.child] = _Child(told_read, orders_write, words)
        one.pid = pid

    def _start_newcomers(self) -> None:
        """Those whose step the others have come to: from then on they are the ranks whose numbers they bear."""
        assert self.store is not None, "it is there before any rank is"
        step = max(one.next_step for one in self.story.ranks)
        for newcomer in [one for one in self.newcomers if one.due <= step]:
            self.newcomers.remove(newcomer)
            self.story.former.append(self.story.ranks[newcomer.rank])
            self.story.ranks[newcomer.rank] = newcomer
            told = next(one for one in self.story.faults if str(one.fault) == f"rejoin {newcomer.rank}@{newcomer.due}")
            told.at_ns = core.now_ns()
            self.screen.say(f"a new process asks to be rank {newcomer.rank}", told.at_ns)
            self._order(newcomer, f"store {self.store.port}")

    def _order(self, one: RankStory, line: str) -> None:
        try:
            os.write(self.children[one.child].orders_fd, line.encode() + b"\n")
        except BrokenPipeError:
            pass  # it died; waitpid says how

    def _signal(self, one: RankStory, number: int) -> bool:
        """False: the process is gone. A reaped pid may belong to somebody else by now."""
        if not one.alive:
            return False
        os.kill(one.pid, number)
        return True

    # -- one turn ----------------------------------------------------------------------------------------------------

    def _turn(self) -> bool:
        """Waits for news at most until something is due. True: there was some."""
        wait_s = _LOOK_S
        if self.due:
            wait_s = min(wait_s, max(self.due[0].at_ns - core.now_ns() - _SPIN_NS, 0) / 1e9)
        pipes = select.poll()
        for child in self.children.values():
            if child.open:
                pipes.register(child.told_fd, select.POLLIN)
        if not self._aiming():  # a parent that every line wakes would take the processor from the ranks it watches
            time.sleep(wait_s)
            wait_s = 0
        ready = {fd for fd, _ in pipes.poll(int(wait_s * 1000))}
        heard = [self._hear(one) for one in self.story.lives if self.children[one.child].told_fd in ready]
        if self.newcomers:
            self._start_newcomers()
        acted = self._act()
        reaped = [self._reap(one) for one in self.story.lives if one.alive]
        return any(heard) or acted or any(reaped)

    def _hear(self, one: RankStory) -> bool:
        child = self.children[one.child]
        try:
            data = os.read(child.told_fd, 1 << 16)
        except BlockingIOError:
            return False
        if not data:
            child.open = False
            return False
        *lines, child.unread = (child.unread + data).split(b"\n")
        now_ns = core.now_ns()
        for line in lines:
            message = json.loads(line)
            for sentence in self.story.hear_of(one, message, now_ns):
                self.screen.say(sentence, now_ns)
            if message["is"] == "begin":
                self._aim(one, message["step"], message["at"])
        return True

    def _reap(self, one: RankStory) -> bool:
        pid, status = os.waitpid(one.pid, os.WNOHANG | os.WUNTRACED)
        if pid == 0:
            return False
        while self.children[one.child].open and self._hear(one):
            pass  # its last lines may still be in the pipe
        if os.WIFSTOPPED(status):
            self._note_stop(one)
            return True
        one.exit_status = status
        if os.WIFSIGNALED(status):
            self._note_death(one, os.WTERMSIG(status))
        elif one.state not in (FINISHED, *ENDED):
            one.state, one.why = FAILED, one.why or f"it ended with exit code {os.WEXITSTATUS(status)}"
        return True

    # -- faults ------------------------------------------------------------------------------------------------------

    def _aim(self, one: RankStory, step: int, began_ns: int) -> None:
        for told in self.story.faults:
            fault = told.fault
            if fault.rank == one.rank and fault.step == step and fault.after_us is not None:
                at_ns = began_ns + fault.after_us * 1000
                heapq.heappush(self.due, _Due(at_ns, partial(self._strike, told, one)))

    def _aiming(self) -> bool:
        """Some rank's next step may begin with a signal from here."""
        return any(one.fault.after_us is not None and one.at_ns is None for one in self.story.faults)

    def _strike(self, told: FaultStory, one: RankStory) -> None:
        fault = told.fault
        at_ns = core.now_ns()
        if not self._signal(one, signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP):
            return
        told.at_ns = at_ns

    def _act(self) -> bool:
        """Does what is due; stays awake for what is nearly due."""
        acted = False
        while self.due and self.due[0].at_ns - core.now_ns() < _SPIN_NS:
            one = heapq.heappop(self.due)
            while core.now_ns() < one.at_ns:
                pass
            one.do()
            acted = True
        return acted

    def _note_stop(self, one: RankStory) -> None:
        told = self._next_fault(one, "stop")
        state, one.state = one.state, STOPPED
        if told is None or told.fault.duration_ms is None:
            return
        told.happened = True
        self.screen.say(f"rank {one.rank} is stopped in step {told.fault.step} (SIGSTOP)", core.now_ns())
        since_ns = told.at_ns or core.now_ns()
        wake = partial(self._wake, told, one, state)
        heapq.heappush(self.due, _Due(since_ns + told.fault.duration_ms * 1_000_000, wake))

    def _wake(self, told: FaultStory, one: RankStory, state: str) -> None:
        told.woken_ns = core.now_ns()
        if self._signal(one, signal.SIGCONT):
            one.state = state
            self.screen.say(f"rank {one.rank} is woken (SIGCONT)", told.woken_ns)

    def _note_death(self, one: RankStory, number: int) -> None:
        told = self._next_fault(one, "kill")
        if number == signal.SIGKILL and told is not None and not one.ended_by_drill:
            told.happened = True
            one.state, one.why = DEAD, f"killed in step {told.fault.step}"
            where = told.fault.armed_phase
            where = f"at {where}" if where else f"{told.fault.after_us} us after it began"
            self.screen.say(f"rank {one.rank} is killed in step {told.fault.step}, {where} (SIGKILL)", core.now_ns())
        elif not one.ended_by_drill:
            one.state, one.why = FAILED, f"it died of {signal.Signals(number).name}"

    def _next_fault(self, one: RankStory, kind: str) -> FaultStory | None:
        told = (told for told in self.story.faults if told.fault.kind == kind and self.story.life_of(told.fault) is one)
        return next((one for one in told if not one.happened), None)

    # -- the end -----------------------------------------------------------------------------------------------------

    def _let_go_on(self) -> None:
        """Ranks that wait at a step start go on once every newcomer that was due by then is in, or gone.

        One that is due later holds nobody up: whoever is past this step waits in it for those who are not.
        """
        starting = [one for one in self.story.ranks if one.joined and one.alive and one.state == STARTING]
        held_up_from = min((one.due for one in [*self.newcomers, *starting]), default=None)
        for one in self.story.ranks:
            if one.waits_at is not None and (held_up_from is None or one.waits_at < held_up_from):
                one.waits_at = None
                self._order(one, "go")

    def _end_together(self) -> None:
        """Finished ranks wait until all have ended, so that no leave is taken for a fault."""
        alive = [one for one in self.story.ranks if one.alive]
        if self.ending == "" and not self._striking() and all(one.state in (FINISHED, *ENDED) for one in alive):
            dead = " ".join(str(one.rank) for one in self.story.ranks if one.state in (DEAD, FAILED))
            self._tell_finished("settle", dead)
        elif self.ending == "settle" and all(one.settled for one in alive if one.state == FINISHED):
            self._tell_finished("report", str(max((one.epoch for one in alive), default=0)))
        elif self.ending == "report" and all(one.told_all for one in alive):
            self._end_episode()

    def _end_episode(self) -> None:
        """The group closes, or goes on with what stands in it.

        Not before all former lives are gone, and a while after the last one was woken: what a fault brings about is
        judged with that fault.
        """
        woken_ns = max((told.woken_ns or 0 for told in self.story.faults), default=0)
        if any(one.alive for one in self.story.former) or core.now_ns() < woken_ns + WAKING_NS:
            return
        for one in self.story.ranks:
            one.goes_on = one.alive and one.state == FINISHED
        self.story.ended_ns = core.now_ns()
        drill = self.next_episode(self.story) if all(one.goes_on for one in self.story.ranks) else None
        if drill is None:
            for one in self.story.ranks:
                one.goes_on = False
            self._tell_finished("close")
            return
        self.drill, self.ending = drill, ""
        self.story = self.story.next_episode([FaultStory(fault) for fault in drill.faults], drill.first_step)
        for child in self.children.keys() - {one.child for one in self.story.ranks}:
            self._forget_child(self.children.pop(child))
        self._fork_newcomers()
        faults = [asdict(fault) for fault in drill.faults]
        more = json.dumps({"first_step": drill.first_step, "steps": drill.steps, "faults": faults})
        for one in self.story.ranks:
            self._order(one, f"more {more}")

    def _striking(self) -> bool:
        """A signal is due, or under way to a process that has not felt it yet."""
        sent = [one for one in self.story.faults if one.at_ns and one.fault.after_us is not None and not one.happened]
        return bool(self.due) or any(one.alive for one in map(self.story.life_of, (one.fault for one in sent)) if one)

    def _tell_finished(self, order: str, rest: str = "") -> None:
        self.ending = order
        for one in self.story.ranks:
            if one.alive and (one.state == FINISHED or one.settled):
                self._order(one, f"{order} {rest}")

    def _give_up(self, patience_ns: int) -> None:
        """Nothing was heard for too long: asks every rank where it stands."""
        for one in self.story.ranks:
            if one.alive and one.state != STOPPED:
                self._signal(one, signal.SIGUSR1)
        time.sleep(0.5)
        for one in self.story.ranks:
            if one.alive:
                self.story.stuck.append(
                    f"rank {one.rank} is {one.state} in step {one.next_step} and said nothing for "
                    f"{(core.now_ns() - one.news_ns) / 1e9:.0f} s: {self._read_words(one.child).strip()[-_LAST_WORDS:]}"
                )
        self.screen.say(f"nothing was heard from any rank for {patience_ns / 1e9:.0f} s", core.now_ns())

    def clean_up(self) -> None:
        """Kills by process id what still runs, and forgets what it may have left in shared memory."""
        self.story.ended_ns = self.story.ended_ns or core.now_ns()
        for one in [*self.story.lives, *self.newcomers]:
            if one.alive and one.pid:
                one.ended_by_drill = True
                os.kill(one.pid, signal.SIGKILL)
                one.exit_status = os.waitpid(one.pid, 0)[1]
        for one in self.story.lives:
            if one.child in self.children:
                one.last_words = self._read_words(one.child)
        for child in self.children.values():
            self._forget_child(child)
        self.children.clear()
        if self.store is not None:
            try:
                self.story.leftovers = self.store.unlink_leftovers(self.drill.ranks)
            finally:
                self.store.end()

    def _forget_child(self, child: _Child) -> None:
        os.close(child.told_fd)
        os.close(child.orders_fd)
        child.words.close()

    def _read_words(self, child: int) -> str:
        fd = self.children[child].words.fileno()
        return os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")  # the rank may still write: no seek
