"""Atomic replacement of folders, and consistent reads of folders that may be replaced meanwhile.

A save fills a new folder next to the old one, with hard links to the files that it keeps; then the two folders are
exchanged in one system call. Open and mapped files stay valid.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from ..errors import CheckpointError, invalid
from .file import atomic_write, exclusive, explain_os_error, real_path, sync
from .filesystem import (
    ABSENT,
    contains_cwd,
    copy_ownership,
    copy_permissions,
    exchange,
    hard_link,
    is_writable,
    remove_folder,
    warn_os_error,
)

T = TypeVar("T")
FileStamp = tuple[int, int, int]
"""Inode, size and modification time, which change when a file is replaced or rewritten."""

MAX_LINKED_FILES = 10_000  # a folder with more files is not exchanged: it contains far more than a checkpoint
REPLACEABLE = (".safetensors", ".bin", ".json")  # endings of files that a save may remove
MAX_READS = 5
UNCHANGED = "files that stay the same while they are read"
_filling: set[Path] = set()  # the temporary folders of this process


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` at the end of the block, unless that raises.

    If the process is killed, the disk is full or the block raises, `folder` is unchanged. The temporary folder starts
    with hard links to all files of the old one: never write to such a file in place, but replace it, as `atomic_write`
    does, or call `break_hard_links` first. Symbolic links to `folder` are followed. Concurrent saves of a folder wait
    for each other and remove leftovers of killed ones. Within a temporary folder this yields the subfolder itself.

    The folders are exchanged only if a file of the old one is replaced or removed; otherwise the new files are moved
    in one by one, `model_index.json` last. Where the folder cannot be exchanged, files are moved in one by one too, so
    a save that is killed in that moment leaves some new files and some old ones. This concerns mount points, the
    working directory and its parents, folders in a read-only parent, folders or files of another user, more than
    `MAX_LINKED_FILES` files, and file systems without hard links or exchange.

    A file that is replaced keeps its permissions, and its owner and group where that is allowed. Raises
    `CheckpointError` with the path, the reason, and whether anything was changed, and as `locked` does. If the clean-up
    fails after all files are in place, that is a warning.
    """
    folder = real_path(Path(folder))
    with explain_os_error(folder):
        if os.path.lexists(folder) and not folder.is_dir():
            raise invalid(CheckpointError, folder, "a folder", "a circular link" if folder.is_symlink() else "a file")
        if _filling.intersection((folder, *folder.parents)):
            folder.mkdir(parents=True, exist_ok=True)
            yield folder
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        stays = folder.exists() and (os.path.ismount(folder) or not is_writable(folder.parent))
        with exclusive(folder, folder if stays else folder.parent) as temporary:
            temporary.mkdir()
            _filling.add(temporary)
            try:
                save = FolderSave(folder, temporary)
                yield temporary
                save.finish()
            except CheckpointError as error:
                if error.path is None or not error.path.is_relative_to(temporary):
                    raise
                raise error.at(folder / error.path.relative_to(temporary)) from error
            finally:
                _filling.discard(temporary)
                remove_folder(temporary)


