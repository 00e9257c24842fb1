"""What runs the Triton kernels of this process: a GPU, or Triton's interpreter where there is none."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction


def _interprets() -> bool:
    wanted = os.environ.get("TRITON_INTERPRET", "")
    return not torch.cuda.is_available() if wanted == "" else wanted == "1"


INTERPRETED = _interprets()
# Only what a GPU's assembly can say: an absolute clock, and the fence that orders a store before a load.
HAS_PTX = not INTERPRETED and torch.version.hip is None

# The interpreter keeps the number of the running program in one global, and patches triton.language while it runs: two
# threads may not be in it at once. So no interpreted kernel may wait for another thread; see Rank._wait.
_one_at_a_time = threading.Lock()


def kernel(fn: Callable[..., None]) -> Any:
    """A function that is launched."""
    # What the interpreter patches it looks for among a kernel's globals, and what `inline` takes from triton.language
    # calls the core of it.
    fn.__globals__["triton_language_core"] = tl.core
    # Not triton.jit, which decides by what the environment said when triton was first imported, perhaps by others.
    return InterpretedFunction(fn) if INTERPRETED else triton.jit(fn)


def inline(fn: Any) -> Any:
    """A function that kernels call, our own or one of triton.language's."""
    plain = getattr(fn, "fn", fn)
    # Called as Triton would call it, each call patches the whole language again, which takes a millisecond.
    return InterpretedFunction(plain).rewrite() if INTERPRETED else _as_jit(fn)


def _as_jit(fn: Any) -> Any:
    return fn if hasattr(fn, "fn") else triton.jit(fn)


def launch(kernel: Any, num_programs: int, *args: object) -> None:
    """Runs ``num_programs`` programs. The interpreter has run them when this returns; a GPU, in the stream's order."""
    if num_programs == 0:
        return
    if INTERPRETED:
        with _one_at_a_time:
            kernel[(num_programs,)](*args)
    else:
        # A product that goes into its sum unrounded has other bits than the CPU's.
        kernel[(num_programs,)](*args, enable_fp_fusion=False)
