"""The inputs of a batch: folders, patterns, files, lists in JSON lines, tar and parquet files, as items with ids."""

from __future__ import annotations

import glob
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..checks import as_path
from ..errors import InputError, first_line, invalid, short_repr
from ..photos import SUFFIXES, natural_order

Item = dict[str, Any]
"""What one input is made from, as JSON: `id`, and a file (a path, or a place within a tar or parquet file) for each of
the conditions in `CONDITIONS`."""
CONDITIONS = {"image", "mix", "slerp", "augment", "regions", "negative", "init", "strength", "mask"}
MAX_ID = 1000  # characters
LISTS = {".jsonl", ".ndjson"}
IMAGE_COLUMNS, ID_COLUMNS = ("image", "jpg", "png", "webp", "bytes"), ("id", "__key__", "key", "path", "file_name")


def find_items(inputs: Sequence[str | Path], shared: Item | None = None) -> Iterator[Item]:
    """Yield the items of inputs in order, each with the conditions in `shared` that it has not itself.

    The id of a file in a folder is its path within the folder, that of a file or pattern the path as given or found,
    unless that is absolute or leads upwards: then its name. Raises `InputError` for inputs without images.
    """
    for given in inputs:
        path, count = as_path("inputs", given), 0
        for item in items_of(path):
            count += 1
            yield {**(shared or {}), **item}
        if not count:
            raise invalid(InputError, path, "images", "none")


def items_of(path: Path) -> Iterable[Item]:
    """Return the items of one input."""
    if path.is_dir():
        return [{"id": name, "image": file} for name, file in images_below(path)]
    if not path.exists() and glob.has_magic(str(path)):
        files = sorted(
            filter(os.path.isfile, glob.glob(str(path), recursive=True)), key=lambda f: natural_order(Path(f))
        )
        return [item for file in files for item in items_of(Path(file))]
    if not path.is_file():
        raise invalid(InputError, path, "a folder, a file or a pattern", "no such file")
    read = {**dict.fromkeys(LISTS, listed_items), ".tar": tar_items, ".parquet": parquet_items}.get(path.suffix.lower())
    if read:
        return read(path)
    outside = path.is_absolute() or ".." in path.parts
    return [{"id": path.name if outside else path.as_posix(), "image": os.path.abspath(path)}]


