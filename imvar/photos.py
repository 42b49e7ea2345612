"""Photos in files: read upright, and told apart by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import InputError
from .image.read import to_rgb

FORMATS = ("JPEG", "PNG", "WEBP")


def load_image(path: str | Path) -> Image.Image:
    """A picture file as RGB, turned the way its EXIF says."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            return to_rgb(ImageOps.exif_transpose(file), str(path))
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: not a picture that can be read; a JPEG, PNG or WebP file would do") from error
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and more for broken files
        raise InputError(f"{path}: cannot be read as a picture: {error}") from error


def distinct(stems: Sequence[str]) -> list[str]:
    """The same names, numbered where they repeat, also for file systems that take a for A."""
    names: list[str] = []
    for stem in stems:
        name, k = stem, 2
        while name.casefold() in map(str.casefold, names):
            name, k = f"{stem}-{k}", k + 1
        names.append(name)
    return names


def spare(photos: Sequence[Path], outputs: Sequence[Path]) -> None:
    """Raise `InputError` where a variation would be written over a photo, or cannot be since a folder has its name."""
    sources = {path.resolve() for path in photos}
    for path in outputs:
        if path.resolve() in sources:
            raise InputError(f"{path}: is one of the photos and would be written over; another -o FOLDER would do")
        if path.is_dir():
            raise InputError(f"{path}: is a folder, and a picture is to have its name; another -o FOLDER would do")
