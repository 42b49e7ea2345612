"""What an operating system can do for folders: exchange two, lock a name, tell where something is mounted."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

AT_FDCWD, RENAME_EXCHANGE = -100, 2


def exchange(new: Path, folder: Path, aside: Path) -> None:
    """Two folders change places: in one step on Linux, elsewhere by way of `aside`, with a moment without `folder`."""
    if sys.platform == "linux" and rename_exchange(new, folder):
        return
    os.rename(folder, aside)
    try:
        os.rename(new, folder)
    except BaseException:
        os.rename(aside, folder)
        raise
    with suppress(OSError):  # it is a leftover now, and goes with the next save
        os.rename(aside, new)


def rename_exchange(a: Path, b: Path) -> bool:
    """Whether the system has, and the file system knows, a rename that lets two names change places."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0:
        return True
    if (code := ctypes.get_errno()) in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code), str(b))


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Wait until nobody else is in here with this path; False where the system cannot say.

    The file is there only as long as it is locked. Of a process that was killed the lock goes, and the file is reused.
    """
    handle = None
    while fcntl is not None:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(handle, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        except FileNotFoundError:
            if handle is None:  # no such folder
                break
        except OSError:  # no permission, or no locks on this file system
            if handle is not None:
                os.close(handle)
                handle = None
                path.unlink(missing_ok=True)
            break
        os.close(handle)  # it was another's, who has removed it since
        handle = None
    try:
        yield handle is not None
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)
            os.close(handle)


def mounted(folder: Path, *, within: bool = False) -> bool:
    """Whether a file system is mounted at `folder`, or `within` it. Only Linux tells of bind mounts."""
    try:
        table = Path("/proc/self/mountinfo").read_bytes()
    except OSError:
        return os.path.ismount(folder)
    for line in table.splitlines():
        escaped = line.split()[4]
        place = Path(os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), escaped)))
        if place == folder or (within and place.is_relative_to(folder)):
            return True
    return False


def remove(folder: Path) -> None:
    """Remove a folder and all in it; one that something is mounted in stays."""
    if not mounted(folder, within=True):
        shutil.rmtree(folder, ignore_errors=True)


def hard_link(entry: os.DirEntry[str], path: Path) -> bool:
    """Give a file a second name, `path`; where it cannot have one, an empty file stands there: False."""
    try:
        if entry.is_symlink():
            path.symlink_to(os.readlink(entry.path))
            return True
        if entry.is_file():
            os.link(entry.path, path)
            return True
    except FileNotFoundError:
        raise
    except OSError:  # another user's, or on another file system, or on one without links
        pass
    path.touch()
    return False


def copy_ownership(old: Path, new: Path) -> bool:
    """Give a folder the rights of another; False where that is not ours to do."""
    was, now = old.stat(), new.stat()
    if (was.st_uid, was.st_dev) != (now.st_uid, now.st_dev):
        return False
    with suppress(OSError):
        if was.st_gid != now.st_gid:
            os.chown(new, -1, was.st_gid)
        shutil.copystat(old, new)
        return is_writable(new)
    return False


def is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def contains_cwd(folder: Path) -> bool:
    """Whether this process is in `folder`: its current directory would no longer be what that name says."""
    try:
        return Path(os.path.realpath(os.getcwd())).is_relative_to(folder)
    except OSError:  # which has been removed
        return False
