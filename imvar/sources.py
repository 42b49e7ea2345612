"""Where images and embeddings come from, noted on them for the records of calls that use them.

A note is an attribute of an image or tensor, which nothing that is computed from it inherits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

FILE, EMBEDS = "imvar_file", "imvar_embeds"  # the attributes
OPERATIONS = {"weight", "slerp", "augment"}  # entries about how an embedding was computed from one of an image


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
    setattr(value, FILE, note)
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
    note = getattr(value, FILE, None)
    return note if isinstance(note, FileNote) else FileNote(last_component(getattr(value, "filename", None)), None)


def last_component(path: Any) -> str | None:
    """Return the name of a file without its folder; None for anything but a path."""
    return Path(path).name or None if isinstance(path, (str, Path)) else None


class EmbedsNote(NamedTuple):
    """The inputs that each row of embeddings was computed from, as a record has them.

    `encoder`: the weights of the image encoder that computed them, None without one; `version` of the tensor.
    """

    rows: Sequence[Sequence[dict[str, Any]]]
    encoder: Any
    version: int


def note_embeds(embeds: Any, rows: Sequence[Sequence[dict[str, Any]]], encoder: Any = None) -> Any:
    """Note on embeddings the inputs that each row was computed from, and return them."""
    if not embeds.is_inference():  # whose changes are not counted
        setattr(embeds, EMBEDS, EmbedsNote(rows, encoder, embeds._version))
    return embeds


def note_combination(embeds: Any, parts: Sequence[tuple[Any, dict[str, Any]]]) -> Any:
    """Note on one embedding how it was computed from others, and return it.

    `parts`: each of those and the entries of the operation, such as {"weight": 0.7}. Nothing is noted if one of them
    has no note, or is itself the result of an operation.
    """
    notes = [embeds_note(part) for part, _ in parts]
    encoders = {note.encoder for note in notes if note and note.encoder}
    is_simple = all(note and len(note.rows) == len(note.rows[0]) == 1 for note in notes) and len(encoders) <= 1
    entries = [dict(note.rows[0][0]) for note in notes if note] if is_simple else []
    if not entries or any(OPERATIONS & entry.keys() for entry in entries):
        return embeds
    row = [entry | more for entry, (_, more) in zip(entries, parts, strict=True)]
    return note_embeds(embeds, [row], next(iter(encoders), None))


def embeds_note(embeds: Any) -> EmbedsNote | None:
    """Return the note on embeddings, unless there is none or they were written to since."""
    note = getattr(embeds, EMBEDS, None)
    return note if isinstance(note, EmbedsNote) and note.version == embeds._version else None