def images_below(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the path within a folder and the whole path of each image in it and in its folders, in natural order."""
    root = os.path.abspath(folder)
    for place, folders, files in os.walk(root):
        folders[:] = sorted((name for name in folders if name[0] != "."), key=lambda name: natural_order(Path(name)))
        within = os.path.relpath(place, root).replace(os.sep, "/")
        names = (name for name in files if name[0] != "." and os.path.splitext(name)[1].lower() in SUFFIXES)
        for name in sorted(names, key=lambda name: natural_order(Path(name))):
            yield (name if within == "." else f"{within}/{name}"), os.path.join(place, name)


# Lists


def listed_items(path: Path) -> Iterator[Item]:
    """Yield the items of a file of JSON lines; relative paths are relative to its folder."""
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield listed_item(line, f"{path}:{number}", Path(os.path.abspath(path)).parent)


def listed_item(line: str, name: str, folder: Path) -> Item:
    """Return the item of a line."""
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise invalid(InputError, name, "an object in JSON", first_line(error)) from error
    if not isinstance(item, dict):
        raise invalid(InputError, name, 'an object such as {"image": "fox.png"}', short_repr(item))
    if unknown := item.keys() - CONDITIONS - {"id"}:
        raise invalid(InputError, name, f"id, {', '.join(sorted(CONDITIONS))}", short_repr(min(unknown)))
    sources = item.keys() & {"image", "mix", "slerp", "regions"}
    if len(sources) != 1:
        raise invalid(InputError, name, "one of image, mix, slerp and regions", ", ".join(sorted(sources)) or "none")
    for needed, by in {"init": ("strength", "mask"), "image": ("augment",)}.items():
        for option in by:
            if option in item and needed not in item:
                raise invalid(InputError, name, f"{needed} with {option}", "none")
    check = Checker(name, folder)
    checks = {
        "image": check.file_value,
        "mix": check.mix_value,
        "slerp": check.slerp_value,
        "augment": check.augment_value,
        "regions": check.regions_value,
        "negative": check.file_value,
        "init": check.file_value,
        "strength": check.number_value,
        "mask": check.file_value,
    }
    found = {key: checks[key](key, item[key]) for key in item.keys() & CONDITIONS}
    identity = item.get("id", item.get("image"))
    if not isinstance(identity, str) or not 0 < len(identity) <= MAX_ID:
        raise invalid(InputError, f"{name}: id", f"text of up to {MAX_ID} characters", short_repr(identity))
    return {"id": identity, **{key: found[key] for key in sorted(found)}}


class Checker:
    """Checks the values of a line of a list, and makes their paths absolute."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder

    def wrong(self, key: str, expected: str, value: Any) -> InputError:
        return invalid(InputError, f"{self.name}: {key}", expected, short_repr(value))

    def file_value(self, key: str, value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise self.wrong(key, "the path of a file", value)
        return os.path.abspath(self.folder / value)

    def number_value(self, key: str, value: Any) -> float:
        if type(value) not in (int, float) or not abs(value) < float("inf"):
            raise self.wrong(key, "a finite number", value)
        return float(value)

    def mix_value(self, key: str, value: Any) -> list[Any]:
        pairs = list(value.items()) if isinstance(value, dict) else value
        if (
            not isinstance(pairs, list)
            or not pairs
            or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs)
        ):
            raise self.wrong(key, 'weights by file, such as {"fox.png": 0.7, "panda.png": 0.3}', value)
        return [[self.file_value(key, file), self.number_value(key, weight)] for file, weight in pairs]

    def slerp_value(self, key: str, value: Any) -> list[Any]:
        if not isinstance(value, list) or len(value) != 3:
            raise self.wrong(key, 'two files and a fraction, such as ["fox.png", "panda.png", 0.5]', value)
        return [self.file_value(key, value[0]), self.file_value(key, value[1]), self.number_value(key, value[2])]

    def augment_value(self, key: str, value: Any) -> list[Any]:
        if not isinstance(value, list) or len(value) != 2 or type(value[1]) is not int:
            raise self.wrong(key, "the amount of noise and its seed, such as [0.5, 0]", value)
        return [self.number_value(key, value[0]), value[1]]

    def regions_value(self, key: str, value: Any) -> list[Item]:
        if not isinstance(value, list) or not value or not all(isinstance(region, dict) for region in value):
            raise self.wrong(key, 'a list such as [{"image": "fox.png", "mask": "left.png"}]', value)
        regions = []
        for region in value:
            if "image" not in region or region.keys() - {"image", "mask", "scale"}:
                raise self.wrong(key, "image, mask and scale", sorted(region))
            files = {name: self.file_value(key, region[name]) for name in region.keys() & {"image", "mask"}}
            scale = {"scale": region["scale"]} if "scale" in region else {}
            regions.append({**dict(sorted(files.items())), **scale})
        return regions


# Archives


def tar_items(path: Path) -> Iterator[Item]:
    """Yield an item for each image in an uncompressed tar file, such as a shard of webdataset."""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile() and os.path.splitext(member.name)[1].lower() in SUFFIXES:
                    place = {"file": os.path.abspath(path), "offset": member.offset_data, "size": member.size}
                    yield {"id": f"{path.name}/{member.name}", "image": place | {"name": member.name}}
    except tarfile.TarError as error:
        raise invalid(InputError, path, "an uncompressed tar file", first_line(error)) from error


def parquet_items(path: Path) -> Iterator[Item]:
    """Yield an item for each row of a parquet file with a column of images, as bytes or as datasets has them."""
    parquet = import_parquet(path)
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        raise invalid(InputError, path, "a parquet file", first_line(error)) from error
    names = file.schema_arrow.names
    column = next((name for name in IMAGE_COLUMNS if name in names), None)
    if column is None:
        raise invalid(InputError, path, f"a column named {' or '.join(IMAGE_COLUMNS)}", ", ".join(names) or "none")
    key = next((name for name in ID_COLUMNS if name in names), None)
    row = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        keys = file.read_row_group(group, columns=[key]).column(0).to_pylist() if key else range(row, row + count)
        for index, value in enumerate(keys):
            place = {"file": os.path.abspath(path), "group": group, "row": index, "column": column}
            yield {"id": f"{path.name}/{value}", "image": place | {"name": f"{path.name}/{value}"}}
        row += count


def import_parquet(path: Any) -> Any:
    """Return pyarrow's module for parquet files."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise invalid(InputError, path, "pyarrow, to read parquet", "no such package", "pip install pyarrow") from error
    return pyarrow.parquet
