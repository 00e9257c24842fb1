"""What a drill is asked for: its options, read and checked before a process is started."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

from fault_a2a.cli.drill.faults import DEFAULT_PHASE, KINDS, Fault, add_fault_options, parse_faults
from fault_a2a.cli.drill.plan import read_plan
from fault_a2a.cli.words import named_by_option

if TYPE_CHECKING:
    from fault_a2a.config import Config

# The environment variable that picks the native core; it is read once, when the core is first imported.
CORE_VARIABLE = "FAULT_A2A_CORE"
DTYPES = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp32": "float32",
    "float32": "float32",
    "fp16": "float16",
    "float16": "float16",
}
_BACKENDS = ("cpu", "cuda", "triton", "cuda-host", "auto")
_COMPUTE = re.compile(r"(?P<least>\d+)(-(?P<most>\d+))?", re.ASCII)
_LATER = {
    "repair": "repairing a step from replicas",
    "replay": "replaying a step",
    "replicas": "replicas of experts",
    "hosts": "several hosts",
}
_TIMEOUTS = {
    "beat_ms": (10, "how often a rank shows that it lives"),
    "silence_ms": (2000, "a rank without a beat for so long, while others wait for it, is suspected"),
    "stall_ms": (30000, "one that beats and does not move on for so long is suspected"),
    "link_ms": (5000, "how long a signal may be missing once its sender is past it"),
    "settle_ms": (50, "how long a suspicion other than a process exit waits for others to join it"),
    "agreement_timeout_ms": (10000, "how long a rank waits for agreement before it suspends itself"),
}


@dataclass(frozen=True)
class Drill:
    """One drill. Sizes and timeouts have the names that they have in ``Config``."""

    ranks: int = 8
    steps: int = 200  # counted from 0, that is from before `first_step`
    first_step: int = 0  # of this episode of a group that goes on
    tokens: int = 64
    hidden: int = 1024
    experts: int = 32
    topk: int = 4
    chunk_tokens: int | None = None
    dtype: str = "bfloat16"
    recv_format: str = "batched"
    reduce: str = "owner"
    on_lost: str = "drop"
    beat_ms: int = 10
    silence_ms: int = 2000
    stall_ms: int = 30000
    link_ms: int = 5000
    settle_ms: int = 50
    agreement_timeout_ms: int = 10000
    compute_us: tuple[int, int] = (0, 0)
    judge_later: int = 0
    seed: int = 0
    text: str | None = None
    faults: tuple[Fault, ...] = ()
    guards_off: tuple[str, ...] = ()
    backends: tuple[str, ...] = ("cpu",)  # of the ranks, in turn
    members: tuple[int, ...] | None = None  # of the last view, where a plan says so

    def config(self, rank: int = 0) -> Config:
        """The ``Config`` of one rank; a number that does not fit is a ``ValueError`` that names the field."""
        import torch

        from fault_a2a.config import Config

        return Config(
            num_experts=self.experts,
            hidden=self.hidden,
            num_topk=self.topk,
            num_max_tokens_per_rank=max(self.tokens, 1),
            num_chunk_tokens=self.chunk_tokens,
            dtype=getattr(torch, self.dtype),
            recv_format=self.recv_format,
            reduce=self.reduce,
            on_lost=self.on_lost,
            backend=self.backends[rank % len(self.backends)],
            **{name: getattr(self, name) for name in _TIMEOUTS},
        )

    @cached_property
    def meetings(self) -> frozenset[int]:
        """Steps that begin only once every newcomer that is due is in: those in which one is struck, and the last one.

        Small steps are over before a process has found its members, and past the last one nobody lets it in.
        """
        if not any(fault.kind == "rejoin" for fault in self.faults):
            return frozenset()
        struck = {fault.step for fault in self.faults for _, life in fault.lives if life and fault.kind != "rejoin"}
        return frozenset(struck | {self.steps - 1})

    @property
    def longest_wait_ms(self) -> int:
        """How long at most nothing may be heard from any rank while all is as it should be."""
        timeouts = self.silence_ms + self.stall_ms + self.link_ms + self.settle_ms + self.agreement_timeout_ms
        stops = max((fault.duration_ms or 0 for fault in self.faults), default=0)
        return timeouts + stops + self.compute_us[1] // 1000


class LateHelpParser(argparse.ArgumentParser):
    """Writes the end of its help only when somebody wants to read it."""

    late_epilog: Callable[[], str] | None = None

    def format_help(self) -> str:
        if self.late_epilog is not None:
            self.epilog = self.late_epilog()
        return super().format_help()


def _phases_text() -> str:
    # Not before: importing the native core picks one of the two, and which one depends on the faults.
    from fault_a2a.core_fields import phases

    return (
        f"phases of --kill, in the order of a step: {', '.join(phases())}. "
        f"Without one, a kill or stop strikes at {DEFAULT_PHASE}: half of the group can read the victim's rows."
    )


def add_arguments(parser: LateHelpParser) -> None:
    """The options of ``fault-a2a drill``."""
    parser.late_epilog = _phases_text
    parser.usage = "fault-a2a drill [options]"  # argparse cannot wrap the brackets in our metavars
    size = parser.add_argument_group("the group and its work")
    for name, text in (
        ("ranks", "processes"),
        ("steps", "steps, each one dispatch and one combine"),
        ("tokens", "tokens of a rank in a step"),
        ("hidden", "elements of a row"),
        ("experts", "experts of the layer, spread over the ranks"),
        ("topk", "experts that a token goes to"),
    ):
        size.add_argument(
            f"--{name}", type=int, default=getattr(Drill, name), metavar="N", help=f"{text} (%(default)s)"
        )
    size.add_argument(
        "--chunk-tokens", type=int, metavar="N", help="batches of more tokens travel as streams of chunks of N"
    )
    size.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="of the rows (%(default)s)")
    size.add_argument(
        "--backend",
        default="cpu",
        metavar="NAME[,NAME]",
        help="who runs the kernels, the ranks in turn: cpu, cuda, triton, auto, or cuda-host: CUDA's, on a CPU "
        "(%(default)s)",
    )
    size.add_argument("--text", metavar="FILE", help="where the tokens come from (the project's README)")
    size.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random (%(default)s)")
    size.add_argument("--recv-format", choices=("batched", "packed"), default="batched", help="(%(default)s)")
    size.add_argument(
        "--reduce", choices=("owner", "expert"), default="owner", help="who sums a token's choices (%(default)s)"
    )
    size.add_argument("--on-lost", choices=("drop", "renormalize"), default="drop", help="(%(default)s)")
    size.add_argument(
        "--compute-us",
        default="0",
        metavar="US[-US]",
        help="further time that the experts take: fixed, or from a range",
    )
    size.add_argument(
        "--judge-later",
        type=int,
        default=0,
        metavar="N",
        help="steps that may wait for the drill's own judge, which takes processors from others' steps (%(default)s)",
    )
    add_fault_options(parser)
    parser.add_argument(
        "--plan",
        metavar="FILE",
        help="a scenario as data, one line a membership: [0, 1, 2, 3], then [0, 1, -2, 3] (rank 2 is killed), then "
        "[0, 1, 3]; it sets --ranks and --steps, and its faults come on top of the options' "
        "(fault_a2a/cli/drill/plan.py has the format)",
    )
    timeouts = parser.add_argument_group("timeouts, in milliseconds")
    for name, (default, text) in _TIMEOUTS.items():
        timeouts.add_argument(
            _timeout_option(name), type=int, default=default, metavar="MS", dest=name, help=f"{text} (%(default)s)"
        )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, and nothing else")
    parser.add_argument(
        "--timeline",
        metavar="FILE",
        help="draw what each rank did around the faults, a lane a rank (.svg, .png or .pdf; needs matplotlib)",
    )
    # For the suite: with a guard switched off, what it guards against must be seen to happen.
    parser.add_argument("--without-guard", action="append", default=[], metavar="NAME", help=argparse.SUPPRESS)
    for name in _LATER:
        parser.add_argument(f"--{name}", nargs="?", const="", help=argparse.SUPPRESS)


def _timeout_option(field: str) -> str:
    return "--" + field.replace("_timeout_ms", "_ms").replace("_", "-")


def read_drill(args: argparse.Namespace) -> Drill:
    """The drill that was asked for. Picks the native core for this process and the ranks it will start.

    Raises:
        ValueError: an option that does not read, does not exist yet, or does not fit the others.
    """
    for name, what in _LATER.items():
        if getattr(args, name) is not None:
            raise ValueError(f"--{name}: {what} comes with a later release; leave the option out until then.")
    backends = tuple(args.backend.split(","))
    for backend in backends:
        if backend not in _BACKENDS:
            raise ValueError(
                f"--backend {args.backend}: {backend!r} is not known; pass some of {', '.join(_BACKENDS)}."
            )
    for name, least in (("ranks", 1), ("steps", 1), ("tokens", 0), ("judge_later", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: pass at least {least}.")
    texts: dict[str, Sequence[str]] = {kind: getattr(args, kind) for kind in KINDS}
    members = None
    if args.plan is not None:
        plan = read_plan(args.plan)
        args.ranks, args.steps = plan.ranks, plan.steps
        # With faults from both, who is left is the verdict's business.
        members = None if any(texts.values()) else plan.members
        texts = {kind: [*given, *plan.texts[kind]] for kind, given in texts.items()}
    faults = _faults(texts, args.ranks, args.steps, bool(args.without_guard))
    drill = Drill(
        dtype=DTYPES[args.dtype],
        compute_us=_read_compute(args.compute_us),
        faults=tuple(faults),
        guards_off=tuple(args.without_guard),
        backends=backends,
        members=members,
        **{name: getattr(args, name) for name in _PLAIN},
    )
    try:
        for rank in range(drill.ranks):  # sizes that do not fit are refused here, not by eight processes
            drill.config(rank).placement_for(drill.ranks)
    except ValueError as error:
        timeouts = {name: _timeout_option(name) for name in _TIMEOUTS}
        raise ValueError(named_by_option(str(error), {"num_chunk_tokens": "--chunk-tokens", **timeouts})) from None
    return drill


_PLAIN = (
    *("ranks", "steps", "tokens", "hidden", "experts", "topk", "chunk_tokens"),
    *("recv_format", "reduce", "on_lost", "judge_later", "seed", "text"),
    *_TIMEOUTS,
)


def _faults(texts: dict[str, Sequence[str]], num_ranks: int, num_steps: int, guards_off: bool) -> list[Fault]:
    # Twice: which core has the phases depends on the faults, and whether a phase exists depends on the core.
    read = partial(parse_faults, num_ranks=num_ranks, num_steps=num_steps, **texts)
    faults = read(phases=None)
    if guards_off or any(fault.needs_hooks for fault in faults):
        os.environ[CORE_VARIABLE] = "hooks"
    from fault_a2a.core_fields import phases

    return read(phases=phases())


def _read_compute(text: str) -> tuple[int, int]:
    match = _COMPUTE.fullmatch(text.strip())
    least = int(match["least"]) if match else 0
    most = int(match["most"] or least) if match else -1
    if most < least:
        raise ValueError(f"--compute-us {text}: expected microseconds, as 500, or a range of them, as 0-500.")
    return least, most
