"""Find checkpoints: folders, bundled ones and snapshots of hub repositories."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from ..checks import as_path, check_type
from ..errors import CheckpointError, InputError, first_line, invalid
from .bundled import BUNDLED, bundled_checkpoint
from .read_errors import explain_read_error, kind_of

FileSelector = Callable[[set[str]], list[str]]
"""Function from the names of all files in a repository to the names and patterns of those to fetch."""

EXPECTED = f"a folder, a hub id ('owner/name') or {' or '.join(BUNDLED)}"
HINT = f"connect once so that it is downloaded, or pass the folder of a copy; {BUNDLED[0]} needs no download"
TIMEOUT = 10  # seconds


def names_in(names: set[str] | None, folder: str) -> list[str] | None:
    """Return the names that begin with `folder`, without it; None for None."""
    return None if names is None else [name.removeprefix(folder) for name in names if name.startswith(folder)]


@dataclass(frozen=True)
class Hub:
    """Options of a download: revision, cache, whether to use only the cache, token, whether to ignore the cache."""

    revision: str | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool | None = False
    token: str | bool | None = None
    force_download: bool | None = False

    def __post_init__(self) -> None:
        check_type("revision", self.revision, str)
        check_type("cache_dir", self.cache_dir, str, os.PathLike)
        check_type("local_files_only", self.local_files_only, bool)
        check_type("token", self.token, str, bool)
        if check_type("force_download", self.force_download, bool) and self.local_files_only:
            raise invalid(InputError, "force_download", "False with local_files_only=True", "True")


def locate(source: str | Path, hub: Hub, select: FileSelector) -> Path:
    """Return the folder of a checkpoint: `source` itself, the bundled one of that name or a snapshot from the hub.

    Only selected files are fetched. Raises `CheckpointError` if there is no such checkpoint.
    """
    if isinstance(source, str) and not source:
        raise invalid(CheckpointError, "pretrained_model_name_or_path", EXPECTED, "an empty string")
    folder, name = as_path("pretrained_model_name_or_path", source), str(source).rstrip("/")
    kind = kind_of(folder)
    if kind == "folder":
        with explain_read_error(folder):
            if name in BUNDLED and next(folder.rglob("*.json"), None) is None:
                got = "a folder without one, which hides the bundled checkpoint of its name"
                hint = f"pass str(bundled_checkpoint({name!r})) or change the working directory"
                raise invalid(CheckpointError, folder, "a checkpoint", got, hint)
        return folder
    if kind == "file":
        raise invalid(CheckpointError, folder, "a folder", "a file", "from_single_file reads files")
    if name in BUNDLED:
        return bundled_checkpoint(name, hub.revision)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise invalid(CheckpointError, name, EXPECTED, "no such folder")
    return download(name, hub, select)


def download(name: str, hub: Hub, select: FileSelector) -> Path:
    """Return the snapshot folder of a hub repository after fetching the selected files that are not in the cache.

    Where the hub is offline, unreachable or refuses, a cached snapshot with the selected files is returned, unless
    `force_download`.
    """
    from huggingface_hub import model_info, snapshot_download  # deferred: these import an HTTP library
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    http_error = HfHubHTTPError.__bases__[0]  # requests, httpx or httpx2, by version
    failures: Any = (http_error, OSError, HFValidationError, JSONDecodeError)
    label = f"{name} (revision {hub.revision})" if hub.revision else name
    snapshot = partial(snapshot_download, name, revision=hub.revision, token=hub.token, cache_dir=hub.cache_dir)
    cause = None
    if not (hub.local_files_only or constants.HF_HUB_OFFLINE):
        try:
            files = model_info(name, revision=hub.revision, token=hub.token, timeout=TIMEOUT).siblings or []
        except failures as error:
            cause = error
        else:
            patterns = checked_selection({file.rfilename for file in files}, select, label)
            try:
                return Path(snapshot(allow_patterns=patterns, force_download=bool(hub.force_download)))
            except failures as error:
                raise hub_error(label, error, "a complete download") from error
    if hub.force_download:
        raise hub_error(label, cause or OSError("HF_HUB_OFFLINE is set"), "a connection to the hub, for force_download")
    try:  # without patterns, as huggingface_hub requires every file that matches one, and alternatives match too
        folder = Path(snapshot(allow_patterns=[], local_files_only=True))
        checked_selection({path.relative_to(folder).as_posix() for path in folder.rglob("*")}, select, label)
    except failures as error:
        raise hub_error(label, cause or error, "a cached copy or a connection to the hub") from cause or error
    return folder


def checked_selection(names: set[str], select: FileSelector, label: str) -> list[str]:
    """Return the files that `select` selects from `names`, or raise `CheckpointError` if one is missing."""
    try:
        patterns = select(names)
    except CheckpointError as error:
        raise error.at(label) from error
    if absent := [pattern for pattern in patterns if "*" not in pattern and pattern not in names]:
        raise invalid(CheckpointError, label, f"the file {absent[0]}", "a repository without it")
    return patterns


def hub_error(label: str, error: Exception, expected: str) -> CheckpointError:
    """Return a `CheckpointError` with the reason why a checkpoint could not be fetched.

    `expected` is used for errors that have no more specific text.
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
    kind = kind_of(path)
    if kind == "file":
        return path
    if kind == "folder":
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
