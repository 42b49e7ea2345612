"""Files: where a checkpoint lies, what its folders hold, and how files are written whole."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub

from ..checks import as_path, check_type
from ..errors import CheckpointError, first_line
from .bundled import BUNDLED, bundled_checkpoint

T = TypeVar("T")

Wanted = Callable[[set[str] | None], list[str]]
"""From the names of all files in a repository, None where they are not known, to the patterns of those to fetch."""


def within(names: set[str] | None, prefix: str) -> list[str] | None:
    """Those of the names that begin with `prefix`, without it; None where they are not known."""
    return None if names is None else [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


@dataclass(frozen=True)
class Hub:
    """Where on the hub a checkpoint is looked for, and with which rights."""

    revision: str | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    token: str | bool | None = None

    def __post_init__(self) -> None:
        check_type("revision", self.revision, str)
        check_type("cache_dir", self.cache_dir, str, os.PathLike)
        check_type("local_files_only", self.local_files_only, bool)
        check_type("token", self.token, str, bool)


def locate(source: str | Path, hub: Hub, wanted: Wanted) -> Path:
    """The folder of a checkpoint: `source` itself, the bundled one of that name, or a snapshot of that hub repository.

    Only wanted files are fetched. Raises `CheckpointError` where nothing is found.
    """
    if isinstance(source, str) and not source:
        raise CheckpointError("an empty name came; a folder or a hub id, which looks like 'owner/name', would do")
    folder, name = as_path("pretrained_model_name_or_path", source), str(source).rstrip("/")
    if os.path.isdir(folder):
        if name in BUNDLED and next(folder.rglob("*.json"), None) is None:
            raise CheckpointError(
                f"holds no checkpoint, and hides the one of its name that comes with imvar: str("
                f"bundled_checkpoint({name!r})), or another working directory, would do",
                path=folder,
            )
        return folder
    if os.path.isfile(folder):
        raise CheckpointError("is a file, not a folder; from_single_file reads files", path=folder)
    if name in BUNDLED:
        return bundled_checkpoint(name, hub.revision)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            "no such folder (and neither a hub id, which looks like 'owner/name', nor "
            f"{' or '.join(BUNDLED)}, which comes with imvar)",
            path=name,
        )
    names, fault = None, None  # no names: no network, so what is in the cache has to do
    try:
        if not hub.local_files_only and not huggingface_hub.constants.HF_HUB_OFFLINE:
            found = huggingface_hub.model_info(name, revision=hub.revision, token=hub.token, timeout=10)
            names = {file.rfilename for file in found.siblings or []}
        patterns = wanted(names)
    except CheckpointError as error:
        raise CheckpointError(error.reason, path=name) from error
    except Exception as error:  # huggingface_hub lets those of its network library through, whichever that is
        fault, patterns = error, wanted(None)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=hub.revision,
                token=hub.token,
                cache_dir=hub.cache_dir,
                allow_patterns=patterns,
                local_files_only=names is None,
            )
        )
    except Exception as error:
        fault = fault or error
        at = f"{name} (revision {hub.revision})" if hub.revision else name
        raise CheckpointError(
            "not in the cache, and the hub could not be reached or does not have it: connect once so "
            "that it is downloaded, or give the folder of a copy "
            f"({type(fault).__name__}: {first_line(fault)})",
            path=at,
        ) from fault


def locate_file(source: str | Path, hub: Hub) -> Path:
    """A file: at that path, or on the hub as a link there or as "owner/name/file" says."""
    path = as_path("pretrained_model_link_or_path", source)
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):
        raise CheckpointError("is a folder, not a file; from_pretrained reads folders", path=source)
    link = re.fullmatch(
        r"(?:https://(?:huggingface\.co|hf\.co)/)?([\w-][\w.-]*/[\w-][\w.-]*)/"
        r"(?:(?:blob|resolve)/([^/]+)/)?([^?]+)(?:\?.*)?",
        str(source),
    )
    if not link:
        raise CheckpointError("no such file (and not a file on the hub, as in 'owner/name/file')", path=source)
    name, revision, file = link.groups()
    hub = replace(hub, revision=revision or hub.revision)
    return locate(name, hub, lambda _: [file]) / file


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


REASONS = {
    "ENOSPC": "the disk is full",
    "EDQUOT": "the disk quota is used up",
    "EROFS": "the file system is read-only",
    "EFBIG": "a file would be larger than is allowed here",
    "EACCES": "there is no permission to write here",
    "EPERM": "there is no permission to write here",
    "ENOTDIR": "a file is where a folder should be",
    "EEXIST": "a file is where a folder should be",
    "EISDIR": "a folder is where a file should be",
}


@contextmanager
def explain_os_error(path: Path, state: str = "nothing was changed") -> Iterator[None]:
    """What goes wrong with files in here becomes a `CheckpointError` that says why, and in what `state` `path` is."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        reason = REASONS.get(errno.errorcode.get(error.errno or 0, ""), error.strerror or first_line(error))
        raise CheckpointError(f"cannot be written: {reason}; {state}", path=path) from error


def atomic_write(path: Path, write: Callable[[Path], T]) -> T:
    """Have `write` make a temporary neighbour, then rename it over `path`: never half a file, nor one after a crash.

    Renaming also keeps a file intact that is mapped into memory, as loaded weights are, or that has a second name.
    """
    temporary = path.with_name(f".{path.name[:50]}.{os.urandom(8).hex()}.tmp")
    with explain_os_error(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            result = write(temporary)
            sync(temporary)
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink()
        sync(path.parent)
    return result


def write_text(path: Path, text: str) -> None:
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names in a folder where the system can promise those."""
    if path.is_dir():
        with suppress(OSError):  # no folder can be opened on Windows, and some network file systems sync none
            _sync(path, os.O_RDONLY)
    else:
        _sync(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
