"""The house rules hold in every source file, and each rule is seen to find the violation that it is there for."""

from pathlib import Path

import pytest

from tests.tidy_rules import (
    MAX_LINES,
    RULES,
    Rule,
    Source,
    all_sources,
    complaints,
    first_line_is_a_caption,
    imports_follow_the_rooms,
    includes_follow_the_rooms,
    no_file_grows_wild,
    nothing_stops_or_prints,
    one_file_reads_the_clock,
    one_place_waits,
    one_place_waits_in_triton,
)

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_source_follows_the_rule(rule: Rule) -> None:
    found = complaints(rule, all_sources(ROOT))
    assert not found, "\n" + "\n".join(found)


def test_the_rules_see_every_room() -> None:
    paths = {source.path for source in all_sources(ROOT)}
    for expected in ("Makefile", ".ci/run", "setup.py", "README.md", "tests/test_tidy.py", "csrc/protocol/wait.hpp"):
        assert expected in paths
    for room in ("csrc/host/", "csrc/transport/", "csrc/membership/", "csrc/bindings/", "kernels/cpu/", "fault_a2a/"):
        assert any(path.startswith(room) for path in paths), room
    assert not any(path.startswith(("build/", ".venv/", "fault_a2a/include/")) for path in paths)


VIOLATIONS: list[tuple[Rule, str, str]] = [
    (includes_follow_the_rooms, "csrc/protocol/a.hpp", '#include "host/clock.hpp"'),
    (includes_follow_the_rooms, "csrc/protocol/a.hpp", "#include <cstdint>"),
    (includes_follow_the_rooms, "csrc/protocol/a.hpp", "  # include <cuda_runtime.h>"),
    (includes_follow_the_rooms, "csrc/protocol/a.hpp", '#include "signal.hpp"'),
    (includes_follow_the_rooms, "csrc/host/a.cpp", '#include "transport/shm.hpp"'),
    (includes_follow_the_rooms, "csrc/transport/a.cpp", '#include "membership/pulse.hpp"'),
    (includes_follow_the_rooms, "csrc/membership/a.cpp", '#include "transport/fabric.hpp"'),
    (includes_follow_the_rooms, "csrc/membership/a.cpp", '#include "kernels/cpu/dispatch.hpp"'),
    (includes_follow_the_rooms, "csrc/membership/verdict.cpp", '#include "host/clock.hpp"'),
    (includes_follow_the_rooms, "kernels/cpu/a.cpp", '#include "transport/faults.hpp"'),
    (includes_follow_the_rooms, "kernels/cpu/a.cpp", '#include "bindings/endpoint.hpp"'),
    (includes_follow_the_rooms, "csrc/bindings/module.cpp", "#include <torch/extension.h>"),
    (includes_follow_the_rooms, "csrc/bindings/endpoint.cpp", "#include <pybind11/pybind11.h>"),
    (imports_follow_the_rooms, "fault_a2a/buffer.py", "from fault_a2a import reference"),
    (imports_follow_the_rooms, "fault_a2a/buffer.py", "from . import reference"),
    (imports_follow_the_rooms, "fault_a2a/buffer.py", "from .reference import combine"),
    (imports_follow_the_rooms, "fault_a2a/buffer.py", "import fault_a2a.reference as truth"),
    (imports_follow_the_rooms, "fault_a2a/buffer.py", "def late():\n    import fault_a2a.reference"),
    (imports_follow_the_rooms, "fault_a2a/buffer.py", 'importlib.import_module("fault_a2a.reference")'),
    (imports_follow_the_rooms, "fault_a2a/buffer.py", "from fault_a2a.cli.main import main"),
    (imports_follow_the_rooms, "fault_a2a/buffer.py", "from fault_a2a._C_hooks import arm"),
    (imports_follow_the_rooms, "fault_a2a/buffer.py", "from . import _C"),
    (imports_follow_the_rooms, "fault_a2a/cli/doctor.py", "from fault_a2a.reference import combine"),
    (imports_follow_the_rooms, "fault_a2a/integrations/vllm/layer.py", "from ...reference import combine"),
    (imports_follow_the_rooms, "fault_a2a/group.py", "from fault_a2a.testing import virtual"),
    (imports_follow_the_rooms, "fault_a2a/reference.py", "from fault_a2a._core import core"),
    (imports_follow_the_rooms, "fault_a2a/reference.py", "from fault_a2a.buffer import Buffer"),
    (imports_follow_the_rooms, "fault_a2a/reference.py", "import fault_a2a"),
    (imports_follow_the_rooms, "fault_a2a/errors.py", "from fault_a2a.config import Config"),
    (includes_follow_the_rooms, "tests/simulator/a.hpp", '#include "bindings/module.hpp"'),
    (nothing_stops_or_prints, "csrc/protocol/a.hpp", "if (bad) __trap();"),
    (nothing_stops_or_prints, "csrc/protocol/a.hpp", 'asm volatile("trap;");'),
    (nothing_stops_or_prints, "csrc/protocol/a.hpp", "std::abort ();"),
    (nothing_stops_or_prints, "kernels/cpu/a.cpp", 'printf("%d", rank);'),
    (nothing_stops_or_prints, "kernels/cpu/a.cpp", "throw std::runtime_error(text);"),
    (nothing_stops_or_prints, "kernels/cpu/a.cpp", "std::cerr << rank;"),
    (nothing_stops_or_prints, "kernels/cuda/a.cu", "_exit(1);"),
    (nothing_stops_or_prints, "kernels/cuda/a.cu", "assert(rank < num_ranks);"),
    (one_place_waits, "kernels/cpu/a.cpp", "while (load_acquire(&word) == 0) {}"),
    (one_place_waits, "kernels/cpu/a.cpp", "while (true) {\n  if (load_acquire(&word) != old) break;\n}"),
    (one_place_waits, "kernels/cpu/a.cpp", "while (busy)\n  busy = word.load(std::memory_order_acquire) == 0;"),
    (one_place_waits, "kernels/cpu/a.cpp", "for (;;) { if (poll() == Reading::present) return; }"),
    (one_place_waits, "kernels/cpu/a.cpp", "for (int i = 0; load_relaxed(&word) == 0; ++i) {}"),
    (one_place_waits, "csrc/protocol/a.hpp", "do { value = load_acquire(word); } while (value == 0);"),
    (one_place_waits, "csrc/protocol/a.hpp", "machine.rest(peer);"),
    (one_place_waits, "csrc/transport/a.cpp", "while (page.seq.load() % 2 == 1) {}"),
    (one_place_waits, "kernels/cpu/a.cpp", "while (reading(src) == present_or_not) {}"),
    (one_place_waits, "kernels/cpu/a.cpp", "waiter->sleep(heard, 0);"),
    (one_place_waits, "kernels/cpu/a.cpp", "futex_wait(&word, seen, 0);"),
    (one_place_waits, "csrc/protocol/a.hpp", "__nanosleep(100);"),
    (
        one_place_waits_in_triton,
        "kernels/triton/a.py",
        "@kernel\ndef k(word):\n    while acquire(word) == 0:\n        pass",
    ),
    (
        one_place_waits_in_triton,
        "kernels/triton/a.py",
        "@inline\ndef f(n):\n    if n:\n        while n > 0:\n            n -= 1",
    ),
    (one_file_reads_the_clock, "csrc/membership/pulse.cpp", "clock_gettime(CLOCK_MONOTONIC, &now);"),
    (one_file_reads_the_clock, "csrc/host/thread.cpp", "auto now = std::chrono::steady_clock::now();"),
    (one_file_reads_the_clock, "kernels/cpu/a.cpp", "u64 now = __rdtsc();"),
    (first_line_is_a_caption, "fault_a2a/a.py", "import os"),
    (first_line_is_a_caption, "fault_a2a/__init__.py", ""),
    (first_line_is_a_caption, "csrc/host/a.hpp", "#pragma once"),
    (first_line_is_a_caption, "csrc/host/a.cpp", "\n// Late."),
    (first_line_is_a_caption, "kernels/cuda/a.cu", "//"),
    (first_line_is_a_caption, "Makefile", "all:"),
    (first_line_is_a_caption, ".ci/run", "#!/usr/bin/env bash\nset -e"),
    (first_line_is_a_caption, "docs/a.md", "A page without a title"),
    (no_file_grows_wild, "fault_a2a/a.py", "pass\n" * MAX_LINES),
    (no_file_grows_wild, "csrc/host/a.cpp", ";\n" * MAX_LINES),
]