class FolderSave:
    """A save of `folder` by way of the temporary folder `new`."""

    def __init__(self, folder: Path, new: Path):
        """Fill `new` with hard links to the files of `folder`."""
        self.folder, self.new = folder, new
        self.existed = folder.exists()
        self.exchangeable = new.parent == folder.parent
        self.linked: dict[str, FileStamp] = {}  # files of the old folder as they are in the new one
        if self.existed:
            if not is_writable(folder):
                raise PermissionError(errno.EACCES, "no permission", str(folder))
            self.link_contents()

    def link_contents(self) -> None:
        """Link all files, or only those that a save may remove if the folders cannot be exchanged."""
        subfolders, count = [""], 0
        for root, folders, files in os.walk(self.folder, onerror=self.forbid_exchange):
            inside = "" if root == str(self.folder) else os.path.relpath(root, self.folder)
            folders[:] = [name for name in folders if os.path.join(root, name) != str(self.new)]
            links = [name for name in folders if os.path.islink(os.path.join(root, name))]
            count += len(folders) + len(files)
            if count > MAX_LINKED_FILES:
                self.exchangeable = False
            if not self.exchangeable:
                files = [name for name in files if name.endswith(REPLACEABLE)]
                folders[:] = [] if inside else folders
            for name in (os.path.join(inside, name) for name in folders if name not in links):
                (self.new / name).mkdir()
                subfolders.append(name)
            for name in (os.path.join(inside, name) for name in (*files, *links)):
                with suppress(FileNotFoundError):  # removed in the meantime
                    self.exchangeable &= hard_link(self.folder / name, self.new / name)
                    self.linked[name] = file_stamp(self.new / name)
        self.exchangeable = self.exchangeable and all(
            copy_ownership(self.folder / name, self.new / name) for name in reversed(subfolders)
        )

    def forbid_exchange(self, error: OSError) -> None:
        """Handle a subfolder that cannot be read."""
        self.exchangeable = False

    def finish(self) -> None:
        """Flush all new files to the disk, then put them in place."""
        files: list[Path] = []
        folders = [self.new]
        for path in contents(self.new):
            (folders if path.is_dir() and not path.is_symlink() else files).append(path)
        written = [path.relative_to(self.new) for path in files if not self.is_unchanged(self.new, path)]
        removed = [Path(name) for name in self.linked if not os.path.lexists(self.new / name)]
        for name in written:
            if (self.folder / name).is_file() and not (self.new / name).is_symlink():
                copy_permissions(self.folder / name, self.new / name)
        for path in (*(self.new / name for name in written), *reversed(folders)):
            if not path.is_symlink():
                sync(path)
        replaces = bool(removed) or any(str(name) in self.linked for name in written)
        if (replaces or not self.existed) and self.replace_folder():
            with warn_os_error(f"{self.folder}: written, but not flushed to the disk"):
                sync(self.folder.parent)
            with warn_os_error(f"{self.folder}: written, but files that were added meanwhile may be lost"):
                self.keep_newcomers()
        else:
            self.move_in(written, removed)

    def is_unchanged(self, root: Path, path: Path) -> bool:
        """Return whether a file in `root` is the one that was linked."""
        return file_stamp(path) == self.linked.get(str(path.relative_to(root)))

    def replace_folder(self) -> bool:
        """Put the new folder in place of the old one; return False if that is impossible."""
        if self.existed:
            return self.exchangeable and not contains_cwd(self.folder) and exchange(self.new, self.folder)
        with suppress(OSError):  # created in the meantime
            self.new.rename(self.folder)
            return True
        return False

    def keep_newcomers(self) -> None:
        """Move files that other programs have added during the save from the old folder, now `new`, to the new one."""
        for path in contents(self.new):
            name = path.relative_to(self.new)
            target = self.folder / name
            with warn_os_error(f"{target}: added during the save, and lost"), suppress(FileNotFoundError):
                free = not os.path.lexists(target) or self.is_unchanged(self.folder, target)
                if free and path.lstat().st_ino != self.linked.get(str(name), (None,))[0]:
                    path.replace(target)

    def move_in(self, written: list[Path], removed: list[Path]) -> None:
        """Move the files one by one: weights first, then configs, `model_index.json` last."""
        for target in (self.folder / name for name in (*written, *removed)):
            parent = next(parent for parent in target.parents if parent.exists())
            if not parent.is_dir() or not is_writable(parent):
                raise OSError(errno.EACCES if parent.is_dir() else errno.ENOTDIR, "cannot be written", str(parent))
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, "a folder", str(target))
        order = sorted(written, key=lambda name: (-len(name.parts), name.name.endswith("index.json")))
        with explain_os_error(self.folder, "some of its files are new, others old"):
            for name in (name for name in order if name.suffix != ".json"):
                move(self.new / name, self.folder / name)
            for name in removed:
                (self.folder / name).unlink(missing_ok=True)
            for name in (name for name in order if name.suffix == ".json"):
                move(self.new / name, self.folder / name)
        with warn_os_error(f"{self.folder}: written, but not flushed to the disk"):
            for parent in {(self.folder / name).parent for name in (*written, *removed)}:
                sync(parent)


