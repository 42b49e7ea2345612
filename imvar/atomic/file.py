"""Atomic writes of single files: after a crash or an error, a file has either its old or its new content."""

from __future__ import annotations

import errno
import glob
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import TypeVar

from ..errors import CheckpointError, first_line, invalid
from .filesystem import copy_permissions, locked, remove_folder, warn_os_error

T = TypeVar("T")

REASONS = {
    "ENOSPC": "a full disk",
    "EDQUOT": "an exhausted disk quota",
    "EROFS": "a read-only file system",
    "EFBIG": "a file above the size limit of this process or file system",
    "EACCES": "no permission to write",
    "EPERM": "no permission to write",
    "ENOTDIR": "a file in place of a folder",
    "EEXIST": "a file in place of a folder",
    "EISDIR": "a folder in place of a file",
}


@contextmanager
def explain_os_error(path: Path, state: str = "nothing was changed") -> Iterator[None]:
    """Convert an `OSError` in the block to a `CheckpointError` with the reason and the resulting `state` of `path`."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        reason = REASONS.get(errno.errorcode.get(error.errno or 0, ""), error.strerror or first_line(error))
        raise invalid(CheckpointError, path, "a writable path", reason, state) from error


def real_path(path: Path) -> Path:
    """Return the absolute path without symbolic links; raise `CheckpointError` if it is unknown."""
    try:
        return Path(os.path.realpath(path))
    except OSError as error:
        got = "a relative path, and the working directory was removed"
        raise invalid(CheckpointError, path, "an existing working directory", got, "pass an absolute path") from error


def atomic_write(path: Path, write: Callable[[Path], T], place: Callable[[Path, Path], object] | None = None) -> T:
    """Let `write` fill a temporary file next to `path`, then rename it to `path`; return the result of `write`.

    The previous file stays intact for programs that have it open or mapped into memory, as loaded weights are. The
    new file has its permissions. `place`: a function of both paths that renames the file instead.
    """
    temporary = path.with_name(f".{path.name[:50]}.{os.urandom(8).hex()}.tmp")
    with explain_os_error(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            mode = 0o600 if path.is_file() else 0o666  # at first private, as the old file may be
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
            result = write(temporary)
            sync(temporary)
            (place or replace_file)(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()
    return result


def write_new(path: Path, write: Callable[[Path], object], is_reserved: Callable[[str], bool] | None = None) -> Path:
    """Write a file as `atomic_write` does, but never over another one; return its path.

    If the path exists, the name is numbered: fox.png, then fox-2.png. `is_reserved`: whether a numbered name is skipped
    although it does not exist.
    """
    placed = path

    def move_to_unused(new: Path, path: Path) -> None:
        nonlocal placed
        for placed in unused_paths(path, is_reserved):
            with suppress(FileExistsError):  # created in the meantime
                placed.touch(exist_ok=False)  # an empty file, which keeps the name from other processes
                replace_file(new, placed)
                return

    atomic_write(path, write, move_to_unused)
    return placed


def unused_paths(path: Path, is_reserved: Callable[[str], bool] | None = None) -> Iterator[Path]:
    """Yield the paths that do not exist of those with this name and numbers after it."""
    for name in numbered_names(path.stem, path.suffix):
        numbered = path.with_name(name)
        if not os.path.lexists(numbered) and (numbered == path or not (is_reserved and is_reserved(name))):
            yield numbered


def numbered_names(stem: str, suffix: str = "") -> Iterator[str]:
    """Yield "fox.png", "fox-2.png", "fox-3.png" and so on."""
    yield stem + suffix
    for k in count(2):
        yield f"{stem}-{k}{suffix}"


def replace_file(new: Path, path: Path) -> None:
    """Rename the file `new` to `path`, with the permissions of the file that it replaces."""
    if path.is_file():
        copy_permissions(path, new)
    new.replace(path)
    with warn_os_error(f"{path}: written, but not flushed to the disk"):
        sync(path.parent)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path whose file replaces `path` at the end of the block, unless that raises.

    Unlike with `atomic_write`, the temporary file has the same name, concurrent writes of `path` wait for each other,
    and leftovers of killed ones are removed.
    """
    with explain_os_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path, path.parent) as temporary:
            temporary.mkdir()
            try:
                yield temporary / path.name
                replace_file(temporary / path.name, path)
            except CheckpointError as error:
                if error.path != temporary / path.name:
                    raise
                raise error.at(path) from error
            finally:
                remove_folder(temporary)


@contextmanager
def exclusive(path: Path, parent: Path) -> Iterator[Path]:
    """Lock `path`, remove leftovers of killed saves of it from `parent`, and yield an unused temporary path there.

    On systems without file locks, concurrent saves do not wait for each other and leftovers stay. Raises
    `CheckpointError` as `locked` does.
    """
    prefix = f".{path.name[:50]}.tmp-"
    pattern = glob.escape(prefix) + "[0-9a-f]" * 16
    with locked(parent / f"{prefix}lock", lambda: newest_change(parent.glob(pattern))) as is_locked:
        if is_locked:
            for leftover in list(parent.glob(pattern)):
                shutil.rmtree(leftover, ignore_errors=True)
        yield parent / f"{prefix}{os.urandom(8).hex()}"


def newest_change(folders: Iterable[Path]) -> int:
    """Return the time of the last change of any file or folder in `folders`, in nanoseconds; 0 without any."""
    newest = 0
    for root, _, files in chain.from_iterable(map(os.walk, folders)):
        for path in (root, *(os.path.join(root, name) for name in files)):
            with suppress(OSError):  # removed in the meantime
                newest = max(newest, os.lstat(path).st_mtime_ns)
    return newest


def write_text(path: Path, text: str) -> None:
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder where the system supports that, to the disk."""
    is_folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if is_folder or os.name == "posix" else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:  # Windows and some network file systems cannot flush folders
        if not is_folder or error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
