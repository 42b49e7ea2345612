"""The files that a command saves: no existing one is replaced, unless the user says so."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..atomic.file import atomic_write, unused_paths, write_new
from ..errors import InputError, invalid


class OutputFolder:
    """A folder, and the names of all files that a command saves in it.

    A name that exists is numbered, and the existing file kept: fox-0.png, then fox-0-2.png. With `overwrite` the file
    is replaced instead, unless it is one of the inputs.
    """

    def __init__(self, folder: Path, names: Sequence[str], overwrite: bool, inputs: Sequence[Path]):
        self.folder, self.overwrite = folder, overwrite
        self.names = {name.casefold() for name in names}  # on some file systems case does not distinguish names
        check_lengths(check_folder(folder), names)
        if overwrite:
            check_overwrites(inputs, [folder / name for name in names])

    def save_as(self, name: str, write: Callable[[Path], Any]) -> Path:
        """Let `write` write the file of this name, which appears whole or not at all; return its path."""
        path = self.folder / name
        if not self.overwrite:
            return write_new(path, write, self.is_reserved)
        atomic_write(path, write)
        return path

    def free_path(self, name: str) -> Path:
        """Return the path that `save_as` writes to."""
        path = self.folder / name
        return path if self.overwrite else next(unused_paths(path, self.is_reserved))

    def is_reserved(self, name: str) -> bool:
        """Return whether a number makes a name that of another file of the command."""
        return name.casefold() in self.names


def check_overwrites(inputs: Sequence[Path], outputs: Sequence[Path]) -> None:
    """Raise `InputError` if an output would overwrite an input, or has the name of a folder."""
    sources = {os.path.realpath(path) for path in inputs}
    for path in outputs:
        if (is_photo := os.path.realpath(path) in sources) or path.is_dir():
            got = "one of the photos" if is_photo else "a folder"
            raise invalid(InputError, path, "an output file", got, "use another -o FOLDER")


def check_lengths(folder: Path, names: Sequence[str]) -> None:
    """Raise `InputError` for a name that is too long for the file system."""
    for name in names:
        try:
            os.lstat(folder / name)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                got = f"{len(os.fsencode(name))} bytes"
                raise invalid(InputError, name, "a shorter name", got, "rename the photo") from error


def check_folder(folder: Path) -> Path:
    """Return the folder, or its parent in which it is created; raise `InputError` if that cannot be written to."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise invalid(InputError, "-o", "a folder", f"{folder} (it, or one of its parents, is a file)")
    if not os.access(existing, os.W_OK):
        raise invalid(InputError, "-o", "a writable folder", f"{folder} (no permission to write in {existing})")
    return existing
