"""The mutation table of docs/guards.md: each guard, what it prevents, and the test that goes red without it.

``python -m tests.guard_table`` writes it; ``tests/test_guard_table.py`` holds it against code, docs and tests.
"""

from __future__ import annotations

import re

from tests import test_cuda_host, test_guards, test_simulation
from tests.ballots import ROOT

DOCUMENT = ROOT / "docs" / "guards.md"
DESCRIBED = ("docs/protocol.md", "docs/membership.md")
BEGIN, END = "<!-- guards: begin -->", "<!-- guards: end -->"


def guards() -> dict[str, str]:
    """Every guard of the core in its order, with what its comment says."""
    text = (ROOT / "csrc/protocol/guards.hpp").read_text()
    return {name: what.strip() for name, what in re.findall(r"X\((\w+)\)\s*/\*(.*?)\*/", text)}


def described_in() -> dict[str, list[str]]:
    """Which of the documents name a guard."""
    texts = {path: (ROOT / path).read_text() for path in DESCRIBED}
    return {name: [path for path, text in texts.items() if f"`{name}`" in text] for name in guards()}


def red_test(guard: str) -> str:
    if guard in test_guards.TABLE:
        return f"`test_guards.py::test_scenario_is_red_without_the_guard[{guard}]`"
    if guard in test_guards.DEADLY:
        return f"`test_guards.py::test_a_number_that_is_believed_does_harm[{guard}]`"
    if guard in test_guards.EXPLORED:
        return f"`test_guards.py::test_two_views_are_decided_without[{guard}]`"
    if guard in test_guards.FOLLOWED:
        return f"`test_guards.py::test_an_accusation_is_followed_from_the_turn_after[{guard}]`"
    if guard in test_guards.PROCESSES:
        return f"`test_guards.py::test_processes_are_red_without_the_guard[{guard}]`"
    if guard in test_guards.SCHEDULED:
        return f"`test_joins.py::test_seeded_schedules_find_what_a_guard_of_joins_prevents[{guard}]`"
    if guard in test_simulation.PLANTED:
        return f"`test_simulation.py::test_a_guard_that_is_out_is_missed[{guard}]`"
    return ""


def others_out(guard: str) -> str:
    found = {**test_guards.TABLE, **test_guards.DEADLY}.get(guard, ("", ()))[1]
    return ", ".join(f"`{name}`" for name in found) or "-"


def triton_switches() -> list[str]:
    """From its source, since Triton need not be installed; tests/test_triton_plants.py holds its tests against them."""
    text = (ROOT / "kernels/triton/words.py").read_text()
    return re.findall(r'"(\w+)"', re.search(r"^SWITCHES = \((.*?)\)", text, re.MULTILINE | re.DOTALL)[1])


def other_kernels(guard: str) -> str:
    """Kernels besides the CPU's in which a test takes the guard out and is red."""
    shown_in = {
        "CUDA's": {*test_cuda_host.GUARDS, *test_cuda_host.GUARDS_APART, *test_guards.DEADLY},
        "CUDA's streams": test_cuda_host.guards_of_streams(),
        "Triton's": triton_switches(),
    }
    return ", ".join(name for name, guards in shown_in.items() if guard in guards) or "-"


def simulated(guard: str) -> str:
    if guard not in test_simulation.PLANTED:
        return "-"
    mix, others = test_simulation.PLANTED[guard][:2]
    return mix + (f" (with {', '.join(f'`{name}`' for name in others)})" if others else "")


def table() -> str:
    lines = [
        "| guard | what it is for | described in | red without it | others out | red in | found in simulation by |",
        "|---|---|---|---|---|---|---|",
    ]
    places = described_in()
    for guard, what in guards().items():
        where = ", ".join(f"[{path[5:-3]}]({path[5:]})" for path in places[guard])
        tests = f"{red_test(guard)} | {others_out(guard)} | {other_kernels(guard)} | {simulated(guard)}"
        lines.append(f"| `{guard}` | {what} | {where} | {tests} |")
    return "\n".join(lines)


def main() -> None:
    before, rest = DOCUMENT.read_text().split(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
