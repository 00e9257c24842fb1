"""The command fault-a2a drill: prepares the work, runs it, and says what happened."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from fault_a2a.cli.drill.options import Drill, read_drill
from fault_a2a.cli.drill.plan import missed
from fault_a2a.cli.pictures import check_picture

if TYPE_CHECKING:
    from fault_a2a.cli.drill.rank import Work

EXIT_OK, EXIT_BROKEN, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Runs the drill of ``args``; returns the exit code."""
    ask_for_one_thread()
    began = time.monotonic()
    try:
        if args.timeline is not None:
            check_picture("--timeline", args.timeline)
        drill = read_drill(args)
        work, text_name = prepare(drill)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    prepared_s = time.monotonic() - began

    from fault_a2a._core import core
    from fault_a2a.cli.drill import screen
    from fault_a2a.cli.drill.parent import conduct
    from fault_a2a.cli.drill.report import report

    view: screen.Silent | screen.Plain | screen.Live = screen.Silent()
    if not args.json:
        print(screen.opening(drill, text_name), flush=True)
        terminal = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        view = (screen.Live if terminal else screen.Plain)(drill, sys.stdout, core.now_ns())
    invariance = work.layer.row_invariance()
    try:
        with terminated_like_interrupted():
            story = conduct(work, view)
    except KeyboardInterrupt:
        print("interrupted; every process of the drill is gone", file=sys.stderr)
        return EXIT_INTERRUPTED
    answer = report(drill, story, [] if invariance.ok else [invariance.sentence])
    answer["problems"] += missed(drill.members, answer["survivors"])
    answer["ok"] = not answer["problems"]
    answer["seconds_preparing"] = round(prepared_s, 3)
    if args.timeline is not None:
        from fault_a2a.cli.drill.timeline import draw

        draw(drill, story, answer, args.timeline)
    _print_last_words(story, answer)
    if args.json:
        print(json.dumps(answer))
    else:
        print("\n" + screen.closing(drill, answer), flush=True)
    return EXIT_OK if answer["ok"] else EXIT_BROKEN


def ask_for_one_thread() -> None:
    """Before torch and numpy start: a second thread would make forking unsafe, and rows depend on there being one."""
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"


def prepare(drill: Drill) -> tuple[Work, str]:
    """(What the ranks will share, what the text is called): the layer, and its evaluation in this one process."""
    import torch

    from fault_a2a.cli.drill.model import Expectation, MoELayer, RowTable, TextBatches
    from fault_a2a.cli.drill.rank import Work
    from fault_a2a.cli.drill.text import read_text

    torch.set_num_threads(1)
    text, text_name = read_text(drill.text)
    batches = TextBatches(text, drill.ranks, drill.tokens, seed=drill.seed)
    dtype = getattr(torch, drill.dtype)
    layer = MoELayer(batches.num_words, drill.hidden, drill.experts, drill.topk, dtype=dtype, seed=drill.seed)
    placement = drill.config().placement_for(drill.ranks)
    return Work(drill, layer, Expectation(batches, RowTable.build(layer), placement)), text_name


@contextlib.contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that the parent's clean-up runs."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_last_words(story: object, answer: dict[str, object]) -> None:
    """What the ranks wrote to stderr, if something went wrong."""
    if answer["ok"]:
        return
    for one in getattr(story, "lives", []):
        if one.last_words.strip():
            print(f"--- rank {one.rank} wrote:\n{one.last_words.strip()[-4000:]}", file=sys.stderr)
