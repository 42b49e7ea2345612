"""Read image files, upright and as RGB."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError, features
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH

from ..checks import as_path
from ..errors import InputError, InputTypeError, invalid, short_repr, warn_user
from ..sources import note_file
from .read import to_rgb

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
"""Those of the last two that Pillow has: AVIF from version 11.3 on, HEIF after `pillow_heif.register_heif_opener()`."""
MAX_TILE = 2**24  # pixels of a TIFF's tile that is larger than the image
AVIF_BRANDS, HEIC_BRANDS = {b"avif", b"avis"}, {b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"}
CONVERT_HEIC = (
    'convert it to JPEG: "sips -s format jpeg A.HEIC --out A.jpg" on a Mac, "magick A.HEIC A.jpg" with ImageMagick, or '
    "pip install pillow-heif, whose register_heif_opener() makes load_image read it"
)
URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


def load_image(image: str | Path | bytes | BinaryIO, formats: Sequence[str] = FORMATS) -> Image.Image:
    """Return an image as RGB, rotated by its EXIF orientation, from a path, the bytes of a file or an open file.

    `formats`: the accepted ones, by Pillow's names; by default `FORMATS`. An animation gives its first frame and a file
    of several pages its first page, with a warning. Transparent pixels become white. URLs are not fetched. Raises
    `InputError` for a file that cannot be read, or has more than twice `PIL.Image.MAX_IMAGE_PIXELS`, which is found
    before it is decoded.
    """
    with open_image(image, formats) as (file, name):
        check_tiles(file, name)
        if getattr(file, "is_animated", False) and file.format != "MPO":  # whose others belong to the one photo
            warn_user(f"{name}: of several frames or pages only the first is used")
        return note_file(to_rgb(ImageOps.exif_transpose(file), name), image)


@contextmanager
def open_image(image: Any, formats: Sequence[str] = FORMATS) -> Iterator[tuple[Image.Image, str]]:
    """Open an image file without decoding it, and yield it with its name in errors.

    Exceptions in the block are taken for those of decoding it, and become `InputError`.
    """
    name = str(image) if isinstance(image, (str, Path)) else short_repr(getattr(image, "name", image))
    formats = check_formats(formats)
    expected = f"a {' or '.join(', '.join(formats).rsplit(', ', 1))} file"
    openable = to_openable(image)
    try:
        with Image.open(openable, formats=formats) as file:
            yield file, name
    except InputError:
        raise
    except UnidentifiedImageError as error:
        got, hint = explain_unidentified(openable)
        raise invalid(InputError, name, expected, got, hint, key="image") from error
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and more for broken files
        got = "no such file" if isinstance(error, FileNotFoundError) else f"one that cannot be decoded ({error})"
        raise invalid(InputError, name, expected, got, key="image") from error


def check_tiles(file: Image.Image, name: str) -> None:
    """Raise `InputError` for a TIFF of huge tiles, which libtiff would allocate whole for any size of the image."""
    tags = getattr(file, "tag_v2", {})
    tile = [tags.get(tag, 0) for tag in (TILEWIDTH, TILELENGTH)]
    if not all(isinstance(side, int) for side in tile) or math.prod(tile) > max(MAX_TILE, 4 * math.prod(file.size)):
        raise invalid(InputError, name, f"tiles of up to {MAX_TILE} pixels", short_repr(tile), key="image")


def explain_unidentified(openable: Any) -> tuple[str, str]:
    """Return the format of a file that Pillow does not read, or that it is empty, by its first bytes; and a hint."""
    if isinstance(openable, Path):
        with openable.open("rb") as file:
            head = file.read(64)
    else:
        openable.seek(0)
        head = openable.read(64)
    if not head:
        return "an empty one", ""
    if head[4:8] == b"ftyp":  # ISO base media file format: brands of 4 bytes
        brands = {head[i : i + 4] for i in range(8, len(head), 4)}
        if brands & AVIF_BRANDS:
            if "avif" not in features.get_supported():
                return "AVIF, which this Pillow does not read", "pip install --upgrade Pillow"
        elif brands & HEIC_BRANDS and "HEIF" not in Image.OPEN:
            return "HEIC", CONVERT_HEIC
    return "an unknown or another format", ""


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
    if formats is FORMATS:
        return [name for name in FORMATS if name in Image.OPEN]
    is_list = isinstance(formats, Sequence) and not isinstance(formats, str) and len(formats)
    if not is_list or not all(isinstance(name, str) and name in Image.OPEN for name in formats):
        raise invalid(
            InputError, "formats", f"a list of Pillow formats such as {list(FORMATS[:3])}", short_repr(formats)
        )
    return list(formats)
