"""Where images come from: the file of each, noted on it for the records of calls that use it."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

NOTE = "imvar_file"  # the attribute; images that are made from this one do not have it


class FileNote(NamedTuple):
    """The name of a file, without its folder, and the SHA-256 digest of its content, as far as they are known."""

    name: str | None
    sha256: str | None


def note_file(value: Any, file: Any) -> Any:
    """Note on an image the path, the bytes or the open file that it was read from, and return it."""
    if isinstance(file, (bytes, bytearray, memoryview)):
        note = FileNote(None, hashlib.sha256(file).hexdigest())
    else:
        name, sha256 = file if isinstance(file, (str, Path)) else getattr(file, "name", None), None
        with suppress(OSError, ValueError, AttributeError):  # a file that can be read but once
            sha256 = digest_of(file)
        note = FileNote(last_component(name), sha256)
    setattr(value, NOTE, note)
    return value


def digest_of(file: Any) -> str:
    """Return the SHA-256 digest of the whole content of a path or of an open file."""
    if isinstance(file, (str, Path)):
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    position = file.tell()
    file.seek(0)
    digest = hashlib.sha256()
    while chunk := file.read(2**20):
        digest.update(chunk)
    file.seek(position)
    return digest.hexdigest()


def file_of(value: Any) -> FileNote:
    """Return the file that an image was read from; of images opened by Pillow its name alone."""
    note = getattr(value, NOTE, None)
    return note if isinstance(note, FileNote) else FileNote(last_component(getattr(value, "filename", None)), None)


def last_component(path: Any) -> str | None:
    """Return the name of a file without its folder; None for anything but a path."""
    return Path(path).name or None if isinstance(path, (str, Path)) else None
