"""Where the images of a shard go: into a folder of files, or into one tar file that webdataset reads."""

from __future__ import annotations

import io
import os
import re
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..photos import SUFFIXES, unique_names
from ..records.files import write_image
from .inputs import Item
from .store import Row, Store, file_sha256, listed, rows_as_bytes, sha256

MAX_STEM = 64  # bytes; with its numbers and suffix a name fits into the 100 of a tar file
NOT_IN_NAMES = re.compile(r"[^\w+=@~^-]")  # dots neither: webdataset ends a name at its first


class FolderWriter:
    """Writes each image to a file of its own."""

    def __init__(self, store: Store, number: int):
        self.store, self.folder = store, store.path("images", number)

    def add(self, name: str, data: bytes) -> Row:
        """Write an image, and return where it is, for its row."""
        self.store.put(self.folder / name, data)
        return {"file": (self.folder / name).relative_to(self.store.folder).as_posix()}

    def assemble(self, rows: Sequence[Row]) -> tuple[list[Path], str | None]:
        """Return the files of the rows, and no digest; files of earlier attempts that are none of them are removed."""
        paths = [self.store.folder / row["file"] for row in rows]
        for name in set(listed(self.folder)) - {path.name for path in paths}:
            (self.folder / name).unlink(missing_ok=True)
        return paths, None


class TarWriter:
    """Writes the images of a shard, each with its row, to a tar file that depends on nothing else."""

    def __init__(self, store: Store, number: int):
        self.store, self.path = store, store.path("shards", number, ".tar")
        self.staged = store.temporary / f"{number:07d}"

    def add(self, name: str, data: bytes) -> Row:
        """Keep an image until the end, and return where it will be, for its row."""
        self.store.put(self.staged / name, data)
        return {"file": self.path.relative_to(self.store.folder).as_posix(), "member": name}

    def assemble(self, rows: Sequence[Row]) -> tuple[list[Path], str | None]:
        """Write the images of the rows and, as NAME.json, the rows; return the file and its digest."""
        temporary = self.store.temporary / f"{self.path.name}"
        with self.store.explain_full_disk(self.path):
            self.store.temporary.mkdir(parents=True, exist_ok=True)
            with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
                for row in rows:
                    name = row["member"]
                    append(archive, name, (self.staged / name).read_bytes())
                    append(archive, f"{name.partition('.')[0]}.json", rows_as_bytes([row]))
            digest = file_sha256(temporary)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, self.path)
        shutil.rmtree(self.staged, ignore_errors=True)
        return [self.path], digest


def append(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a file to an archive, with time, user and group 0."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def stems_of(items: Sequence[Item]) -> list[str]:
    """Return a name for the files of each item of a shard: its id without suffix, with _ for what names cannot have."""
    return unique_names([stem_of_id(item["id"]) for item in items])


def stem_of_id(identity: str) -> str:
    """Return the name that an id would give a file."""
    stem, suffix = os.path.splitext(identity)
    stem = stem if suffix.lower() in SUFFIXES | {".safetensors"} else identity
    name = NOT_IN_NAMES.sub("_", stem).encode()
    if len(name) <= MAX_STEM:
        return name.decode()
    digest = sha256(identity.encode(errors="surrogatepass"))[:16]
    return f"{name[: MAX_STEM - 17].decode(errors='ignore')}-{digest}"


def image_bytes(image: Any, record: Any, format: str) -> bytes:
    """Return the file of an image, with its record if there is one."""
    buffer = io.BytesIO()
    write_image(image, buffer, record=record, format=format)
    return buffer.getvalue()
