"""Operations of the operating system: exchange two folders, lock a file, link files, copy permissions."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

AT_FDCWD, RENAME_EXCHANGE, RENAME_SWAP = -100, 2, 2


def exchange(a: Path, b: Path) -> bool:
    """Exchange two folders atomically; return False if the system or the file system does not support it."""
    libc = ctypes.CDLL(None) if sys.platform in ("linux", "darwin") else None
    if libc and sys.platform == "darwin":
        return libc.renamex_np(os.fsencode(a), os.fsencode(b), RENAME_SWAP) == 0
    if not libc or not hasattr(libc, "renameat2"):
        return False
    return libc.renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on the file `path`; yield False if the system or the file system has no locks.

    The file exists only while it is locked. The system releases the lock of a killed process, and the file is reused.
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
        os.close(handle)  # removed by its last owner in the meantime
        handle = None
    try:
        yield handle is not None
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)
            os.close(handle)


def hard_link(source: Path, path: Path) -> bool:
    """Hard-link a file; where that fails, create a copy of a symbolic link or an empty file and return False."""
    try:
        os.link(source, path, follow_symlinks=False)
    except FileNotFoundError:
        raise
    except (OSError, NotImplementedError):  # another user's, on another file system, or on one without hard links
        if source.is_symlink():
            path.symlink_to(os.readlink(source))
        else:
            path.touch()
        return False
    return True


def copy_ownership(old: Path, new: Path) -> bool:
    """Give a folder the group and permissions of another; return False if it would differ or not be writable."""
    source, target = old.stat(), new.stat()
    if (source.st_uid, source.st_dev) != (target.st_uid, target.st_dev):
        return False
    with suppress(OSError):
        if source.st_gid != target.st_gid:
            os.chown(new, -1, source.st_gid)
        shutil.copystat(old, new)
        return is_writable(new)
    return False


def is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def contains_cwd(folder: Path) -> bool:
    """Return whether the working directory is `folder` or in it: replacing the folder would remove it."""
    try:
        return Path(os.path.realpath(os.getcwd())).is_relative_to(folder)
    except OSError:  # it was removed already
        return False
