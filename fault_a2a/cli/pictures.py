"""Pictures that commands draw: refused before anything is run where they could not be, and drawn without a screen."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

ENDINGS = (".svg", ".png", ".pdf")


def check_picture(option: str, file: str) -> None:
    """Raises ``ValueError`` if the picture could not be drawn; names the option, and what to do."""
    if Path(file).suffix not in ENDINGS:
        raise ValueError(f"{option}: {file!r} does not end with {', '.join(ENDINGS)}")
    if not Path(file).resolve().parent.is_dir():
        raise ValueError(f"{option}: there is no folder for {file!r}; make it, or name another one")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            f"{option}: matplotlib is not installed: run `python -m pip install matplotlib`, or leave it out"
        )


def pyplot() -> Any:
    """matplotlib's, set up so that it needs no screen and draws the same file from the same figures."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams |= {"svg.hashsalt": "fault_a2a", "axes.spines.top": False, "axes.spines.right": False}
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, file: str) -> None:
    """Without the date, so that a picture differs only where its figures do."""
    figure.savefig(file, dpi=160, metadata={"Date": None} if file.endswith(".svg") else None)
    pyplot().close(figure)
