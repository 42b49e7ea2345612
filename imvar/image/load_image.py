"""Photos: read upright, and told apart by name."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from ..checks import as_path
from ..errors import InputError, InputTypeError, short_repr
from .read import to_rgb

FORMATS = ("JPEG", "PNG", "WEBP")
ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


def load_image(image: str | Path | bytes | BinaryIO, formats: Sequence[str] = FORMATS) -> Image.Image:
    """A picture as RGB, turned the way its EXIF says: from a path, the bytes of a file, or a file opened for reading.

    `formats`: those that are let in, by Pillow's names. Of an animation the first frame is taken, with a warning. What
    is transparent turns white. Addresses are not followed. Raises `InputError` for what cannot be read.
    """
    name = str(image) if isinstance(image, (str, Path)) else short_repr(getattr(image, "name", image))
    try:
        with Image.open(to_openable(image), formats=check_formats(formats)) as file:
            if (frames := getattr(file, "n_frames", 1)) > 1:
                warnings.warn(f"{name}: an animation of {frames} frames, of which the first is taken", stacklevel=2)
            return to_rgb(ImageOps.exif_transpose(file), name)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such file") from error
    except UnidentifiedImageError as error:
        would_do = "JPEG, PNG or WebP" if formats is FORMATS else " or ".join(formats)
        raise InputError(f"{name}: not a picture that can be read; a {would_do} file would do") from error
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and more for broken files
        raise InputError(f"{name}: cannot be read as a picture: {error}") from error


def to_openable(image: Any) -> Any:
    """What Pillow can open of a path, bytes, or a file."""
    if isinstance(image, (bytes, bytearray, memoryview)):
        return io.BytesIO(image)
    if isinstance(image, str) and ADDRESS.match(image):
        raise InputError(
            f"image={short_repr(image)}: is an address, and nothing is fetched; a file, or its bytes, would do",
            key="image",
        )
    if callable(getattr(image, "read", None)):
        if isinstance(image, io.TextIOBase):
            raise InputTypeError("image: a file opened as text came; one opened in mode 'rb' would do", key="image")
        return image
    path = as_path("image", image)
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for a writer
        raise InputError(f"{path}: is no file; a picture's would do", key="image")
    return path


def check_formats(formats: Any) -> list[str]:
    """Formats as Pillow takes them; a typing error would keep all out, and None would let all in."""
    Image.init()
    several = isinstance(formats, Sequence) and not isinstance(formats, str) and len(formats)
    if not several or not all(isinstance(one, str) and one in Image.OPEN for one in formats):
        raise InputError(
            f"formats={short_repr(formats)}: a list of Pillow's formats, such as {list(FORMATS)}, would do",
            key="formats",
        )
    return list(formats)


def unique_names(stems: Sequence[str]) -> list[str]:
    """The same names, numbered where they repeat, also for file systems that take a for A."""
    names: list[str] = []
    for stem in stems:
        name, k = stem, 2
        while name.casefold() in map(str.casefold, names):
            name, k = f"{stem}-{k}", k + 1
        names.append(name)
    return names


def check_overwrites(photos: Sequence[Path], outputs: Sequence[Path]) -> None:
    """Raise `InputError` where a variation would be written over a photo, or cannot be since a folder has its name."""
    sources = {os.path.realpath(path) for path in photos}
    for path in outputs:
        if os.path.realpath(path) in sources:
            raise InputError(f"{path}: is one of the photos and would be written over; another -o FOLDER would do")
        if path.is_dir():
            raise InputError(f"{path}: is a folder, and a picture is to have its name; another -o FOLDER would do")
