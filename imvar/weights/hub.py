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
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants

from ..checks import as_path, check_type
from ..errors import CheckpointError, first_line, invalid
from .bundled import BUNDLED, bundled_checkpoint

T = TypeVar("T")

FileSelector = Callable[[set[str]], list[str]]
"""Function from the names of all files in a repository to the names and patterns of those to fetch."""

EXPECTED = f"a folder, a hub id ('owner/name') or {' or '.join(BUNDLED)}"
HINT = f"connect once so that it is downloaded, or pass the folder of a copy; {BUNDLED[0]} needs no download"
TIMEOUT = 10  # seconds


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


def locate(source: str | Path, hub: Hub, select: FileSelector) -> Path:
    """Return the folder of a checkpoint: `source` itself, the bundled one of that name or a snapshot from the hub.

    Only selected files are fetched. Raises `CheckpointError` if there is no such checkpoint.
    """
    if isinstance(source, str) and not source:
        raise invalid(CheckpointError, "pretrained_model_name_or_path", EXPECTED, "an empty string")
    folder, name = as_path("pretrained_model_name_or_path", source), str(source).rstrip("/")
    if os.path.isdir(folder):
        if name in BUNDLED and next(folder.rglob("*.json"), None) is None:
            raise invalid(
                CheckpointError,
                folder,
                "a checkpoint",
                "a folder without one, which hides the bundled checkpoint of its name",
                f"pass str(bundled_checkpoint({name!r})) or change the working directory",
            )
        return folder
    if os.path.isfile(folder):
        raise invalid(CheckpointError, folder, "a folder", "a file", "from_single_file reads files")
    if name in BUNDLED:
        return bundled_checkpoint(name, hub.revision)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise invalid(CheckpointError, name, EXPECTED, "no such folder")
    return download(name, hub, select)


def download(name: str, hub: Hub, select: FileSelector) -> Path:
    """Return the snapshot folder of a hub repository after fetching the selected files that are not in the cache.

    Where the hub is offline, unreachable or refuses, a cached snapshot with the selected files is returned.
    """
    from huggingface_hub import model_info, snapshot_download  # deferred: these import an HTTP library
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    http_error = HfHubHTTPError.__bases__[0]  # requests, httpx or httpx2, by version
    failures: Any = (http_error, OSError, HFValidationError, JSONDecodeError)
    label = f"{name} (revision {hub.revision})" if hub.revision else name
    snapshot = partial(snapshot_download, name, revision=hub.revision, token=hub.token, cache_dir=hub.cache_dir)
    names, cause = None, None
    if not (hub.local_files_only or constants.HF_HUB_OFFLINE):
        try:
            info = model_info(name, revision=hub.revision, token=hub.token, timeout=TIMEOUT)
            names = {file.rfilename for file in info.siblings or []}
        except failures as error:
            cause = error
    if names is not None:
        patterns = checked_selection(names, select, label)
        try:
            return Path(snapshot(allow_patterns=patterns))
        except failures as error:
            raise hub_error(label, error, "a complete download") from error
    try:  # no patterns: the hub's library takes a snapshot for incomplete that lacks any file which matches one
        folder = Path(snapshot(allow_patterns=[], local_files_only=True))
        checked_selection({path.relative_to(folder).as_posix() for path in folder.rglob("*")}, select, label)
    except failures as error:
        raise hub_error(label, cause or error, "a cached copy or a connection to the hub") from cause or error
    return folder


def checked_selection(names: set[str], select: FileSelector, label: str) -> list[str]:
    """Return what `select` picks from `names`, or raise `CheckpointError` if that is not all there."""
    try:
        patterns = select(names)
    except CheckpointError as error:
        raise error.at(label) from error
    if absent := [pattern for pattern in patterns if "*" not in pattern and pattern not in names]:
        raise invalid(CheckpointError, label, f"the file {absent[0]}", "a repository without it")
    return patterns


def hub_error(label: str, error: Exception, expected: str) -> CheckpointError:
    """Return a `CheckpointError` that says why a checkpoint could not be fetched.

    `expected` is for errors from which it does not follow.
    """
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RevisionNotFoundError

    while isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    got, hint = f"{type(error).__name__}: {first_line(error)}", HINT
    if isinstance(error, CheckpointError):
        got = f"an incomplete copy ({error.reason})"
    elif isinstance(error, LocalEntryNotFoundError):
        got = "no copy, and downloads are turned off (local_files_only=True or HF_HUB_OFFLINE)"
    elif isinstance(error, HFValidationError):
        expected = EXPECTED
    elif isinstance(error, RevisionNotFoundError):
        expected = "a revision of this repository"
    elif status in (401, 403):
        expected, hint = "a repository that is public or that your token may read", "pass token= or run `hf auth login`"
    elif status == 404:
        expected = "a repository on the hub"
    elif status:
        expected = "a response from the hub"
    return invalid(CheckpointError, label, expected, got, hint)


def locate_file(source: str | Path, hub: Hub) -> Path:
    """Return the path of a file: `source` itself, or a file on the hub given as a link or as "owner/name/file"."""
    path = as_path("pretrained_model_link_or_path", source)
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):
        raise invalid(CheckpointError, source, "a file", "a folder", "from_pretrained reads folders")
    link = re.fullmatch(
        r"(?:https://(?:huggingface\.co|hf\.co)/)?([\w-][\w.-]*/[\w-][\w.-]*)/"
        r"(?:(?:blob|resolve)/([^/]+)/)?([^?]+)(?:\?.*)?",
        str(source),
    )
    if not link:
        raise invalid(CheckpointError, source, "a file or a file on the hub ('owner/name/file')", "no such file")
    name, revision, file = link.groups()
    hub = replace(hub, revision=revision or hub.revision)
    return locate(name, hub, lambda names: [file]) / file


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
