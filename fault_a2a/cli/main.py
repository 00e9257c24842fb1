"""The command line's entrance: which commands there are, and the exit codes they share.

0: all is well. 1: a promise did not hold, or this machine cannot run what was asked about. 2: a wrong option.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fault_a2a._version import __version__
from fault_a2a.cli import bench, doctor, soak
from fault_a2a.cli import compile as compile_command
from fault_a2a.cli.drill import command as drill
from fault_a2a.cli.drill import options as drill_options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code, or raises ``SystemExit(2)`` for a wrong option."""
    parser = argparse.ArgumentParser(
        prog="fault-a2a", description="Fault-tolerant all-to-all for mixture-of-experts models."
    )
    parser.add_argument("--version", action="version", version=f"fault-a2a {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=drill_options.LateHelpParser
    )
    for name, text, add_arguments, _ in COMMANDS:
        add_arguments(commands.add_parser(name, help=text, description=text))
    args = parser.parse_args(argv)
    run = next(run for name, _, _, run in COMMANDS if name == args.command)
    try:
        return run(args, commands.choices[args.command])
    except BrokenPipeError:  # whoever read our lines has gone
        sys.stderr.close()
        return 1


COMMANDS = (
    ("doctor", "what this machine can run, and what is missing for the rest", doctor.add_arguments, doctor.run),
    (
        "drill",
        "starts a real group of processes, injects real faults, and checks every promise",
        drill_options.add_arguments,
        drill.run,
    ),
    (
        "compile",
        "compiles every CUDA and Triton kernel for given chips, no GPU needed",
        compile_command.add_arguments,
        compile_command.run,
    ),
    (
        "soak",
        "random real faults on real processes, group after group, until the time is over",
        soak.add_arguments,
        soak.run,
    ),
    (
        "bench",
        "times dispatch, combine and the pair beside the peers found here, each checked before its time counts",
        bench.add_arguments,
        bench.run,
    ),
)
