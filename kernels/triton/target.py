"""What runs the Triton kernels of this process: a GPU, or Triton's interpreter where there is none."""

from __future__ import annotations

import inspect
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


# Arguments of kernels that are numbers and no addresses. Of a number Triton compiles a form of its own for 1 and for
# multiples of 16, in the middle of a round; of an address it must know that it is a multiple of 16.
NUMBERS = frozenset(
    (
        *("num_tokens", "first_token", "num_rows", "num_polls", "is_first", "first_step", "last_step", "phase"),
        *("is_abandoned", "round_number", "next_round", "owed_0", "owed_1", "base_ns", "ns_per_poll", "tick_ns"),
    )
)
# Stands for an address that is not known yet.
SOME_ADDRESS = 1 << 40


def kernel(fn: Callable[..., None]) -> Any:
    """A function that is launched."""
    # What the interpreter patches it looks for among a kernel's globals, and what `inline` takes from triton.language
    # calls the core of it.
    fn.__globals__["triton_language_core"] = tl.core
    # Not triton.jit, which decides by what the environment said when triton was first imported, perhaps by others.
    if INTERPRETED:
        return InterpretedFunction(fn)
    return triton.jit(fn, do_not_specialize=[name for name in inspect.signature(fn).parameters if name in NUMBERS])


def inline(fn: Any) -> Any:
    """A function that kernels call, our own or one of triton.language's."""
    plain = getattr(fn, "fn", fn)
    # Called as Triton would call it, each call patches the whole language again, which takes a millisecond.
    return InterpretedFunction(plain).rewrite() if INTERPRETED else _as_jit(fn)


def _as_jit(fn: Any) -> Any:
    return fn if hasattr(fn, "fn") else triton.jit(fn)


def compile_ahead(kernel: Any, *args: object) -> None:
    """Compiles what ``launch`` with such arguments would run, ``SOME_ADDRESS`` for those that are not known yet."""
    if not INTERPRETED:
        kernel.warmup(*args, grid=(1,), enable_fp_fusion=False)


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
