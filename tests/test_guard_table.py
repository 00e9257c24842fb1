"""The mutation table is complete: every guard has a row, is described in the docs, and has a red test."""

import re
from types import ModuleType

import pytest

from fault_a2a._core import core
from tests import guard_table, test_guards, test_joins, test_simulation


def test_it_lists_the_guards_of_the_core() -> None:
    assert list(guard_table.guards()) == core.guard_names()


def test_the_document_is_what_code_docs_and_tests_say() -> None:
    section = guard_table.DOCUMENT.read_text().split(guard_table.BEGIN)[1].split(guard_table.END)[0].strip()
    assert section == guard_table.table(), "run python -m tests.guard_table"


@pytest.mark.parametrize("guard", guard_table.guards())
def test_each_guard_is_described_and_missed(guard: str) -> None:
    assert guard_table.described_in()[guard], f"neither of {guard_table.DESCRIBED} names `{guard}`"
    assert guard_table.red_test(guard), f"no test goes red without {guard}"


@pytest.mark.parametrize("module", [test_guards, test_joins, test_simulation])
def test_the_tests_that_are_named_exist(module: ModuleType) -> None:
    file = module.__name__.split(".")[-1] + ".py"
    named = set(re.findall(rf"`{file}::(\w+)\[", guard_table.table()))
    assert named and all(callable(getattr(module, name)) for name in named)


def test_whatever_is_planted_is_a_guard() -> None:
    kinds = ("TABLE", "DEADLY", "EXPLORED", "FOLLOWED", "PROCESSES", "SCHEDULED")
    groups = [getattr(test_guards, kind) for kind in kinds]
    assert {*test_simulation.PLANTED, *(guard for group in groups for guard in group)} == set(guard_table.guards())
