"""A record as people read it."""

from __future__ import annotations

from typing import Any


def as_text(record: dict[str, Any]) -> str:
    """The table of a run of dispatch_combine, with what it rests on."""
    shape, versions = record["shape"], record["versions"]
    lines = [
        f"{shape['ranks']} ranks, {shape['tokens']} tokens a rank x {shape['hidden']} {shape['dtype']}, top-"
        f"{shape['topk']} of {shape['experts']} experts, recv_format={shape['recv_format']}, reduce={shape['reduce']}",
        f"{record['machine']['num_cores']} cores of {record['machine']['cpu']}; fault_a2a {versions['fault_a2a']} "
        f"({versions['core']} core, commit {record['commit']}), torch {versions['torch']}; {record['date']}; load "
        f"average {record['load_average'][0]} before, {record['load_average_after'][0]} after",
        "",
        f"{'median of ' + str(record['num_iterations']) + ', in us':<22}{'dispatch':>10}{'combine':>10}{'pair':>10}"
        f"{'p25':>10}{'p75':>10}{'p95':>10}{'of floor':>10}",
    ]
    lines += [_line(row) for row in record["rows"]]
    lines += ["", *_floor_lines(record)]
    emulated = [row["system"] for row in record["rows"] if row["emulated"]]
    if emulated:
        lines.append(f"{', '.join(emulated)}: GPU kernels emulated on a CPU; their times say nothing of a GPU")
    fastest = record["fastest_peer"]
    if fastest:
        lines.append(
            f"pair, {fastest['system']} (the fastest peer) against ours: {fastest['times_ours']:.2f} times as long"
        )
    lines.append("OK: every answer was right" if record["ok"] else "RED: a system failed, see above")
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    if row["failure"]:
        return f"{row['system']:<22}no time: {row['failure']}"
    pair = row["spread_us"]["pair"]
    times = [row["dispatch_us"], row["combine_us"], row["pair_us"], pair["p25"], pair["p75"], row["p95_us"]]
    share = row["share_of_floor"]
    return f"{row['system']:<22}" + "".join(f"{us:>10.0f}" for us in times) + f"{share * 100 if share else 0:>9.0f}%"


def _floor_lines(record: dict[str, Any]) -> list[str]:
    moved = record["traffic"]
    hops = ", ".join(
        f"{name.removesuffix('_bytes')} {moved[name] / 1e6:.1f}" for name in moved if name != "total_bytes"
    )
    if record["floor_us"] is None:
        return [f"no floor: the copy rate was not measured ({record['copy_failure']})"]
    rate = record["copied_bytes_per_s"]
    return [
        f"must move {moved['total_bytes'] / 1e6:.1f} MB (read + written: {hops})",
        f"memcpy by all ranks at once: {rate['median'] / 1e9:.1f} GB/s copied ({rate['least'] / 1e9:.1f} to "
        f"{rate['most'] / 1e9:.1f}); floor {record['floor_us']:.0f} us",
        f"formula: {record['bytes_formula']}",
    ]
