"""Calls in processes of their own, for what may end the process that it happens in.

Forked from the server of tests/processes.py: a process that imports torch for itself needs three seconds of processor
time before it begins."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

from tests.processes import SERVER

WENT_WRONG, NO_TEST = 3, 70


def exit_code(call: Callable[[], Any], timeout_s: float = 120.0) -> int:
    """0 if ``call`` returns nothing that is wrong; whatever its process ends with otherwise.

    ``call`` is pickled: a function of a module, or a ``functools.partial`` of one.
    """
    process = SERVER.Process(target=_run, args=(call,), daemon=True)
    process.start()
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"{call} did not return within {timeout_s} s")
    assert process.exitcode != NO_TEST, f"{call} is no test of anything: see its traceback"
    return process.exitcode


def _run(call: Callable[[], Any]) -> None:
    torch.set_num_threads(1)
    code = WENT_WRONG
    try:
        wrong = call()
        code = WENT_WRONG if wrong else 0
        print(wrong or "clean", file=sys.stderr)
    except (ImportError, AttributeError, NameError, TypeError, SyntaxError):
        # A call that never began must not pass for one that found something.
        traceback.print_exc()
        code = NO_TEST
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)  # what a planted bug left behind is not looked at
