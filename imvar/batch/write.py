"""Where the images of a shard go: into a folder, or into one file, tar for webdataset or parquet for datasets."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from ..photos import SUFFIXES, unique_names
from ..records.files import write_image
from .bucket import Location, place_file
from .inputs import Item, import_pyarrow
from .store import Row, Store, file_sha256, listed, rows_as_bytes, sha256

MAX_STEM = 64  # bytes; with its numbers and suffix a name fits into the 100 of a tar file
ROW_GROUP = 100  # images, which readers have in memory together
NOT_IN_NAMES = re.compile(r"[^\w+=@~^-]")  # dots neither: webdataset ends a name at its first


class FolderWriter:
    """Writes each image to a file of its own."""

    def __init__(self, store: Store, number: int):
        self.store, self.folder = store, store.path("images", number)

    def add(self, name: str, data: bytes) -> Row:
        """Write an image, and return where it is, for its row."""
        self.store.put(self.folder / name, data)
        return {"file": (self.folder / name).relative_to(self.store.folder).as_posix()}

    def assemble(self, rows: Sequence[Row]) -> tuple[list[Location], str | None]:
        """Return the files of the rows, and no digest; files of earlier attempts that are none of them are removed."""
        paths: list[Location] = [self.store.folder / row["file"] for row in rows]
        for name in set(listed(self.folder)) - {path.name for path in paths}:
            (self.folder / name).unlink(missing_ok=True)
        return paths, None


class ShardWriter:
    """Writes the images of a shard, each with its row, to one file that depends on nothing else."""

    def __init__(self, store: Store, number: int, format: str):
        self.store, self.path, self.write = store, store.path("shards", number, f".{format}"), WRITE[format]
        self.staged = store.temporary / f"{number:07d}"

    def add(self, name: str, data: bytes) -> Row:
        """Keep an image until the end, and return where it will be, for its row."""
        self.store.put(self.staged / name, data)
        return {"file": self.path.relative_to(self.store.folder).as_posix(), "member": name}

    def assemble(self, rows: Sequence[Row]) -> tuple[list[Location], str | None]:
        """Write the images of the rows and the rows; return the file and its digest."""
        temporary = self.store.temporary / f"{self.path.name}"
        with self.store.explain_full_disk(self.path):
            self.store.temporary.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                self.write(file, ((row, (self.staged / row["member"]).read_bytes()) for row in rows))
            digest = file_sha256(temporary)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            place_file(temporary, self.path)
        shutil.rmtree(self.staged, ignore_errors=True)
        return [self.path], digest


def writer_of(format: str, store: Store, number: int) -> FolderWriter | ShardWriter:
    """Return a writer of the images of a shard: "files", "tar" or "parquet"."""
    return FolderWriter(store, number) if format == "files" else ShardWriter(store, number, format)


def write_tar(file: BinaryIO, images: Iterator[tuple[Row, bytes]]) -> None:
    """Write images, and their rows as NAME.json, to a tar file."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for row, data in images:
            name = row["member"]
            append(archive, name, data)
            append(archive, f"{name.partition('.')[0]}.json", rows_as_bytes([row]))


def append(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a file to an archive, with time, user and group 0."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def write_parquet(file: BinaryIO, images: Iterator[tuple[Row, bytes]]) -> None:
    """Write images and their rows to a parquet file, whose column `image` datasets shows as images.

    Bytes are equal for equal rows and one version of pyarrow: nothing but that decides on row groups and encodings.
    """
    pyarrow = import_pyarrow("format")
    schema = pyarrow.schema([(name, kind(pyarrow)) for name, kind in COLUMNS.items()], metadata=METADATA)
    with pyarrow.parquet.ParquetWriter(file, schema, compression="none", use_dictionary=False) as writer:
        while rows := [columns_of(row, data) for row, data in itertools.islice(images, ROW_GROUP)]:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def columns_of(row: Row, data: bytes) -> Row:
    """Return the values of the columns of an image; ids that are no Unicode have escapes."""
    text = row["id"].encode(errors="backslashreplace").decode()
    return {**row, "id": text, "image": {"bytes": data, "path": row["member"]}}


COLUMNS: dict[str, Callable[[Any], Any]] = {
    "id": lambda pyarrow: pyarrow.string(),
    "k": lambda pyarrow: pyarrow.int64(),
    "seed": lambda pyarrow: pyarrow.int64(),
    "image": lambda pyarrow: pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
    "sha256": lambda pyarrow: pyarrow.string(),
    "flagged": lambda pyarrow: pyarrow.bool_(),
    "bad_concepts": lambda pyarrow: pyarrow.list_(pyarrow.int64()),
}
METADATA = {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})}
WRITE: dict[str, Callable[[BinaryIO, Iterator[tuple[Row, bytes]]], None]] = {"tar": write_tar, "parquet": write_parquet}


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
