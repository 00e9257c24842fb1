"""Calls in processes of their own: what may end the process that it happens in, and commands as if they were started.

Forked from the server of tests/processes.py: a process that imports torch for itself needs three seconds of processor
time before it begins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
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


def completed(call: Callable[[], Any], timeout_s: float = 240.0) -> subprocess.CompletedProcess[str]:
    """What a program that does nothing but ``call`` would write, and its exit code: what ``call`` returns."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = started(call, out, err)
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{call} did not end within {timeout_s} s: {err.read_text()}")
        return subprocess.CompletedProcess([str(call)], process.exitcode, out.read_text(), err.read_text())


def started(call: Callable[[], Any], out: Path, err: Path) -> Any:
    """Its process, which writes into these files."""
    # The server has the environment that it was started with; a test may have changed this one since.
    process = SERVER.Process(target=_as_a_program, args=(call, dict(os.environ), str(out), str(err)))
    process.start()
    return process


def command(module: str, *options: str) -> subprocess.CompletedProcess[str]:
    """As ``python -m module options``, if the module's entrance is ``main(options)``."""
    return completed(partial(main_of, module, options))


def main_of(module: str, options: tuple[str, ...]) -> int:
    sys.argv = [module, *options]
    code: int = import_module(module).main(list(options))
    return code


def refusals(parse: Callable[[list[str]], Any], cases: Sequence[Sequence[str]]) -> list[str]:
    """What ``parse`` writes about each case, and "exit" with the code that it would end with."""
    done = completed(partial(_refuse_each, parse, cases))
    answers = done.stderr.split("next\n")
    assert len(answers) == len(cases) + 1 and done.stdout == "", done.stderr
    return answers[:-1]


def _refuse_each(parse: Callable[[list[str]], Any], cases: Sequence[Sequence[str]]) -> None:
    for options in cases:
        try:
            parse(list(options))
        except SystemExit as error:
            print("exit", error.code, file=sys.stderr)
        print("next", file=sys.stderr)


def _as_a_program(call: Callable[[], Any], environment: dict[str, str], out: str, err: str) -> None:
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    torch.set_num_threads(1)
    try:
        code = call()
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
