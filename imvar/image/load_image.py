"""Read image files, upright and as RGB."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from ..checks import as_path
from ..errors import InputError, InputTypeError, invalid, short_repr, warn_user
from ..sources import note_file
from .read import to_rgb

FORMATS = ("JPEG", "PNG", "WEBP")
URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


def load_image(image: str | Path | bytes | BinaryIO, formats: Sequence[str] = FORMATS) -> Image.Image:
    """Return an image as RGB, rotated by its EXIF orientation, from a path, the bytes of a file or an open file.

    `formats`: the accepted ones, by Pillow's names. An animation gives its first frame, with a warning. Transparent
    pixels become white. URLs are not fetched. Raises `InputError` for a file that cannot be read.
    """
    name = str(image) if isinstance(image, (str, Path)) else short_repr(getattr(image, "name", image))
    formats = check_formats(formats)
    expected = f"a {' or '.join(', '.join(formats).rsplit(', ', 1))} file"
    try:
        with Image.open(to_openable(image), formats=formats) as file:
            if (frames := getattr(file, "n_frames", 1)) > 1:
                warn_user(f"{name}: an animation of {frames} frames; only the first is used")
            return note_file(to_rgb(ImageOps.exif_transpose(file), name), image)
    except InputError:
        raise
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and more for broken files
        reasons = {FileNotFoundError: "no such file", UnidentifiedImageError: "an unknown or another format"}
        got = reasons.get(type(error), f"one that cannot be decoded ({error})")
        raise invalid(InputError, name, expected, got, key="image") from error


def to_openable(image: Any) -> Any:
    """Return a path, bytes or an open file as `PIL.Image.open` takes it."""
    if isinstance(image, (bytes, bytearray, memoryview)):
        return io.BytesIO(image)
    if isinstance(image, str) and URL.match(image):
        hint = "URLs are not fetched: download it first"
        raise invalid(InputError, "image", "a file or its bytes", short_repr(image), hint)
    if callable(getattr(image, "read", None)):
        if isinstance(image, io.TextIOBase):
            raise invalid(InputTypeError, "image", "a file opened in mode 'rb'", "a file opened as text")
        return image
    path = as_path("image", image)
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for a writer
        got = "a folder" if os.path.isdir(path) else "a pipe, device or socket"
        raise invalid(InputError, path, "an image file", got, key="image")
    return path


def check_formats(formats: Any) -> list[str]:
    """Return `formats` as a list of names that Pillow knows; it would reject all files for a misspelled one."""
    Image.init()
    is_list = isinstance(formats, Sequence) and not isinstance(formats, str) and len(formats)
    if not is_list or not all(isinstance(name, str) and name in Image.OPEN for name in formats):
        raise invalid(InputError, "formats", f"a list of Pillow formats such as {list(FORMATS)}", short_repr(formats))
    return list(formats)
