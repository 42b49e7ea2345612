"""Strict reading of a checkpoint's JSON files, which are untrusted: limited in size and confined to its folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..config import UNCLIPPED
from ..errors import CheckpointError, describe, first_line, invalid
from .read_errors import explain_read_error

MAX_JSON_BYTES = 2**21  # of a config, an index or the header of a weights file; imvar's have 100,000 at most


def safe_join(folder: Path, name: str) -> Path:
    """Return `folder / name`, or raise `CheckpointError` if that leads out of the folder, by `..` or a symbolic link.

    The folder itself may be a link. In the hub's cache, where files are links, the repository's folder is the limit.
    """
    path = folder / name
    try:
        limit, real = folder.resolve(), path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # circular links, names that are invalid as file names
        raise invalid(CheckpointError, path, "a valid path", first_line(error)) from error
    for parent in limit.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            limit = parent.parent
            break
    if not real.is_relative_to(limit):
        raise invalid(CheckpointError, path, f"a path in {limit}", f"one that leads to {real}")
    return path


def read_magic(path: Path) -> bytes:
    """Return the first bytes of a regular file that is not empty."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would block
            raise invalid(CheckpointError, path, "a file", "a folder" if path.is_dir() else "a special file")
        with path.open("rb") as file:
            magic = file.read(64)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        got = "no such file" if isinstance(error, FileNotFoundError) else first_line(error)
        raise invalid(CheckpointError, path, "a readable file", got) from error
    if not magic:
        raise invalid(CheckpointError, path, "a file with content", "an empty file")
    return magic


def reject_substitute(magic: bytes, path: Path, expected: str) -> None:
    """Raise `CheckpointError` for a file that git-lfs or a web server left in place of the expected one."""
    if magic.startswith(b"version https://git-lfs"):
        raise invalid(CheckpointError, path, expected, "a git-lfs pointer", "run `git lfs pull`")
    if magic.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise invalid(CheckpointError, path, expected, "a web page (HTML or XML)", "download the file again")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or raise `CheckpointError` with what it contains instead."""
    reject_substitute(read_magic(path), path, "a JSON file")
    with explain_read_error(path), path.open("rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    return parse_json(content, path)


def parse_json(content: bytes, path: Path, key: str | None = None) -> dict[str, Any]:
    """Return the object of a JSON text from `path`; raise `CheckpointError` for other values and duplicate keys."""
    if len(content) > MAX_JSON_BYTES:
        raise invalid(CheckpointError, path, f"at most {MAX_JSON_BYTES} bytes of JSON", "more", key=key)
    try:
        hooks: Any = {"parse_constant": parse_number, "parse_float": parse_number}
        value = json.loads(content.decode("utf-8"), object_pairs_hook=reject_duplicate_keys, **hooks)
    except (ValueError, RecursionError) as error:
        raise invalid(CheckpointError, path, "valid JSON", f"an error: {first_line(error)}", key=key) from error
    if not isinstance(value, dict):
        raise invalid(CheckpointError, path, "a JSON object", f"a {describe(value)}", key=key)
    return value


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a dictionary of the pairs; raise `ValueError` for a duplicate key or a number that is not finite."""
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"the duplicate key {key[:200]!r}")
        if (key, value) == (UNCLIPPED[0], "-Infinity"):
            value = UNCLIPPED[1]
        if number := first_not_finite(value):
            raise ValueError(f"{number[:20]} for {key[:200]}, which is not a finite number")
        out[key] = value
    return out


class NotFinite(str):
    """NaN, Infinity or a number beyond float64, as written in the file."""


def parse_number(text: str) -> float | NotFinite:
    value = float(text)
    return value if math.isfinite(value) else NotFinite(text)


def first_not_finite(value: Any) -> NotFinite | None:
    """Return the first number that is not finite in a value or a nested list."""
    if isinstance(value, list):
        return next(filter(None, map(first_not_finite, value)), None)
    return value if isinstance(value, NotFinite) else None
