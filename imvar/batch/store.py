"""The output folder of a batch: whole files, the markers of finished shards, and the rows beside them.

plan/                       the plan, see `planning.py` and `environment.py`
images/0000/0000042/        the images of shard 42, or
shards/0000/0000042.tar     the same as one file, .tar or .parquet
rows/0000/0000042.jsonl     a line for each image, and for each input that could not be read
done/0000/0000042.json      the marker of the shard, written last
manifest.jsonl              all rows of images, once all shards are done
errors.jsonl                all rows of errors
workers/, claims/, journal/ of the present processes, see `workers.py` and `journal.py`

In an object store, files are put whole, and there are neither workers/ nor claims/: see `bucket.py`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..atomic.file import sync
from ..errors import ImvarError, invalid
from ..text import format_bytes
from .bucket import BucketPath, Location, place_file
from .processes import process_name

T = TypeVar("T")

Row = dict[str, Any]
"""Of an image: `id`, `k`, `seed`, `file`, `sha256`, `flagged`, `bad_concepts`; or of an error: `id` and `error`."""
GROUP = 1000  # shards in a folder
FULL = (errno.ENOSPC, errno.EDQUOT)
MORE_ROOM = "make room; the same command goes on"
TEMPORARY = "imvar-batch-"  # and the name of the process, where its files are before they go to an object store
READERS, READ_AHEAD = 16, 1024  # threads that read an object store, and shards that they read at once
ATTEMPTS = 100  # at a file in a folder that other processes remove when it is empty


class FullDiskError(ImvarError, OSError):
    """The disk is full, or the quota exhausted."""


def full_disk_text(path: Path, number: int, needed: int | None = None) -> str:
    """Return the text of an error of the system, with what is free at a path, and what is missing of `needed` bytes."""
    free = free_bytes(path)
    text = f"{os.strerror(number)}, {format_bytes(free)} free"
    return text if needed is None else f"{text}, about {format_bytes(max(0, needed - free))} more are needed"


def free_bytes(path: Path) -> int:
    """Return how many bytes this user may still write to the file system of a path; 0 if that is unknown."""
    try:
        return shutil.disk_usage(path if path.exists() else path.parent).free
    except OSError:
        return 0


@dataclass(frozen=True)
class Marker:
    """The statement that a shard is finished: the digest of its part of the plan and of its rows, and counts.

    `data`: the digest of the shard's tar or parquet file, if it is one; `bytes`: of its images.
    """

    shard: int
    plan: str
    rows: str
    made: int
    errors: int
    flagged: int
    bytes: int
    data: str | None = None

    def json_text(self) -> str:
        """Return the marker with a digest of itself."""
        text = json.dumps(vars(self), sort_keys=True)
        return json.dumps(vars(self) | {"sha256": sha256(text.encode())}, sort_keys=True) + "\n"

    @classmethod
    def from_bytes(cls, data: Any) -> Marker | None:
        """Return the marker in a file; None if it is not whole."""
        try:
            content = json.loads(data)
            digest, marker = content.pop("sha256"), cls(**content)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        return marker if marker.json_text().encode() == data and digest else None


class Store:
    """The output folder of a batch. `temporary`: where the files of this process are until they are whole."""

    def __init__(self, folder: Location, temporary: Path | None = None):
        self.folder = folder
        if temporary is None:
            workers = Path(tempfile.gettempdir()) if isinstance(folder, BucketPath) else folder / "workers"
            prefix = TEMPORARY if isinstance(folder, BucketPath) else ""
            temporary = workers / f"{prefix}{process_name()}"
        self.temporary = temporary

    @property
    def disk(self) -> Path:
        """A folder of the disk that files are written to at first."""
        return self.temporary if isinstance(self.folder, BucketPath) else self.folder

    def remove_temporary(self) -> None:
        """Remove the temporary files, and a folder of workers that is empty then."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        if isinstance(self.folder, Path):
            with suppress(OSError):  # there are other workers
                self.temporary.parent.rmdir()

    def path(self, kind: str, number: int, suffix: str = "") -> Location:
        """Return the path of the rows, the marker, the images or the one file of a shard."""
        return self.folder / kind / f"{number // GROUP:04d}" / f"{number:07d}{suffix}"

    def put(self, path: Location, data: bytes | Iterable[bytes]) -> None:
        """Write a file whole, or not at all, from its content or parts of it; `flush_files` flushes it to the disk."""
        temporary = self.temporary / os.urandom(8).hex()
        with self.explain_full_disk():
            try:
                with in_folder(temporary, lambda: temporary.open("wb")) as file:
                    file.writelines([data] if isinstance(data, bytes) else data)
                in_folder(path, lambda: place_file(temporary, path))
            except OSError:
                with suppress(OSError):
                    temporary.unlink()
                raise

    @contextmanager
    def explain_full_disk(self, path: Location | None = None) -> Iterator[None]:
        """Convert the error of a full disk in the block, or of an exhausted quota, to a `FullDiskError`."""
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            got = full_disk_text(self.disk, error.errno)
            raise invalid(FullDiskError, path or self.disk, "room on the disk", got, MORE_ROOM) from error

    def flush_files(self, paths: Iterable[Location]) -> None:
        """Flush files to the disk, and the folders that lead to them. An object store has done so."""
        folders: set[Path] = set()
        with self.explain_full_disk():
            for path in paths:
                if isinstance(path, BucketPath):
                    continue
                sync(path)
                folders |= {folder for folder in path.parents if folder.is_relative_to(self.folder)}
            for folder in folders:
                sync(folder)

    def map(self, function: Callable[[int], T], numbers: Sequence[int]) -> Iterator[T]:
        """Yield `function` of each number, in order; with an object store by threads, as each waits for answers."""
        if not isinstance(self.folder, BucketPath):
            yield from map(function, numbers)
            return
        with ThreadPoolExecutor(READERS) as pool:
            for start in range(0, len(numbers), READ_AHEAD):
                yield from pool.map(function, numbers[start : start + READ_AHEAD])

    # Shards

    def finish_shard(self, marker: Marker, rows: Sequence[Row], files: Sequence[Location]) -> None:
        """Write the rows and, after everything is on the disk, the marker of a shard."""
        path, done = self.path("rows", marker.shard, ".jsonl"), self.path("done", marker.shard, ".json")
        self.put(path, rows_as_bytes(rows))
        self.flush_files([*files, path])
        self.put(done, marker.json_text().encode())
        self.flush_files([done])

    def done(self) -> set[int]:
        """Return the numbers of the shards that have a marker, which is not read."""
        numbers = set()
        for group in listed(self.folder / "done"):
            numbers |= {int(name[:-5]) for name in listed(self.folder / "done" / group) if is_marker_name(name)}
        return numbers

    def is_done(self, number: int) -> bool:
        """Return whether a shard has a marker."""
        return self.path("done", number, ".json").exists()

    def marker(self, number: int) -> Marker | None:
        """Return the marker of a shard; None if there is none, or a broken one, or one of another shard."""
        try:
            marker = Marker.from_bytes(self.path("done", number, ".json").read_bytes())
        except OSError:
            return None
        return marker if marker and marker.shard == number else None

    def row_lines(self, marker: Marker) -> list[bytes] | None:
        """Return the rows of a shard as lines of JSON, errors last; None unless they are those of the marker."""
        try:
            data = self.path("rows", marker.shard, ".jsonl").read_bytes()
        except OSError:
            return None
        return data.splitlines() if sha256(data) == marker.rows else None

    def shard_rows(self, marker: Marker) -> list[Row] | None:
        """Return the rows of a shard; None unless they are those of the marker."""
        lines = self.row_lines(marker)
        return None if lines is None else [json.loads(line) for line in lines]

    def reopen(self, number: int) -> None:
        """Remove the marker of a shard, so that it is made again."""
        self.path("done", number, ".json").unlink(missing_ok=True)


def in_folder(path: Location, act: Callable[[], T]) -> T:
    """Create the folder of a path and return `act()`; again if another process has removed the folder in between."""
    for _ in range(ATTEMPTS):
        with suppress(FileNotFoundError, FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return act()
    return act()


def is_marker_name(name: str) -> bool:
    """Return whether a file is the marker of a shard, by its name."""
    return name.endswith(".json") and name[:-5].isdecimal()


def listed(folder: Location) -> list[str]:
    """Return the names in a folder, sorted; none if it does not exist."""
    if isinstance(folder, BucketPath):
        return folder.names()
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def rows_as_bytes(rows: Sequence[Row]) -> bytes:
    """Return rows as JSON lines."""
    return b"".join(json.dumps(row, separators=(",", ":")).encode() + b"\n" for row in rows)


def sha256(data: bytes) -> str:
    """Return a digest in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Location) -> str | None:
    """Return the digest of a file; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def json_lines(path: Location) -> Iterator[Any]:
    """Yield the whole lines of a file that a killed process may have left; none if it does not exist."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return
    for line in lines:
        with suppress(ValueError):
            if line.endswith(b"\n"):
                yield json.loads(line)
