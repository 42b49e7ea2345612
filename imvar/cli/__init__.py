"""The command `imvar`: `parser.py` has the commands with their arguments, and a module of each name runs it.

Nothing that is imported before a command runs loads a library, so that help and usage errors are quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .parser import check_combinations, command_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0 success, 1 failure, 2 usage error, 130 interrupted by Ctrl-C."""
    args = command_parser().parse_args(argv)
    check_combinations(args)
    args.own_process = argv is None  # run as a program, so settings of the process may be made
    if args.own_process:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin fight other processes
    try:
        from .run import run_command

        return run_command(args)
    except KeyboardInterrupt:
        print("imvar: interrupted", file=sys.stderr)
        return 130  # the shells' convention
