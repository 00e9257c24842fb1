"""The records of benchmarks/fault_path.py as people read them: a line, a table, a picture of the distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What is measured of a run, each from the fault's own instant, of the worst of several faults; the last is no part of
# the way but its yardstick: the median step of the same run.
PARTS = {
    "suspect_ms": "first suspicion",
    "detect_ms": "dropped by all",
    "agree_ms": "agreed view on all",
    "first_good_step_ms": "first good step done by all",
    "step_ms": "a step of the run",
}
_WAY = [part for part in PARTS if part not in ("step_ms", "detect_ms")]
_COLORS = dict(zip(_WAY, ("#c1272d", "#e8743b", "#4aa564"), strict=True))
_WHAT = {"exit": "exit (SIGKILL)", "stop": "stop (SIGSTOP)", "cut": "cut link", "slow": "slow rank"}


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _spread(record: dict[str, Any], part: str) -> str:
    found = record["spread"].get(part)
    return " / ".join(_ms(found[key]) for key in ("median", "p95", "most")) if found else "no time"


def as_line(record: dict[str, Any]) -> str:
    """Median / p95 / max of each part, in one line; below it what did not hold."""
    times = "; ".join(f"{PARTS[part]} {_spread(record, part)}" for part in _WAY)
    lines = [
        f"{record['kind']}, {record['num_victims']} of {record['num_ranks']} ranks, {record['held']} of "
        f"{record['runs']} held, load {record['load_average_least']} to {record['load_average_most']}, ms: {times}"
    ]
    for failure in record["failures"]:
        lines.append(f"  {', '.join(failure['faults'])}: {'; '.join(failure['problems'])}")
    return "\n".join(lines)


def as_markdown(records: Sequence[dict[str, Any]]) -> str:
    """The lines as a table, under what they were measured on."""
    first = records[0]
    machine, shape, timeouts = first["machine"], first["shape"], first["timeouts_ms"]
    dates = sorted({record["date"][:10] for record in records})
    commits = ", ".join(dict.fromkeys(record["commit"] for record in records))
    loads = [record[key] for record in records for key in ("load_average_least", "load_average_most")]
    lines = [
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, commit {commits}, {machine['num_cores']} cores of "
        f"{machine['cpu']}, torch {first['versions']['torch']}, load average {min(loads)} to {max(loads)}; "
        f"{shape['tokens']} tokens a rank x {shape['hidden']} {shape['dtype']}, top-{shape['topk']} of "
        f"{shape['experts']} experts; "
        + ", ".join(f"{name} {value}" for name, value in timeouts.items())
        + ". Milliseconds since the fault, median / p95 / max.",
        "",
        "| fault | victims | ranks | runs held | first suspicion | agreed view on all | first good step done by all "
        "| a step | load |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        cells = [_WHAT[record["kind"]], record["num_victims"], record["num_ranks"]]
        cells += [f"{record['held']} of {record['runs']}", *(_spread(record, part) for part in _WAY)]
        step = record["spread"].get("step_ms")
        cells += [_ms(step["median"]) if step else "-"]
        cells += [f"{record['load_average_least']} to {record['load_average_most']}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def draw(records: Sequence[dict[str, Any]], file: str) -> None:
    """One panel a kind of fault, one row a group: every run a dot, the median a bar; milliseconds, logarithmic."""
    from fault_a2a.cli import pictures

    kinds = list(dict.fromkeys(record["kind"] for record in records))
    of_kind = {kind: [one for one in records if one["kind"] == kind and one["spread"]] for kind in kinds}
    heights = [max(len(rows), 1) for rows in of_kind.values()]
    figure, axes = pictures.pyplot().subplots(
        len(kinds),
        1,
        sharex=True,
        squeeze=False,
        figsize=(9.5, 0.34 * sum(heights) + 0.5 * len(kinds) + 1.2),
        height_ratios=heights,
        layout="constrained",
    )
    for axis, (kind, rows) in zip(axes[:, 0], of_kind.items(), strict=True):
        _draw_kind(axis, rows)
        timeout = {"stop": "silence_ms", "cut": "silence_ms", "slow": "stall_ms"}.get(kind)
        after = f", found by a timeout of {rows[0]['timeouts_ms'][timeout]} ms" if timeout and rows else ""
        axis.set_title(_WHAT[kind] + after, loc="left", fontsize=10)
    axes[-1, 0].set_xlabel("milliseconds since the fault")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    pictures.save(figure, file)


def _draw_kind(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    for place, record in enumerate(rows):
        for part, color in _COLORS.items():
            values = record["samples"][part]
            # A little apart by number, not by chance: the same picture from the same figures.
            heights = [place + 0.3 * ((number * 0.618) % 1 - 0.5) for number in range(len(values))]
            axis.scatter(values, heights, s=9, color=color, alpha=0.45, linewidths=0)
            median = record["spread"][part]["median"]
            axis.plot([median] * 2, [place - 0.32, place + 0.32], color=color, linewidth=2.2, label=PARTS[part])
    axis.set_xscale("log")
    axis.set_yticks(
        range(len(rows)), [f"{row['num_victims']} of {row['num_ranks']} ranks" for row in rows], fontsize=8.5
    )
    axis.set_ylim(max(len(rows), 1) - 0.4, -0.6)
    axis.grid(axis="x", which="major", color="#e6e6e6", linewidth=0.7)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
