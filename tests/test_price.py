"""The price of safety: the core without guards, the pairs, and that a price that is there is found and is red."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import instructions, price
from benchmarks.contest import next_order
from benchmarks.work import Shape

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--ranks", "2", "--tokens", "6", "--hidden", "64", "--topk", "2", "--experts", "8")

GUARDS = """
#include "protocol/guards.hpp"
using namespace fa2a;
constexpr int count_on() {
  int on = 0;
  for (unsigned guard = 0; guard < num_guards; ++guard) on += guarded(static_cast<Guard>(guard));
  return on;
}
#if FA2A_BENCH_UNCHECKED
static_assert(!kWatched && !guarded(guard_recheck) && !guarded(guard_consent) && !guarded(guard_check_index), "off");
static_assert(guarded(guard_round_compare) && guarded(guard_chunk_compare) && guarded(guard_chunk_consent) &&
              guarded(guard_copy_fence) && guarded(guard_view_once) && count_on() == 5, "what a round needs");
#else
static_assert(kWatched && count_on() == num_guards, "every guard");
#endif
"""


@pytest.mark.parametrize("unchecked", [0, 1])
def test_only_the_benchmark_build_is_without_guards(unchecked, tmp_path):
    source = tmp_path / "guards.cpp"
    source.write_text(GUARDS)
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    assert compiler, "the library builds with a C++ compiler, and so does this test"
    command = [compiler, "-std=c++17", "-fsyntax-only", f"-DFA2A_BENCH_UNCHECKED={unchecked}", "-I", str(ROOT / "csrc")]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_core_that_is_not_built_says_how_to_build_it():
    program = "import sys; sys.modules['fault_a2a._C_unchecked'] = None; import fault_a2a._core"
    environment = {**os.environ, "FAULT_A2A_CORE": "unchecked", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert done.returncode != 0 and "CMAKE_ARGS=-DFA2A_BENCH_UNCHECKED=ON make build" in done.stderr


def test_a_module_that_is_not_built_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(price, "module_file", lambda name: None if name == "_C_unchecked" else Path(name))
    with pytest.raises(SystemExit, match="2"):
        price.parse([*SMALL])
    assert "CMAKE_ARGS=-DFA2A_BENCH_UNCHECKED=ON make build" in capsys.readouterr().err


# The core with hooks stands in for the unchecked one, which the test suite does not build.
STAND_IN = """
import os, sys, time
sys.path.insert(0, {root!r})
from benchmarks import price, systems

class Slow(systems.FaultA2A):
    def dispatch(self, batch):
        if os.environ["FAULT_A2A_CORE"] == "":
            time.sleep(0.06)  # long beside what the scheduler does to a round
        return super().dispatch(batch)

price.FaultA2A = Slow
price.CORES = {{"checked": "", "unchecked": "hooks", "control": ""}}
price.MODULES = {{"checked": "_C", "unchecked": "_C_hooks"}}
sys.exit(price.main(sys.argv[1:]))
"""


def test_a_price_that_is_there_is_found_and_is_red():
    options = [
        *SMALL,
        "--pairs",
        "6",
        "--blocks",
        "2",
        "--rounds",
        "2",
        "--warm-up",
        "1",
        "--no-instructions",
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, "-c", STAND_IN.format(root=str(ROOT)), *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    record = json.loads(done.stdout)
    assert not record["ok"] and not record["failures"] and record["num_pairs"] == 6
    assert record["num_blocks"] == 2 == len(record["block_price_percent"])
    assert record["pair_us"]["checked"] > 20_000 and record["pair_us"]["control"] > 20_000
    assert record["price_percent"]["low"] > price.LIMIT_PERCENT > record["control_percent"]["low"]


def test_the_limit_is_held_by_the_lower_bound():
    assert price.is_within({"low": 1.0, "median": 3.0, "high": 4.0})
    assert not price.is_within({"low": 1.001, "median": 3.0, "high": 4.0})


def test_pairs_are_compared_one_by_one():
    assert price.per_turn([1.0, 2.0, 10.0, 20.0], 2) == [3.0, 30.0]
    # The machine got ten times slower in the middle; each pair saw 10 percent.
    found = price.percent_above([[1.1, 1.1], [11.0, 11.0, 11.0]], [[1.0, 1.0], [10.0, 10.0, 10.0]], seed=0)
    assert found == {"low": 10.0, "median": 10.0, "high": 10.0}


def test_what_changes_between_blocks_is_no_certainty():
    # Ten pairs that agree, but they are two groups of processes: one says +4 %, one says -4 %.
    ours, others = [[1.04] * 5, [0.96] * 5], [[1.0] * 5] * 2
    found = price.percent_above(ours, others, seed=0)
    assert found["low"] == -4.0 and found["high"] == 4.0


def test_pairs_that_do_not_fill_their_blocks_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(price, "module_file", Path)
    with pytest.raises(SystemExit, match="2"):
        price.parse([*SMALL, "--pairs", "7", "--blocks", "2"])
    assert "--pairs 7 is not a multiple of --blocks 2" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(instructions.missing() != "", reason="instructions are counted by valgrind")
def test_instructions_are_those_of_the_core():
    shape = Shape(2, 6, 64, 2, 8, "bf16", "batched", "owner")
    counted = {core: instructions.count(shape, core, 5) for core in ("", "hooks")}
    assert 1_000 < counted[""] < counted["hooks"]  # the hooks are extra work


def test_no_team_has_two_turns_in_a_row_and_all_orders_come():
    chance, order, seen = random.Random(2), [0, 1, 2], set()
    for _ in range(200):
        last, order = order[-1], next_order(order, chance)
        assert sorted(order) == [0, 1, 2] and order[0] != last
        seen.add(tuple(order))
    assert len(seen) == 6
    assert next_order([0], chance) == [0]
