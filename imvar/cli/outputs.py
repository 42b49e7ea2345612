"""The files that a command saves: no existing one is replaced, unless the user says so."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from ..atomic.file import atomic_write, explain_os_error
from ..errors import InputError, invalid


class OutputFolder:
    """A folder, and the names of all files that a command saves in it.

    A name that exists is numbered, and the existing file kept: fox-0.png, then fox-0-2.png. With `overwrite` the file
    is replaced instead, unless it is one of the inputs.
    """

    def __init__(self, folder: Path, names: Sequence[str], overwrite: bool, inputs: Sequence[Path]):
        self.folder, self.overwrite = folder, overwrite
        self.names = {name.casefold() for name in names}  # on some file systems case does not distinguish names
        check_folder(folder)
        if overwrite:
            check_overwrites(inputs, [folder / name for name in names])

    def save_as(self, name: str, write: Callable[[Path], Any]) -> Path:
        """Let `write` write the file of this name, which is replaced whole or not at all; return its path."""
        if self.overwrite:
            path = self.folder / name
            atomic_write(path, write)
            return path
        path = self.claim(name)
        try:
            atomic_write(path, write)
        except BaseException:
            path.unlink(missing_ok=True)  # the claim
            raise
        return path

    def claim(self, name: str) -> Path:
        """Create an empty file of this name, or of the next number that is free, and return its path.

        It keeps the name from other processes.
        """
        with explain_os_error(self.folder / name):
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.free_paths(name):
                with suppress(FileExistsError):  # created since
                    path.open("xb").close()
                    return path
        raise AssertionError

    def free_path(self, name: str) -> Path:
        """Return the path that `save_as` writes to."""
        return self.folder / name if self.overwrite else next(self.free_paths(name))

    def free_paths(self, name: str) -> Iterator[Path]:
        """Yield the paths of this name and its numbers that do not exist, but for those of this command's files."""
        for numbered in numbered_names(*os.path.splitext(name)):
            is_own = numbered == name or numbered.casefold() not in self.names
            if is_own and not os.path.lexists(path := self.folder / numbered):
                yield path


def numbered_names(stem: str, suffix: str = "") -> Iterator[str]:
    """Yield "fox-0.png", "fox-0-2.png", "fox-0-3.png" and so on."""
    yield stem + suffix
    for k in count(2):
        yield f"{stem}-{k}{suffix}"


def check_overwrites(inputs: Sequence[Path], outputs: Sequence[Path]) -> None:
    """Raise `InputError` if an output would overwrite an input, or has the name of a folder."""
    sources = {os.path.realpath(path) for path in inputs}
    for path in outputs:
        if (is_photo := os.path.realpath(path) in sources) or path.is_dir():
            got = "one of the photos" if is_photo else "a folder"
            raise invalid(InputError, path, "an output file", got, "use another -o FOLDER")


def check_folder(folder: Path) -> None:
    """Raise `InputError` if the output folder cannot be created or written to."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise invalid(InputError, "-o", "a folder", f"{folder} (it, or one of its parents, is a file)")
    if not os.access(existing, os.W_OK):
        raise invalid(InputError, "-o", "a writable folder", f"{folder} (no permission to write in {existing})")
