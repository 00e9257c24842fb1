"""The text that the drill's tokens come from: a file, the project's README, or, where there is none, the one below."""

from __future__ import annotations

from pathlib import Path

import fault_a2a

_SHIPPED = """
A mixture-of-experts layer has many experts and asks only a few of them about each word. A small router looks at the
word, gives every expert a score, and picks the best ones; their answers are weighted by the scores and added up. So a
model can have very many weights and still do little work for each word.

When the experts stand on many machines, each word has to travel. First every machine sends its words to the machines
that hold the chosen experts, and that is called dispatch. Then the experts work, and their answers travel back to the
words that asked, and that is called combine. Both are an all-to-all: everyone sends to everyone, and everyone waits for
everyone.

Waiting for everyone is where the trouble begins. If one machine dies, its words never arrive, and all the others stand
there and wait. The usual cure is to give up after a long time, to stop the whole group, and to begin again from the
start. One dead machine has cost all of them.

It need not be so. A machine can only ever notice that something it waits for did not come. If each writes only into the
memory of others and reads only its own, then whatever fails in the world, a death, a long sleep, a cut cable, looks the
same to the one who waits. The others can then agree on who is gone, finish the step with what they have, say exactly
which answers are missing, and go on.

The drill shows that. It starts real processes, gives them the words of this text, and lets a real fault strike one of
them. Everything that the others put out is computed a second time from what they say they had, and must be the same to
the last bit: nothing invented, nothing torn, nothing counted twice. And no one who was well may be thought dead.
"""


def read_text(path: str | None) -> tuple[str, str]:
    """(the text, what to call it) of a file, or of the default.

    Raises:
        ValueError: the file cannot be read, or has no word in it. The message names the option.
    """
    if path is None:
        readme = _readme()
        return (_SHIPPED, "the text that comes with it") if readme is None else (readme.read_text(), readme.name)
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"--text {path}: {error.strerror}; pass a file with some text.") from error
    if not text.strip():
        raise ValueError(f"--text {path}: it has no word in it; pass a file with some text.")
    return text, Path(path).name


def _readme() -> Path | None:
    """The README of the source tree that this package runs from; ``None`` for an installed package."""
    root = Path(fault_a2a.__file__).resolve().parents[1]
    readme = root / "README.md"
    return readme if readme.is_file() and (root / "csrc" / "protocol").is_dir() else None
