"""Write an image with the record of how it was made, and read the record of an image file.

A record is in two places: as `parameters`, one line as AUTOMATIC1111's web UI writes it, for other programs; and
whole, as JSON. PNG has a text chunk for each, `parameters` and `imvar`. JPEG and WebP have EXIF: UserComment, where the
web UI also writes, and ImageDescription with `imvar:` before the JSON, a tag that programs keep when they save an image
again. No file contains a path or a time.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from ..atomic.file import atomic_write
from ..errors import InputError, first_line, invalid, short_repr
from .parameters import parameters_of
from .schema import MAX_DEPTH, check_record

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {  # by suffix: Pillow's name and options
    "png": ("PNG", {}),
    "webp": ("WEBP", {"lossless": True}),
    "jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
}
KEY, PREFIX = "imvar", "imvar:"  # of a PNG's text chunk; of ImageDescription
MAX_LENGTH = 2**18  # characters of JSON
MAX_EXIF = 65_500  # bytes, what a JPEG can hold
UNICODE = b"UNICODE\0"  # how EXIF says that UserComment is UTF-16
READABLE = "a PNG, JPEG or WebP file with a record of imvar"


def save_image(image: Image.Image, path: str | Path, record: dict[str, Any] | None = None, format: str = "png") -> None:
    """Write an image to a file, atomically, as `write_image` does."""
    atomic_write(Path(path), partial(write_image, image, record=record, format=format))


def write_image(
    image: Image.Image, file: Path | BinaryIO, record: dict[str, Any] | None = None, format: str = "png"
) -> None:
    """Write an image to the path of a file or to an open one, with its record if it is given.

    `format`: "png"; "webp", without loss; or "jpeg", with quality 95. Raises `InputError` for another one, or for a
    record too long for the format.
    """
    if format not in FORMATS:
        raise invalid(InputError, "format", f"one of {', '.join(FORMATS)}", short_repr(format))
    pillow_format, options = FORMATS[format]
    if record is not None:
        text = json.dumps(record, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
        if len(text) > MAX_LENGTH:
            raise invalid(InputError, "record", f"at most {MAX_LENGTH} characters", str(len(text)))
        if format == "png":
            options = options | {"pnginfo": png_text(parameters_of(record), text)}
        else:
            options = options | {"exif": exif_text(parameters_of(record), text)}
    image.save(file, format=pillow_format, **options)


def read_record(path: str | Path) -> dict[str, Any]:
    """Return the record of an image file.

    Raises `InputError` for a file that is not an image, without a record, or with one that imvar did not write.
    """
    text = record_text(path)
    if text is None:
        raise invalid(InputError, path, READABLE, "an image without one")
    if len(text) > MAX_LENGTH:
        raise invalid(InputError, path, f"a record of at most {MAX_LENGTH} characters", str(len(text)))
    try:
        record = json.loads(text, parse_constant=partial(refuse_constant, path))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        got = "one nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise invalid(InputError, path, f"a record in JSON, nested up to {MAX_DEPTH} levels", got) from error
    check_record(record, path)
    return record


def refuse_constant(path: str | Path, constant: str) -> Any:
    """Raise `InputError` for NaN and infinity, which JSON does not have."""
    raise invalid(InputError, path, "a record in JSON", constant)


def record_text(path: str | Path) -> str | None:
    """Return the JSON of a record, or None without one."""
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for a writer
        raise invalid(InputError, path, READABLE, "a folder" if os.path.isdir(path) else "a pipe, device or socket")
    try:
        with Image.open(path, formats=[name for name, _ in FORMATS.values()]) as image:
            if image.format == "PNG":  # chunks behind the pixels are read with them
                text = image.info.get(KEY) or getattr(image, "text", {}).get(KEY)
                return None if text is None else str(text)
            description = image.getexif().get(ExifTags.Base.ImageDescription, "")
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more for broken files
        got = "no such file" if isinstance(error, FileNotFoundError) else "one that cannot be read"
        detail = "" if isinstance(error, FileNotFoundError) else f" ({first_line(error)})"
        raise invalid(InputError, path, READABLE, got + detail) from error
    if not isinstance(description, str) or not description.startswith(PREFIX):
        return None
    return description.removeprefix(PREFIX)


def png_text(parameters: str, text: str) -> PngInfo:
    """Return the text chunks of a PNG: tEXt, or iTXt for characters that Latin-1 lacks."""
    chunks = PngInfo()
    chunks.add_text("parameters", parameters)
    chunks.add_text(KEY, text)
    return chunks


def exif_text(parameters: str, text: str) -> bytes:
    """Return EXIF with both texts."""
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = PREFIX + text
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = UNICODE + parameters.encode("utf-16-be")
    if len(data := exif.tobytes()) > MAX_EXIF:
        raise invalid(InputError, "record", f"at most {MAX_EXIF} bytes of EXIF", str(len(data)), "use PNG")
    return data
