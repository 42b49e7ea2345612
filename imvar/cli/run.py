"""Run a parsed command, and report its errors."""

from __future__ import annotations

import argparse
import codecs
import gc
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from typing import Any

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


STDOUT = "standard output"


class NamedOutput:
    """Standard output with its name in its errors, as an `OSError` of writing does not say to which file."""

    def __init__(self, file: Any):
        self.file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, text: str) -> int:
        with name_errors():
            return self.file.write(text)

    def flush(self) -> None:
        with name_errors():
            self.file.flush()


@contextmanager
def name_errors() -> Iterator[None]:
    """Set the name of the file of an `OSError` in the block."""
    try:
        yield
    except OSError as error:
        error.filename = STDOUT
        raise


def run_command(args: argparse.Namespace) -> int:
    """Call `run(args)` of the module that is named like the command, and return the exit status."""
    module = import_module(f".{args.command}", __package__)
    if args.own_process:
        gc.freeze()  # imported modules are never garbage: keep collections, also the one at exit, from traversing them
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="imvar.names")
    try:
        with redirect_stdout(sys.stdout and NamedOutput(sys.stdout)), explain_out_of_memory():
            return module.run(args) or 0
    except OutOfMemoryError:
        print("imvar: out of memory; use --batch 1 or a smaller --size", file=sys.stderr)
    except (ImvarError, OSError) as error:
        if isinstance(error, BrokenPipeError) or getattr(error, "filename", None) == STDOUT:
            raise
        for text in (error, *getattr(error, "__notes__", ())):
            print(f"imvar: {text}", file=sys.stderr)
    return 1
