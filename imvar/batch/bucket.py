"""Paths in object stores, such as s3://bucket/photos, through fsspec and its package for the store.

They have no rename and no exclusive creation that all stores know, so a file is put whole, and processes do not see
each other.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from ..checks import as_path
from ..errors import ImvarError, InputError, first_line, invalid, short_repr
from .exits import MISUSED, BatchError

URL = re.compile(r"([a-z][a-z0-9+.-]*)://.", re.IGNORECASE)
CUT_URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # not C:/ of Windows
LOCAL, REFUSED = {"file", "local"}, {"http", "https"}
WRONG_USE = (FileNotFoundError, PermissionError, NotImplementedError, ValueError, TypeError)
WRONG_USE_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}  # of boto


class BucketError(BatchError):
    """An object store refuses a request, or does not answer. `status`: 2 where the command or its account is wrong."""


class BucketPath(PurePosixPath):
    """A file or a folder in an object store, with those methods of `Path` that a batch uses.

    `exists` and the like return the present state, never one from a cache. Raises `FileNotFoundError` as `Path`, and
    `BucketError` for everything else.
    """

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    @contextmanager
    def opened_store(self) -> Iterator[tuple[Any, str]]:
        """Return the file system of this path, and its name there, for a block whose errors are converted."""
        from fsspec.core import url_to_fs

        try:
            yield url_to_fs(str(self), use_listings_cache=False)
        except (FileNotFoundError, ImvarError):
            raise
        except Exception as error:  # each store has its own
            raise self.refusal(error) from error

    def refusal(self, error: Exception) -> BucketError:
        is_wrong = isinstance(error, WRONG_USE) or type(error).__name__ in WRONG_USE_NAMES
        got = first_line(error) or type(error).__name__
        expected = "a bucket that this account may use" if is_wrong else "an answer of the object store"
        return invalid(BucketError, self, expected, got, "see docs/scale.md#buckets", status=MISUSED if is_wrong else 1)

    # Read

    def exists(self) -> bool:
        with self.opened_store() as (store, name):
            return bool(store.exists(name))

    def is_file(self) -> bool:
        with self.opened_store() as (store, name):
            return bool(store.isfile(name))

    def is_dir(self) -> bool:
        with self.opened_store() as (store, name):
            return bool(store.isdir(name))

    def read_bytes(self, start: int | None = None, end: int | None = None) -> bytes:
        """Return the content of the file, or the part of it from `start` to `end`."""
        with self.opened_store() as (store, name):
            data: bytes = store.cat_file(name, start=start, end=end)
            return data

    @contextmanager
    def open(self, mode: str = "rb", buffering: int = -1, **options: Any) -> Iterator[Any]:
        """Open the file for a block, whose errors are converted. `buffering`: bytes that are read at once."""
        block = {} if buffering < 0 else {"block_size": buffering}
        with self.opened_store() as (store, name), store.open(name, mode, **block, **options) as file:
            yield file

    def open_file(self) -> Any:
        """Return the open file, for libraries; errors of its methods are those of the store."""
        with self.opened_store() as (store, name):
            return store.open(name, "rb")

    def names(self) -> list[str]:
        """Return the names of the files and folders in this folder, sorted; none if there is none."""
        with self.opened_store() as (store, name):
            try:
                found = store.ls(name, detail=False)
            except FileNotFoundError:
                return []
        return sorted({posixpath.basename(path.rstrip("/")) for path in found} - {"", self.name})

    def files(self, is_pattern: bool = False) -> list[BucketPath]:
        """Return all files in this folder and in its folders, or those that match this path as a pattern."""
        with self.opened_store() as (store, name):
            found = store.glob(name, detail=True) if is_pattern else store.find(name, detail=True)
            return [BucketPath(store.unstrip_protocol(path)) for path in found if found[path]["type"] == "file"]

    # Write

    def write_bytes(self, data: bytes) -> None:
        """Write the file whole."""
        with self.writing() as (store, name):
            store.pipe_file(name, data)

    def put_new(self, data: bytes) -> bool:
        """Write the file unless it exists, and return whether it was written.

        Stores that cannot tell write it as well where another process has just done so.
        """
        if self.exists():
            return False
        with self.writing() as (store, name):
            try:
                store.pipe_file(name, data, mode="create")
            except FileExistsError:
                return False
            except (NotImplementedError, TypeError):
                store.pipe_file(name, data)
            except OSError:
                if store.exists(name):
                    return False
                raise
        return True

    def upload(self, file: Path) -> None:
        """Write the file whole, from one of this machine."""
        with self.writing() as (store, name):
            store.put_file(str(file), name)

    @contextmanager
    def writing(self) -> Iterator[tuple[Any, str]]:
        """Return what `opened_store` does; a bucket that does not exist is an error as well."""
        with self.opened_store() as opened:
            try:
                yield opened
            except FileNotFoundError as error:
                raise self.refusal(error) from error

    def unlink(self, missing_ok: bool = False) -> None:
        with self.opened_store() as (store, name):
            try:
                store.rm_file(name)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing, as the names of files contain those of folders."""

    def rmdir(self) -> None:
        """Do nothing, as a folder without files does not exist."""


Location = Path | BucketPath
"""A file or a folder, of this machine or in an object store."""


def location(name: str, value: Any) -> Location:
    """Return a path or, of an address in an object store, a `BucketPath`.

    Raises `InputError` for other addresses, and without the package that fsspec uses for the store.
    """
    if isinstance(value, BucketPath):
        return value
    found = URL.match(value) if isinstance(value, str) else None
    if found is None and isinstance(value, str) and CUT_URL.match(value):  # of an unset variable, say
        raise invalid(InputError, name, "an address such as s3://bucket/photos", short_repr(value))
    if found is None:
        return as_path(name, value)
    if (protocol := found[1].lower()) in LOCAL:
        return as_path(name, value[found.end() - 1 :])
    from fsspec.registry import get_filesystem_class, known_implementations

    got = short_repr(value)
    if protocol in REFUSED or protocol not in known_implementations:
        expected = "a path, or an address of an object store such as s3://bucket/photos"
        raise invalid(InputError, name, expected, got, "download it first")
    try:
        get_filesystem_class(protocol)
    except ImportError as error:
        package = known_implementations[protocol]["class"].partition(".")[0]
        raise invalid(InputError, name, f"the package {package} for {got}", "none", f"pip install {package}") from error
    return BucketPath(value)


def absolute(path: Location, folder: Location | None = None) -> Location:
    """Return the path without "..", of a relative one from `folder` on, or from the working folder."""
    if folder is not None and isinstance(path, Path) and not path.is_absolute():
        path = folder / path
    return BucketPath(posixpath.normpath(path)) if isinstance(path, BucketPath) else Path(os.path.abspath(path))


def place_file(file: Path, path: Location) -> None:
    """Move a file of this process to a path, whole and at once, over another one."""
    if isinstance(path, BucketPath):
        path.upload(file)
        file.unlink()
    else:
        file.replace(path)