def move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.replace(target)
    except OSError:  # such as to another file system
        atomic_write(target, lambda temporary: shutil.copyfile(source, temporary))


def break_hard_links(folder: Path) -> None:
    """Replace each linked file in a folder by a copy, for programs that write to it in place."""
    for path in contents(folder):
        if path.is_file() and (path.is_symlink() or path.stat().st_nlink > 1):
            atomic_write(path, lambda temporary, path=path: shutil.copy2(path, temporary))


def contents(folder: Path) -> Iterator[Path]:
    """Yield all files and folders in a folder, at any depth, without following symbolic links."""
    for root, folders, files in os.walk(folder):
        yield from (Path(root, name) for name in (*folders, *files))


def file_stamp(path: Path, follow_links: bool = False) -> FileStamp:
    status = os.stat(path, follow_symlinks=follow_links)
    return status.st_ino, status.st_size, status.st_mtime_ns


class ReadFiles:
    """Files that are read, with their fingerprint before that."""

    def __init__(self, path: Path, fingerprint: Callable[[], object]):
        self.path, self.fingerprint = path, fingerprint
        self.before = fingerprint()
        self.is_checked = False

    def changed(self) -> bool:
        return self.fingerprint() != self.before

    def check(self) -> None:
        """Raise `CheckpointError` if they have changed. This ends the reading."""
        if self.changed():
            raise invalid(CheckpointError, self.path, UNCHANGED, "changes")
        self.is_checked = True


def use_consistently(path: Path, fingerprint: Callable[[], object], use: Callable[[ReadFiles], T]) -> T:
    """Return the result of `use`; repeat it if the fingerprint of the files changed before it called `check`.

    It may call `check` and then write what it has read. Raises `CheckpointError` about `path` for files that change
    each time.
    """
    cause = None
    for _ in range(MAX_READS):
        files = ReadFiles(path, fingerprint)
        try:
            return use(files)
        except (OSError, ValueError) as error:
            if files.is_checked or not files.changed():
                raise
            cause = error
    got = f"changes during each of {MAX_READS} attempts"
    raise invalid(CheckpointError, path, UNCHANGED, got, "wait until nothing writes to them") from cause


def read_consistently(folder: Path, patterns: Sequence[str], read: Callable[[], T]) -> T:
    """Return the result of `read`; repeat it if files that match `patterns` changed meanwhile.

    So the result never mixes two saves, whichever program saved.
    """

    def read_and_check(files: ReadFiles) -> T:
        result = read()
        files.check()
        return result

    return use_consistently(folder, partial(stamps, folder, patterns), read_and_check)


def matching(folder: Path, patterns: Iterable[str]) -> Iterator[Path]:
    """Yield the paths that match a pattern, whose wildcards are in its last part, and all paths without wildcards.

    `Path.glob` would skip folders without permission, as if they were empty. Raises `OSError` for them.
    """
    for place, _, pattern in (pattern.rpartition("/") for pattern in patterns):
        names = [pattern]
        if glob.has_magic(pattern):
            try:
                names = fnmatch.filter(os.listdir(folder / place), pattern)
            except OSError as error:
                if error.errno not in ABSENT:
                    raise
                names = []
        yield from (folder / place / name for name in names)


def stamps(folder: Path, patterns: Iterable[str]) -> dict[Path, FileStamp]:
    """Return the stamps of the files that match, following symbolic links, of which the hub's cache consists."""
    out = {}
    for path in matching(folder, patterns):
        try:
            out[path] = file_stamp(path, follow_links=True)
        except OSError as error:  # removed, or a broken or circular link
            if error.errno not in ABSENT:
                raise
    return out
