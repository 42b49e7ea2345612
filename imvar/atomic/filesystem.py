"""Operations of the operating system: exchange two folders, lock a file, link files, copy permissions."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CheckpointError, invalid, warn_user

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

AT_FDCWD, RENAME_EXCHANGE, RENAME_SWAP = -100, 2, 2
ABSENT = errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL
"""Errors for a path that leads to nothing; the last is that of Windows for names such as URLs."""
LOCK_WARNING = 1  # seconds of waiting for a lock before a warning
LOCK_TIMEOUT = 60  # seconds of waiting for a lock, while its owner writes nothing, before an error
LOCK_INTERVAL = 0.01  # seconds between attempts to lock


def exchange(a: Path, b: Path) -> bool:
    """Exchange two folders atomically; return False if the system or the file system does not support it."""
    libc = ctypes.CDLL(None) if sys.platform in ("linux", "darwin") else None
    if libc and sys.platform == "darwin":
        return libc.renamex_np(os.fsencode(a), os.fsencode(b), RENAME_SWAP) == 0
    if not libc or not hasattr(libc, "renameat2"):
        return False
    return libc.renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0


@contextmanager
def locked(path: Path, progress: Callable[[], object] = lambda: None) -> Iterator[bool]:
    """Hold an exclusive lock on the file `path`; yield False if the system or the file system has no locks.

    The file exists only while it is locked. The system releases the lock of a killed process, and the file is reused.
    Warns when another process holds the lock. Raises `CheckpointError` when that takes `LOCK_TIMEOUT` seconds without
    a change of `progress()`, and for a symbolic link, which is not followed.
    """
    handle = acquire_lock(path, progress)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            with warn_os_error(f"{path}: the lock file cannot be removed"):
                path.unlink(missing_ok=True)
            with suppress(OSError):
                os.close(handle)


def acquire_lock(path: Path, progress: Callable[[], object]) -> int | None:
    """Return a handle of the file, which is locked until that is closed; None without locks."""
    start, seen, has_warned = time.monotonic(), None, False
    while fcntl is not None:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if path.is_symlink():
                raise invalid(CheckpointError, path, "a lock file", "a symbolic link", "remove it") from error
            return None  # no such folder, or no permission
        is_current = False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_current := os.path.samestat(os.fstat(handle), os.lstat(path)):
                return handle
        except FileNotFoundError:  # removed by its last owner in the meantime
            pass
        except BlockingIOError:
            waited = time.monotonic() - start
            if waited > LOCK_WARNING and not has_warned:
                warn_user(f"{path}: waiting for the process or thread that has locked this file to save here")
                has_warned, seen = True, progress()
            if waited > LOCK_TIMEOUT:
                before, seen = seen, progress()
                if seen == before:
                    got = f"no release and no progress of its owner for {LOCK_TIMEOUT} seconds"
                    hint = "end the process that holds the lock, or remove this file; nothing was changed"
                    raise invalid(CheckpointError, path, "a lock that is released", got, hint) from None
                start = time.monotonic()
        except OSError:  # no locks on this file system
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        finally:
            if not is_current:
                os.close(handle)
        time.sleep(LOCK_INTERVAL)
    return None


@contextmanager
def warn_os_error(message: str) -> Iterator[None]:
    """Convert an `OSError` in the block, in which nothing but clean-up is left to do, to a warning."""
    try:
        yield
    except OSError as error:
        warn_user(f"{message}: {error.strerror or error}")


def remove_folder(path: Path) -> None:
    """Remove a temporary folder; warn if a part of it stays."""
    with suppress(OSError):
        shutil.rmtree(path, ignore_errors=True)
    if os.path.lexists(path):
        warn_user(f"{path}: the temporary folder cannot be removed; the next save removes it")


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


def copy_permissions(old: Path, new: Path) -> None:
    """Give a file the permissions and extended attributes of another, and its owner and group where that is allowed."""
    source, times = old.stat(), new.stat()
    with suppress(OSError):
        os.chown(new, -1, source.st_gid)
        os.chown(new, source.st_uid, -1)
    with suppress(OSError):  # file systems without permissions
        shutil.copystat(old, new)
        os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))


def is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def contains_cwd(folder: Path) -> bool:
    """Return whether the working directory is `folder` or in it: replacing the folder would remove it."""
    try:
        return Path(os.path.realpath(os.getcwd())).is_relative_to(folder)
    except OSError:  # it was removed already
        return False
