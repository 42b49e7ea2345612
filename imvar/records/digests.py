"""SHA-256 digests of files and of pixels. Those of large files are kept, as each takes seconds."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL.Image import Image

from ..atomic.file import write_text
from ..errors import InputError, first_line, invalid

MIN_KEPT = 2**24  # bytes; smaller files are read again
MAX_KEPT = 1000  # files
SETTLED = 2.0  # seconds since a change from which on another change would alter the time of it, too
CACHE = "digests.json"


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 digest of a file in hexadecimal.

    That of a large file is kept in the user's cache folder, under its path, size and time of change. A file changed in
    the last two seconds is always read, since a second change could leave size and time as they are. Raises
    `InputError` for a file that cannot be read.
    """
    try:
        real = os.path.realpath(path)
        before = os.stat(real)
        is_kept = before.st_size >= MIN_KEPT and time.time() - before.st_mtime >= SETTLED
        state = [before.st_size, before.st_mtime_ns]
        if is_kept and (digest := read_cache().get(real, [])[:3])[:2] == state:
            return digest[2]
        with open(real, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        after = os.stat(real)
    except OSError as error:
        got = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or first_line(error)
        raise invalid(InputError, path, "a readable file", got) from error
    if is_kept and [after.st_size, after.st_mtime_ns] == state:
        keep(real, [*state, digest])
    return digest


def pixels_digest(value: Any) -> str:
    """Return the SHA-256 digest of mode, size and pixels of a PIL image, or of dtype, shape and values of a tensor.

    An image of another mode than RGB is read as the pipeline reads it, so equal pixels in other files, such as a
    palette image and its RGB copy, have one digest.
    """
    if isinstance(value, Image):
        from ..image.read import to_rgb  # imports torch

        image = to_rgb(value)
        header, data = f"{image.mode} {image.width}x{image.height}", image.tobytes()
    else:
        import numpy as np
        import torch

        value = np.array(value) if isinstance(value, np.ndarray) else value  # torch warns of read-only ones
        tensor = torch.as_tensor(value).detach().resolve_conj().resolve_neg().cpu().contiguous()
        shape = "x".join(map(str, tensor.shape))
        header, data = f"{str(tensor.dtype).removeprefix('torch.')} {shape}", bytes_of(tensor)
    return hashlib.sha256(f"{header}\n".encode() + data).hexdigest()


def bytes_of(tensor: Any) -> bytes:
    """Return the values of a contiguous tensor on the CPU as they are in memory."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def cache_file() -> Path:
    """Return where digests are kept: `imvar/digests.json` in $XDG_CACHE_HOME, or in ~/.cache."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    return Path(folder if os.path.isabs(folder) else Path("~/.cache").expanduser()) / "imvar" / CACHE


def read_cache() -> dict[str, list[Any]]:
    """Return [size, time, digest] by path; nothing from a file that is missing, broken or of another form."""
    try:
        cache = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, RuntimeError):  # RuntimeError: no home folder
        return {}
    return {path: entry for path, entry in cache.items() if is_entry(entry)} if isinstance(cache, dict) else {}


def is_entry(entry: Any) -> bool:
    """Return whether this is [size, time, digest]."""
    return isinstance(entry, list) and [type(part) for part in entry] == [int, int, str] and len(entry[2]) == 64


def keep(path: str, entry: list[Any]) -> None:
    """Add an entry to the cache, if that can be written.

    Processes replace the file whole. Of two at a time one entry is lost, which costs another reading.
    """
    with suppress(OSError, ValueError, RuntimeError):
        others = {name: kept for name, kept in read_cache().items() if name != path}
        newest = list(others.items())[-(MAX_KEPT - 1) :]
        write_text(cache_file(), json.dumps(dict([*newest, (path, entry)])))
