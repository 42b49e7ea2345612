"""JSON files of checkpoints, which are untrusted: bounded in size, strict, inside the checkpoint's folder."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, first_line

MAX_JSON_BYTES = 2**21  # bytes of a config, an index or the header of a weights file; ours have 100,000 at the most


def safe_join(folder: Path, name: str) -> Path:
    """The file or folder `name` of a checkpoint's folder, refused where it lies elsewhere, as by `..` or a link.

    The folder itself may be a link. In the hub's cache, where files are links, the repository's folder is the bound.
    """
    path = folder / name
    try:
        bound, real = folder.resolve(), path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a name that no file can have
        raise CheckpointError(f"cannot be a file: {first_line(error)}", path=path) from error
    for above in bound.parents:
        if above.name == "snapshots" and above.parent.name.startswith("models--"):
            bound = above.parent
    if not real.is_relative_to(bound):
        raise CheckpointError(f"leads out of {bound}, to {real}; a checkpoint's files lie in its folder", path=path)
    return path


def read_magic(path: Path) -> bytes:
    """The first bytes of a file that is one, and has any."""
    try:
        kind = path.stat().st_mode
        if not stat.S_ISREG(kind):  # opening a pipe would wait for a writer
            raise CheckpointError("is a folder, not a file" if stat.S_ISDIR(kind) else "is no regular file", path=path)
        with path.open("rb") as file:
            start = file.read(64)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError("no such file", path=path) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {first_line(error)}", path=path) from error
    if not start:
        raise CheckpointError("cannot be read: the file is empty", path=path)
    return start


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or a `CheckpointError` that says what is there instead."""
    read_magic(path)
    with path.open("rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    return parse_json(content, path)


def parse_json(content: bytes, path: Path, key: str | None = None) -> dict[str, Any]:
    """The object that a JSON text in `path` says; a `CheckpointError` where it does not say one, or says it twice."""
    if len(content) > MAX_JSON_BYTES:
        raise CheckpointError(f"cannot be read as JSON: it has more than {MAX_JSON_BYTES} bytes", path=path, key=key)
    if content.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            "cannot be read as JSON: it is a git-lfs pointer; git lfs pull would fetch the file", path=path
        )
    if content.lstrip().startswith(b"<"):
        raise CheckpointError(
            "cannot be read as JSON: it is a web page, such as a server sends in place of a file", path=path
        )
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=reject_duplicate_keys,
            parse_constant=parse_number,
            parse_float=parse_number,
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot be read as JSON: {first_line(error)}", path=path, key=key) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"holds a JSON {type(value).__name__}, not an object", path=path, key=key)
    return value


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:200]!r} is there twice")
        if odd := not_finite(value):
            raise ValueError(f"{key[:200]}: {odd[:20]} is not a finite number")
        found[key] = value
    return found


class NotFinite(str):
    """NaN, Infinity or a number too large, as it stands in a file."""


def parse_number(text: str) -> float | NotFinite:
    value = float(text)
    return value if math.isfinite(value) else NotFinite(text)


def not_finite(value: Any) -> NotFinite | None:
    """The first that a value or a list of them holds."""
    if isinstance(value, list):
        return next(filter(None, map(not_finite, value)), None)
    return value if isinstance(value, NotFinite) else None
