"""What commands and benchmarks have in common: options of several values, errors that name them, counts, records."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# The fields that Config's errors name, and the options that set them in most commands.
OPTION_OF_FIELD = {
    "num_ranks": "--ranks",
    "num_experts": "--experts",
    "hidden": "--hidden",
    "num_topk": "--topk",
    "num_max_tokens_per_rank": "--tokens",
    "placement": "--experts",
    "backend": "--backend",
}


def named_by_option(text: str, others: Mapping[str, str] | None = None) -> str:
    """An error of ``Config`` with the option that its field came from in front. ``others``: further fields' options."""
    option = {**OPTION_OF_FIELD, **(others or {})}.get(text.split(":", 1)[0])
    return text if option is None else f"{option} ({text})"


def whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 up")
    return int(text)


def whole_numbers(text: str) -> list[int]:
    return [whole_number(part) for part in text.split(",")]


def words(*known: str) -> Callable[[str], list[str]]:
    """The type of an option that takes some of these words, each once, separated by commas."""

    def given(text: str) -> list[str]:
        found = text.split(",")
        for word in found:
            if word not in known:
                raise argparse.ArgumentTypeError(f"there is no {word!r}; give some of {', '.join(known)}")
            if found.count(word) > 1:
                raise argparse.ArgumentTypeError(f"{word!r} is given twice; give it once")
        return found

    return given


def show_turns(what: str, num_turns: int, is_silent: bool) -> Callable[[int], None]:
    """Called with each turn that is done; on a terminal it shows how many are."""

    def show(turn: int) -> None:
        if not is_silent and sys.stderr.isatty():
            print(f"\r{what} {turn + 1} of {num_turns} ", end="", file=sys.stderr, flush=True)

    return show


def append_record(file: str, record: dict[str, Any]) -> None:
    """As a line of its own; the folder is made."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        out.write(json.dumps(record) + "\n")
