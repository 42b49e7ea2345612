"""Run a parsed command, and report its errors."""

from __future__ import annotations

import argparse
import codecs
import gc
import io
import sys
from importlib import import_module

from ..errors import ImvarError, OutOfMemoryError
from ..malloc import keep_freed_memory
from ..oom import explain_out_of_memory


def encode_name(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode characters of file names that the encoding of the output lacks: their bytes if known, else as escapes."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.lookup_error("backslashreplace")(error)


codecs.register_error("imvar.names", encode_name)


def run_command(args: argparse.Namespace) -> int:
    """Call `run(args)` of the module that is named like the command, and return the exit status."""
    module = import_module(f".{args.command}", __package__)
    if args.own_process:
        gc.freeze()  # imported modules are never garbage: keep collections, also the one at exit, from traversing them
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="imvar.names")
    try:
        with explain_out_of_memory():
            return module.run(args) or 0
    except OutOfMemoryError:
        print("imvar: out of memory; use --batch 1 or a smaller --size", file=sys.stderr)
    except BrokenPipeError:
        raise
    except (ImvarError, OSError) as error:
        print(f"imvar: {error}", file=sys.stderr)
    return 1
