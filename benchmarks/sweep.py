"""Several shapes measured one after the other, and their rows as one record, a table and a picture."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from . import launched
from .dispatch_combine import measure
from .launched import Launch
from .options import ask_library
from .report import as_text
from .teams import in_a_fork
from .work import Shape


def task(
    shape: dict[str, Any],
    peers: Sequence[str],
    num_iterations: int,
    num_warm_up: int,
    seed: int,
    num_local_ranks: int | None = None,
    backends: Sequence[str] = ("cpu",),
) -> argparse.Namespace:
    """One contest, checked before anything is started. ``num_local_ranks``: if not all are on this host.

    Raises:
        ValueError: the shape cannot be run here; names the option and what to change.
    """
    num_teams = 1 + len(backends) + len(peers)
    library = ask_library(Shape(**shape), num_teams, num_local_ranks, backends=backends)
    return argparse.Namespace(
        **shape,
        peers=list(peers),
        backends=library.backends,
        iterations=num_iterations,
        warm_up=num_warm_up,
        seed=seed,
        library=library,
    )


def run_sweep(
    tasks: Sequence[argparse.Namespace],
    watch: Callable[[int], None],
    say: Callable[[str], None] | None,
    launch: Launch | None = None,
) -> dict[str, Any]:
    """Runs the contests one after the other; ``say`` gets the text of each as soon as it is there.

    ``launch``: of the processes that a launcher made the ranks; ``None``: each contest starts its own.

    Returns:
        ``rows`` of all contests, their whole records as ``runs``, and ``ok``: every answer was right.
    """
    runs = []
    for number, one in enumerate(tasks):
        if launch is not None:
            runs.append(launched.measure(launch, number, one, watch))
        else:
            # Each in a process of its own: a contest leaves threads behind, and the next one must fork again.
            runs.append(in_a_fork(partial(measure, one, watch)))
        if say is not None:
            say(as_text(runs[-1]) + "\n")
    rows = [row for run in runs for row in run["rows"]]
    return {"benchmark": "bench", "ok": all(run["ok"] for run in runs), "rows": rows, "runs": runs}


def as_markdown(record: dict[str, Any]) -> str:
    """The rows as a table, under what they were measured on."""
    run = record["runs"][0]
    machine, versions = run["machine"], run["versions"]
    lines = [
        f"{run['date'][:10]}, commit {run['commit']}, {machine['num_cores']} cores of {machine['cpu']}, torch "
        f"{versions['torch']}; medians of {run['num_iterations']} in microseconds, all systems in turns in one run; "
        f"load average {run['load_average'][0]} before, {record['runs'][-1]['load_average_after'][0]} after.",
        "",
        "| system | ranks | tokens | hidden | top-k | experts | dtype | dispatch | combine | pair | p95 | of floor |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_table_line(row) for row in record["rows"])]) + "\n"


def _table_line(row: dict[str, Any]) -> str:
    system = row["system"] + (" (emulated on a CPU)" if row["emulated"] else "")
    sizes = ("num_ranks", "num_tokens", "hidden", "num_topk", "num_experts", "dtype")
    what = [system, *(row[key] for key in sizes)]
    times = ["no time: " + row["failure"], "", "", "", ""]
    if not row["failure"]:
        times = [f"{row[key]:.0f}" for key in ("dispatch_us", "combine_us", "pair_us", "p95_us")]
        times.append(f"{row['share_of_floor']:.0%}" if row["share_of_floor"] else "-")
    return "| " + " | ".join(map(str, [*what, *times])) + " |"


def draw(record: dict[str, Any], file: str) -> None:
    """One group of bars a shape: the median pair of each system, with a whisker up to its 95th percentile."""
    from fault_a2a.cli import pictures

    runs = record["runs"]
    systems = list(dict.fromkeys(row["system"] for row in record["rows"]))
    figure, axes = pictures.pyplot().subplots(figsize=(2 + 2.2 * len(runs), 4.2), layout="constrained")
    width = 0.8 / len(systems)
    for number, system in enumerate(systems):
        timed = [(place, row) for place, run in enumerate(runs) for row in run["rows"] if row["system"] == system]
        timed = [(place, row) for place, row in timed if not row["failure"]]
        medians = [row["pair_us"] / 1e3 for _, row in timed]
        above = [max(row["p95_us"] / 1e3 - median, 0) for (_, row), median in zip(timed, medians, strict=True)]
        places = [place + (number - (len(systems) - 1) / 2) * width for place, _ in timed]
        bars = axes.bar(places, medians, width * 0.9, yerr=[[0] * len(above), above], capsize=3, label=system)
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    shapes = [run["shape"] for run in runs]
    axes.set_xticks(range(len(runs)), [_caption(shape) for shape in shapes], fontsize=8)
    axes.set_ylabel("dispatch + combine, ms (median, whisker to p95)")
    machine = runs[0]["machine"]
    axes.set_title(f"{machine['num_cores']} cores of {machine['cpu']}, {runs[0]['date'][:10]}", fontsize=9)
    axes.legend(frameon=False)
    pictures.save(figure, file)


def _caption(shape: dict[str, Any]) -> str:
    return (
        f"{shape['ranks']} ranks, {shape['tokens']} x {shape['hidden']} {shape['dtype']}\n"
        f"top-{shape['topk']} of {shape['experts']}"
    )
