"""Folders that are replaced whole or not at all, and read as one save left them.

A save writes a new folder beside the old one, in which the files that it leaves alone are the old ones under a second
name (hard links); then the two folders change places in one step. What was open or mapped stays as it was.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TypeVar

from ..errors import CheckpointError
from .file import atomic_write, explain_os_error, sync
from .filesystem import contains_cwd, copy_ownership, exchange, hard_link, is_writable, locked, mounted, remove

T = TypeVar("T")
FileStamp = tuple[int, int, int]
"""Inode, size and time of change: a file that is replaced or written again has another."""

MAX_LINKED_FILES = (
    10_000  # files and folders in a folder; where there are more, it is no checkpoint's own and stays in place
)
WEIGHTS = (".safetensors", ".bin", ".json")  # what a save may have to remove: such files are always taken over
MAX_READS = 5
_filling: set[Path] = set()  # the temporary folders of this process


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` if all goes well: old or new, never a mix.

    Killed at any point, out of disk, or after an error in the `with` block, the old folder is as it was. The new one
    begins with all that the old one holds, under second names: never write to such a file in place, but rename a new
    one over it, as `write_whole` does, or call `private` first. A link is followed, and what it leads to is replaced.
    Saves of one folder wait for each other, and remove what killed ones left. Inside a folder that is being replaced,
    this is its plain subfolder.

    Folders change places only where a file of the old one is replaced or removed; new files alone are moved in one by
    one, those that name the others last. So are all, and then each file is whole but the save is not, where the
    folder itself has to stay: at and around a mount point, above the current directory, where the folder above it is
    not ours to write to, where files cannot have two names or are another user's, and with more than `MANY` of them.
    Raises `CheckpointError` with the path, the reason, and whether anything was changed.
    """
    folder = Path(os.path.realpath(folder))
    if folder in _filling:
        yield folder
        return
    with explain_os_error(folder):
        if folder.is_symlink():
            raise CheckpointError("is a link that leads back to itself; a folder would do", path=folder)
        if folder.exists() and not folder.is_dir():
            raise CheckpointError("is a file; a folder would do", path=folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        stays = folder.exists() and (mounted(folder) or not is_writable(folder.parent))
        with exclusive(folder, folder if stays else folder.parent) as temporary:
            if any(parent in _filling for parent in folder.parents):
                folder.mkdir(exist_ok=True)
                yield folder
                return
            temporary.mkdir()
            _filling.add(temporary)
            try:
                save = Save(folder, temporary)
                yield temporary
                save.finish()
            except CheckpointError as error:
                if error.path is None or not error.path.is_relative_to(temporary):
                    raise
                path = folder / error.path.relative_to(temporary)
                raise CheckpointError(error.reason, path=path, key=error.key) from error
            finally:
                _filling.discard(temporary)
                remove(temporary)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """The same for one file: a name to write it under, which takes the place of `path` if all goes well."""
    with explain_os_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path, path.parent) as temporary:
            temporary.mkdir()
            try:
                yield temporary / path.name
                (temporary / path.name).replace(path)
                sync(path.parent)
            except CheckpointError as error:
                raise CheckpointError(error.reason, path=path, key=error.key) from error
            finally:
                remove(temporary)


@contextmanager
def exclusive(folder: Path, place: Path) -> Iterator[Path]:
    """While nobody else saves `folder`, which may be a file: a free name in `place`, without what killed saves left.

    Where the system has no locks nobody waits, and nothing is removed.
    """
    stem = f".{folder.name[:50]}.tmp-"
    with locked(place / f"{stem}lock") as sole:
        if sole:
            with suppress(OSError):
                if not folder.exists():  # killed in the middle of an exchange that took two steps
                    aside(place / stem).rename(folder)
            with suppress(OSError):
                for path in list(place.iterdir()):
                    if re.fullmatch(re.escape(stem) + "[0-9a-f]{16}", path.name) and not path.is_symlink():
                        remove(path)
        yield place / f"{stem}{os.urandom(8).hex()}"


def aside(temporary: Path) -> Path:
    """Where the old folder is for a moment, if an exchange takes two steps: the one name that can be told later."""
    return temporary.with_name(temporary.name.rpartition("-")[0] + f"-{0:016}")


