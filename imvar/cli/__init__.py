"""Command line: `imvar vary`, `mix`, `interpolate` and `grid` make variations of images, and a sheet of all of them."""

from __future__ import annotations

import gc
import io
import sys
from collections.abc import Sequence

from ..errors import ImvarError, OutOfMemoryError
from ..malloc import keep_freed_memory
from ..oom import explain_out_of_memory
from .parser import command_parser
from .render import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0 success, 1 failure, 2 usage error, 130 interrupted by Ctrl-C."""
    if argv is None:  # run as a program
        gc.freeze()  # imported modules are never garbage: keep collections, also the one at exit, from traversing them
    args = command_parser().parse_args(argv)
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the terminal's encoding may lack characters of file names
    try:
        with explain_out_of_memory():
            run_command(args)
    except OutOfMemoryError:
        print("imvar: out of memory; use --batch 1 or a smaller --size", file=sys.stderr)
    except (ImvarError, OSError) as error:
        print(f"imvar: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("imvar: interrupted", file=sys.stderr)
        return 130  # the shells' convention
    else:
        return 0
    return 1