INNOCENT: list[tuple[Rule, str, str]] = [
    (includes_follow_the_rooms, "csrc/protocol/a.hpp", '#include "protocol/signal.hpp"  // not <cstdint>'),
    (includes_follow_the_rooms, "csrc/protocol/a.hpp", "// #include <cstdint>"),
    (includes_follow_the_rooms, "kernels/cpu/a.cpp", '#include <vector>\n#include "host/clock.hpp"'),
    (includes_follow_the_rooms, "csrc/bindings/module.cpp", '#include <pybind11/stl.h>\n#include "host/clock.hpp"'),
    (includes_follow_the_rooms, "csrc/membership/pulse.cpp", '#include "host/clock.hpp"'),
    (includes_follow_the_rooms, "kernels/cpu/a.cpp", '#include "transport/wire.hpp"'),
    (includes_follow_the_rooms, "tests/native/a.cpp", '#include "transport/shm.hpp"'),
    (imports_follow_the_rooms, "fault_a2a/cli/drill/check.py", "from fault_a2a import reference"),
    (imports_follow_the_rooms, "fault_a2a/testing/a.py", "from ..reference import combine"),
    (imports_follow_the_rooms, "tests/test_a.py", "import fault_a2a.reference"),
    (imports_follow_the_rooms, "fault_a2a/buffer.py", "# from fault_a2a import reference\nimport torch"),
    (imports_follow_the_rooms, "fault_a2a/reference.py", "import torch\nfrom fault_a2a.placement import Placement"),
    (imports_follow_the_rooms, "fault_a2a/reference.py", "from .placement import Placement"),
    (nothing_stops_or_prints, "csrc/protocol/a.hpp", "// never abort()\nEvidence exit = Evidence::exit;"),
    (nothing_stops_or_prints, "csrc/protocol/a.hpp", 'static_assert(sizeof(x) == 8, "do not throw");'),
    (nothing_stops_or_prints, "csrc/host/a.cpp", "throw std::system_error(code);"),
    (one_place_waits, "csrc/protocol/wait.hpp", "while (load_acquire(&word) == 0) machine.rest(peer);"),
    (one_place_waits, "kernels/cpu/a.cpp", "for (int i = 0; i < n; ++i) total += load_acquire(&words[i]);"),
    (one_place_waits, "kernels/cpu/a.cpp", "for (const auto& word : words) total += load_acquire(&word);"),
    (one_place_waits, "kernels/cpu/a.cpp", "while (bits != 0) bits &= bits - 1;\nload_acquire(&word);"),
    (one_place_waits, "kernels/cpu/a.cpp", "// while (load_acquire(&word) == 0)"),
    (one_place_waits, "kernels/cpu/machine.cpp", "waiter_->sleep(heard_, tick_ns);"),
    (
        one_place_waits,
        "kernels/cpu/a.cpp",
        "for (;;) {\n  wait_for(machine, [&] { return poll(); });\n}",
    ),
    (one_place_waits, "csrc/transport/faulty.cpp", "usleep(late_us);"),
    (one_place_waits_in_triton, "kernels/triton/a.py", "def host():\n    while True:\n        launch(kernel, 1)"),
    (one_place_waits_in_triton, "kernels/triton/window.py", "@kernel\ndef k(n):\n    while n > 0:\n        n -= 1"),
    (one_file_reads_the_clock, "csrc/host/clock.cpp", "clock_gettime(CLOCK_MONOTONIC, &now);"),
    (one_file_reads_the_clock, "csrc/membership/pulse.cpp", "// not steady_clock\nnow_ns();"),
    (first_line_is_a_caption, ".ci/run", "#!/usr/bin/env bash\n# What runs before a change lands."),
    (first_line_is_a_caption, "fault_a2a/a.py", '"""What lives here."""'),
    (no_file_grows_wild, "docs/a.md", "text\n" * MAX_LINES),
]


def _name(case: object) -> str:
    return case.__name__ if callable(case) else str(case).replace("\n", "; ")[:60]


@pytest.mark.parametrize(("rule", "path", "text"), VIOLATIONS, ids=_name)
def test_planted_violation_is_found(rule: Rule, path: str, text: str) -> None:
    assert complaints(rule, [Source(path, text)])


@pytest.mark.parametrize(("rule", "path", "text"), INNOCENT, ids=_name)
def test_innocent_neighbour_is_left_alone(rule: Rule, path: str, text: str) -> None:
    assert not complaints(rule, [Source(path, text)])


def test_every_rule_has_a_planted_violation() -> None:
    assert {rule for rule, _, _ in VIOLATIONS} == set(RULES)
