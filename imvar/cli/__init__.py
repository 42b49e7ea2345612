"""The command `imvar`: `parser.py` has the commands with their arguments, and a module of each name runs it.

Nothing that is imported before a command runs loads a library, so that help and usage errors are quick.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from .parser import check_combinations, command_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0 success, 1 failure, 2 usage error, 130 interrupted, 141 reader has gone."""
    try:
        try:
            return start(argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # so that its errors are those of this command
    except KeyboardInterrupt:
        print("imvar: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT  # the shells' convention
    except OSError as error:  # of the output: the reader has closed the pipe, as `head` does, or the disk is full
        if argv is None and sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at exit
        if isinstance(error, BrokenPipeError):
            return 128 + 13  # of SIGPIPE
        print(f"imvar: standard output: {error.strerror}", file=sys.stderr)
        return 1


def start(argv: Sequence[str] | None) -> int:
    """Parse the command line and run the command."""
    args = command_parser().parse_args(argv)
    check_combinations(args)
    args.own_process = argv is None  # run as a program, so settings of the process may be made
    if args.own_process:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin fight other processes
    from .run import run_command

    return run_command(args)