class Save:
    """One save of `folder` by way of the folder `new`: what it took over, what it wrote, and what it removed."""

    def __init__(self, folder: Path, new: Path):
        """Fill the new folder with second names, or empty stand-ins, for all files of the old one."""
        self.folder, self.new = folder, new
        self.existed = folder.exists()
        self.movable = new.parent == folder.parent
        self.old: dict[str, int] = {}  # inodes in the old folder, by relative path
        self.taken: dict[str, FileStamp] = {}  # files in the new one as they were taken over
        if not self.existed:
            return
        if not is_writable(folder):
            raise PermissionError(errno.EACCES, "no permission", str(folder))
        folders = self.take_over()
        self.movable = self.movable and all(copy_ownership(folder / name, new / name) for name in reversed(folders))

    def take_over(self) -> list[str]:
        """Take over the upper files first, up to `MANY` and then what weights may be; says which folders there are."""
        folders, queue = [""], deque([""])
        while queue:
            inside = queue.popleft()
            try:
                entries = list(os.scandir(self.folder / inside))
            except OSError:  # not ours to read
                self.movable = False
                continue
            for entry in entries:
                name = os.path.join(inside, entry.name)
                if entry.path == str(self.new):
                    continue
                if len(self.old) >= MAX_LINKED_FILES:
                    self.movable = False
                    if os.sep in inside or not (entry.name.endswith(WEIGHTS) or (not inside and entry.is_dir())):
                        continue
                with suppress(FileNotFoundError):  # removed just now
                    if entry.is_dir(follow_symlinks=False):
                        (self.new / name).mkdir()
                        folders.append(name)
                        queue.append(name)
                    else:
                        self.movable &= hard_link(entry, self.new / name)
                        self.taken[name] = file_stamp(self.new / name)
                    self.old[name] = entry.inode()
        return folders

    def finish(self) -> None:
        """Have all that was written on the disk, and then in place."""
        below = [path for path in contents(self.new) if path.is_symlink() or not path.is_dir()]
        written = [path.relative_to(self.new) for path in below if not self.untouched(self.new, path)]
        gone = [Path(name) for name in self.taken if not os.path.lexists(self.new / name)]
        folders = [path for path in contents(self.new) if path.is_dir()]
        for path in (*(self.new / name for name in written), *folders, self.new):
            if not path.is_symlink():
                sync(path)
        stays = not self.movable or contains_cwd(self.folder) or mounted(self.folder, within=True)
        replaces = bool(gone) or any(str(name) in self.taken for name in written)
        if self.existed and (stays or not replaces):
            return self.move_in(written, gone)
        try:
            if self.existed:
                exchange(self.new, self.folder, aside(self.new))
            else:
                self.new.rename(self.folder)
        except OSError:  # a file system that moves no folders, or the folder has come into being meanwhile
            return self.move_in(written, gone)
        sync(self.folder.parent)
        self.keep_newcomers()

    def untouched(self, root: Path, path: Path) -> bool:
        """Whether a file is as it was taken over."""
        return file_stamp(path) == self.taken.get(str(path.relative_to(root)))

    def keep_newcomers(self) -> None:
        """After the exchange `new` is the old folder, about to be removed: what came into it meanwhile moves over."""
        for path in contents(self.new):
            name = path.relative_to(self.new)
            target = self.folder / name
            with suppress(OSError):
                free = not os.path.lexists(target) or self.untouched(self.folder, target)
                if free and path.lstat().st_ino != self.old.get(str(name)):
                    path.replace(target)

    def move_in(self, written: list[Path], gone: list[Path]) -> None:
        """File by file: weights, then the removal of what they replace, then settings, the index of all last."""
        for target in (self.folder / name for name in (*written, *gone)):
            above = next(parent for parent in target.parents if parent.exists())
            if not above.is_dir() or not is_writable(above):
                raise OSError(errno.EACCES if above.is_dir() else errno.ENOTDIR, "cannot be written", str(above))
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, "a folder", str(target))
        named = sorted(written, key=lambda name: (-len(name.parts), name.name.endswith("index.json")))
        with explain_os_error(self.folder, "some of the new files are in place, beside old ones"):
            for name in (name for name in named if name.suffix != ".json"):
                move(self.new / name, self.folder / name)
            for name in gone:
                if (self.folder / name).lstat().st_ino == self.old[str(name)]:
                    (self.folder / name).unlink()
            for name in (name for name in named if name.suffix == ".json"):
                move(self.new / name, self.folder / name)
            for parent in {(self.folder / name).parent for name in (*written, *gone)}:
                sync(parent)


def move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.replace(target)
    except OSError:  # as into a mounted folder; what is in the way of a copy as well is told by that
        atomic_write(target, lambda temporary: shutil.copyfile(source, temporary))


def break_hard_links(folder: Path) -> None:
    """Make every file in a folder a copy of its own, so that others may write to it in place."""
    for path in contents(folder):
        if path.is_file() and (path.is_symlink() or path.stat().st_nlink > 1):
            atomic_write(path, lambda temporary, path=path: shutil.copy2(path, temporary))


def contents(folder: Path) -> Iterator[Path]:
    """All that a folder holds, at any depth; links are not followed, and what vanishes meanwhile is passed over."""
    for inside, folders, files in os.walk(folder):
        yield from (Path(inside, name) for name in (*folders, *files))


def file_stamp(path: Path) -> FileStamp:
    status = path.lstat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_consistently(folder: Path, patterns: Sequence[str], read: Callable[[], T]) -> T:
    """What `read` returns, if the files that match stayed the same meanwhile; otherwise it reads again, a few times.

    So no result is a mix of two saves, whoever saved and in which format: a name for each save, kept in the files,
    would tell no more, and only of saves that wrote it.
    """
    fault = None
    for _ in range(MAX_READS):
        before = stamps(folder, patterns)
        try:
            result = read()
            if stamps(folder, patterns) == before:
                return result
        except OSError as error:
            if stamps(folder, patterns) == before:
                raise
            fault = error
    raise CheckpointError(f"was changed while it was being read, {MAX_READS} times over", path=folder) from fault


def stamps(folder: Path, patterns: Sequence[str]) -> dict[Path, FileStamp]:
    """The marks of the files that match, where links are followed: those of a hub's cache."""
    found = {}
    for path in chain.from_iterable(map(folder.glob, patterns)):
        with suppress(OSError, RuntimeError):  # it is gone by now, or leads nowhere, or back to itself
            found[path] = file_stamp(path.resolve())
    return found
