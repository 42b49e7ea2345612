"""The files that PHOTO arguments name: files, folders, patterns and standard input."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from .atomic.file import numbered_names
from .errors import InputError, invalid

STDIN = Path("-")
SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif"),
    *(".heic", ".heif"),
}
"""Of the images in a folder; its other files are skipped. HEIC is not, so that the user learns how to convert it."""


def expand_photos(paths: Sequence[Path]) -> list[Path]:
    """Return the files: those of a folder or a pattern in the place of it, in natural order.

    Shells expand patterns, but not in quotes, and not on Windows. Raises `InputError` for a folder without images and
    for a pattern without files.
    """
    return [file for path in paths for file in files_of(path)]


def files_of(path: Path) -> list[Path]:
    """Return the files that one argument names; a file that does not exist is an error of reading it."""
    if path.is_dir():
        images = [file for file in path.iterdir() if is_image_name(file.name) and file.is_file()]
        if not images:
            hint = "for those of its folders, pass them, or a pattern such as '*/*.jpg'"
            raise invalid(InputError, path, "a folder with images", "a folder without any", hint)
        return sorted(images, key=natural_order)
    if path == STDIN or not glob.has_magic(str(path)) or path.exists():
        return [path]
    files = [file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file()]
    if not files:
        raise invalid(InputError, path, "a file, or a pattern of the names of files", "no such file")
    return sorted(files, key=natural_order)


def is_image_name(name: str) -> bool:
    """Return whether a file is taken for an image; hidden files are not, as macOS puts some beside photos."""
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES


def natural_order(path: str | Path) -> list[tuple[int, str]]:
    """Return a key that sorts "photo 9.jpg" before "photo 10.jpg"."""
    parts = re.split(r"(\d+)", str(path).casefold())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def is_embedding(path: Path) -> bool:
    """Return whether a file contains an embedding, by its suffix."""
    return path.suffix.lower() == ".safetensors"


def unique_names(stems: Sequence[str]) -> list[str]:
    """Return the names, numbered where they repeat; case does not distinguish them, as on some file systems."""
    names: dict[str, str] = {}
    for stem in stems:
        name = next(name for name in numbered_names(stem) if name.casefold() not in names)
        names[name.casefold()] = name
    return list(names.values())
