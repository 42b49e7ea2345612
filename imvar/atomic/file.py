"""Atomic writes of single files: after a crash or an error a file has either its old or its new content."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from ..errors import CheckpointError, first_line

T = TypeVar("T")

REASONS = {
    "ENOSPC": "the disk is full",
    "EDQUOT": "the disk quota is used up",
    "EROFS": "the file system is read-only",
    "EFBIG": "a file would be larger than is allowed here",
    "EACCES": "there is no permission to write here",
    "EPERM": "there is no permission to write here",
    "ENOTDIR": "a file is where a folder should be",
    "EEXIST": "a file is where a folder should be",
    "EISDIR": "a folder is where a file should be",
}


@contextmanager
def explain_os_error(path: Path, state: str = "nothing was changed") -> Iterator[None]:
    """What goes wrong with files in here becomes a `CheckpointError` that says why, and in what `state` `path` is."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        reason = REASONS.get(errno.errorcode.get(error.errno or 0, ""), error.strerror or first_line(error))
        raise CheckpointError(f"cannot be written: {reason}; {state}", path=path) from error


def atomic_write(path: Path, write: Callable[[Path], T]) -> T:
    """Have `write` make a temporary neighbour, then rename it over `path`: never half a file, nor one after a crash.

    Renaming also keeps a file intact that is mapped into memory, as loaded weights are, or that has a second name.
    """
    temporary = path.with_name(f".{path.name[:50]}.{os.urandom(8).hex()}.tmp")
    with explain_os_error(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            result = write(temporary)
            sync(temporary)
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink()
        sync(path.parent)
    return result


def write_text(path: Path, text: str) -> None:
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names in a folder where the system can promise those."""
    if path.is_dir():
        with suppress(OSError):  # no folder can be opened on Windows, and some network file systems sync none
            _sync(path, os.O_RDONLY)
    else:
        _sync(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
