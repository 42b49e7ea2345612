"""The inputs of a batch: folders, patterns, files, lists in JSON lines, tar and parquet files, as items with ids."""

from __future__ import annotations

import functools
import glob
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, cast

from ..checks import as_path, check_finite, check_float, check_int
from ..errors import InputError, first_line, invalid, short_repr
from ..image.pixel_values import PREPROCESS
from ..limits import MAX_SEED
from ..photos import is_embedding, is_image_name, natural_order
from ..pipeline.arguments import check_option
from .bucket import URL, BucketPath, Location, absolute, location

Item = dict[str, Any]
"""What one input is made from, as JSON: `id`, and a value for each of the conditions in `CHECKS`. A file is a path, or
a place within a tar or parquet file."""
SOURCES = {"image", "mix", "slerp", "regions"}
SHARED = {"negative", "init", "strength", "mask", "preprocess"}
MAX_ID = 1000  # characters
MAX_LOOSE = 10**6  # inputs that are files of their own
HEADERS = 2**16  # bytes of a tar file that are read at once, as few are needed of each member
LISTS = {".jsonl", ".ndjson"}
IMAGE_COLUMNS, ID_COLUMNS = ("image", "jpg", "png", "webp", "bytes"), ("id", "__key__", "key", "path", "file_name")


def find_items(inputs: Iterable[str | Path], shared: Item, out: Location) -> Iterator[Item]:
    """Yield the items of inputs in order, each with the conditions in `shared` that it has not itself.

    The id of a file in a folder is its path within the folder, that of a file or pattern the path as given or found,
    unless that is absolute or leads upwards: then its name. Files in `out` are none of the inputs. Raises `InputError`
    for inputs without images, and for more than `MAX_LOOSE` that are not in tar or parquet files.
    """
    loose = 0
    for given in inputs:
        path, count = location("inputs", given), 0
        if is_within(str(path), out):
            raise invalid(InputError, path, "an input outside the output folder", f"one in {out}", "use another -o")
        for item in items_of(path, shared, out):
            count, loose = count + 1, loose + (not isinstance(item.get("image"), dict))
            check_loose(path, loose)
            yield item
        if not count:
            raise invalid(InputError, path, "images", "none")


def check_loose(path: Location, count: int) -> None:
    """Raise `InputError` if inputs that are files of their own are too many."""
    if count > MAX_LOOSE:
        hint = "put the images into .tar or .parquet files, of some thousands each"
        raise invalid(InputError, path, f"up to {MAX_LOOSE:,} files", "more", hint)


@functools.lru_cache(maxsize=4096)
def is_within(path: str, folder: Location) -> bool:
    """Return whether a path is a folder, or leads into it."""
    if isinstance(folder, BucketPath) or URL.match(path):
        return BucketPath(path).is_relative_to(folder)
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def items_of(path: Location, shared: Item, out: Location) -> Iterator[Item]:
    """Yield the items of one input."""
    is_file, is_folder = kind_of_input(path)
    if is_folder:
        for name, file in remote_images(path, out) if isinstance(path, BucketPath) else images_below(path, out):
            yield {"id": name, **shared, "image": file}
    elif not is_file and glob.has_magic(str(path)):
        outside = (file for file in files_of_pattern(path) if not is_within(os.path.dirname(file), out))
        files = list(itertools.islice(outside, MAX_LOOSE + 1))
        check_loose(path, len(files))
        for file in sorted(files, key=natural_order):
            yield from items_of(location("inputs", file), shared, out)
    elif not is_file:
        raise invalid(InputError, path, "a folder, a file or a pattern", "no such file")
    elif path.suffix.lower() in LISTS:
        yield from listed_items(path, shared)
    elif path.suffix.lower() in ARCHIVES:
        whole = str(absolute(path))
        for name, place in ARCHIVES[path.suffix.lower()](path):
            place |= {"file": whole, "name": f"{path.name}/{name}"}
            yield {"id": place["name"], **shared, "image": place}
    else:
        elsewhere = path.is_absolute() or ".." in path.parts or isinstance(path, BucketPath)
        yield {"id": path.name if elsewhere else path.as_posix(), **shared, "image": str(absolute(path))}


def kind_of_input(path: Location) -> tuple[bool, bool]:
    """Return whether a path is that of a file, and that of a folder."""
    if isinstance(path, BucketPath):
        is_file = path.is_file()
        return is_file, not is_file and path.is_dir()
    return os.path.isfile(path), os.path.isdir(path)


def files_of_pattern(path: Location) -> Iterator[str]:
    """Return the files that a pattern matches."""
    if isinstance(path, BucketPath):
        return map(str, path.files(is_pattern=True))
    return filter(os.path.isfile, glob.iglob(str(path), recursive=True))


def remote_images(folder: BucketPath, out: Location) -> Iterator[tuple[str, str]]:
    """Yield what `images_below` does, for a folder in an object store."""
    found = [file.relative_to(folder) for file in folder.files() if not is_within(str(file), out)]
    visible = [path for path in found if is_image_name(path.name) and not any(part[0] == "." for part in path.parts)]
    for path in sorted(visible, key=walking_order):
        yield path.as_posix(), str(folder / path)


def walking_order(path: PurePath) -> list[Any]:
    """Return a key that sorts the files of a folder before those of its folders."""
    return [*((1, natural_order(part)) for part in path.parts[:-1]), (0, natural_order(path.name))]


def images_below(folder: Path, out: Location) -> Iterator[tuple[str, str]]:
    """Yield the path within a folder and the whole path of each image in it and in its folders, in natural order.

    Hidden files, links to folders, and `out` are left out.
    """
    root = os.path.abspath(folder)
    for place, folders, files in os.walk(root, onerror=refuse_folder):
        visible = [name for name in folders if name[0] != "." and not is_within(os.path.join(place, name), out)]
        folders[:] = sorted(visible, key=natural_order)
        within = os.path.relpath(place, root).replace(os.sep, "/")
        for name in sorted(filter(is_image_name, files), key=natural_order):
            yield (name if within == "." else f"{within}/{name}"), os.path.join(place, name)


def refuse_folder(error: OSError) -> None:
    """Raise `InputError` for a folder that cannot be read, which `os.walk` would leave out."""
    got = error.strerror or first_line(error)
    raise invalid(InputError, error.filename, "a folder that can be read", got) from error


# Lists


def listed_items(path: Location, shared: Item) -> Iterator[Item]:
    """Yield the items of a file of JSON lines; relative paths are relative to its folder."""
    folder = absolute(path).parent
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield listed_item(line, f"{path}:{number}", folder, shared)


def listed_item(line: str, name: str, folder: Location, shared: Item) -> Item:
    """Return the item of a line."""
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise invalid(InputError, name, "an object in JSON", first_line(error)) from error
    if not isinstance(item, dict):
        raise invalid(InputError, name, 'an object such as {"image": "fox.png"}', short_repr(item))
    identity = item.pop("id", item.get("image"))
    item = checked_conditions(shared | item, CHECKS.keys(), name, folder)
    if len(sources := item.keys() & SOURCES) != 1:
        raise invalid(InputError, name, f"one of {', '.join(sorted(SOURCES))}", ", ".join(sorted(sources)) or "none")
    if not isinstance(identity, str) or not 0 < len(identity) <= MAX_ID:
        raise invalid(InputError, f"{name}: id", f"a text of up to {MAX_ID} characters", short_repr(identity))
    return {"id": identity, **item}


def checked_shared(shared: Item | None) -> Item:
    """Return the conditions that all items share, with absolute paths. Raises `InputError` for a file that is missing.

    Their paths are relative to the working folder.
    """
    conditions = checked_conditions(shared or {}, SHARED, "shared", Path.cwd())
    for key in conditions.keys() & {"negative", "init", "mask"}:
        if not kind_of_input(location(key, conditions[key]))[0]:
            raise invalid(InputError, key, "a file", f"{conditions[key]}, which does not exist")
    return conditions


def checked_conditions(given: Item, known: Iterable[str], name: str, folder: Location) -> Item:
    """Return conditions sorted by key, each checked. Raises `InputError` for others than `known`."""
    if unknown := given.keys() - set(known):
        raise invalid(InputError, name, f"keys among {', '.join(sorted(known))}", short_repr(min(unknown)))
    for option, needed in {"strength": "init", "mask": "init", "augment": "image"}.items():
        if option in given and needed not in given:
            raise invalid(InputError, f"{name}: {option}", f"{needed} with it", "none")
    found = {key: CHECKS[key](f"{name}: {key}", given[key], folder) for key in sorted(given)}
    if found.get("preprocess") == "clip":  # as without it
        del found["preprocess"]
    return found


def file_value(name: str, value: Any, folder: Location) -> str:
    return str(absolute(location(name, value), folder))


def image_value(name: str, value: Any, folder: Location) -> str:
    if is_embedding(as_path(name, value)):
        raise invalid(InputError, name, "an image", f"{value}, an embedding")
    return file_value(name, value, folder)


def strength_value(name: str, value: Any, folder: Location) -> float:
    if not (strength := check_float(name, value)):
        raise invalid(InputError, name, "a number above 0, so that a step is run", short_repr(value))
    return strength


def preprocess_value(name: str, value: Any, folder: Location) -> Any:
    check_option(name, value, PREPROCESS)
    return value


def mix_value(name: str, value: Any, folder: Location) -> list[Any]:
    expected = 'weights by file, such as {"fox.png": 0.7, "panda.png": 0.3}'
    pairs = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(pairs, list) or not pairs:
        raise invalid(InputError, name, expected, short_repr(value))
    parts = [members_of(name, pair, 2, expected) for pair in pairs]
    return [[file_value(name, file, folder), check_finite(name, weight)] for file, weight in parts]


def slerp_value(name: str, value: Any, folder: Location) -> list[Any]:
    a, b, t = members_of(name, value, 3, 'two files and a fraction, such as ["fox.png", "panda.png", 0.5]')
    return [file_value(name, a, folder), file_value(name, b, folder), check_float(name, t)]


def augment_value(name: str, value: Any, folder: Location) -> list[Any]:
    amount, seed = members_of(name, value, 2, "the amount of noise and its seed, such as [0.5, 0]")
    return [check_float(name, amount), check_int(name, seed, low=0, high=MAX_SEED)]


def members_of(name: str, value: Any, count: int, expected: str) -> Sequence[Any]:
    """Return a list of this length."""
    if not isinstance(value, (list, tuple)) or len(value) != count:
        raise invalid(InputError, name, expected, short_repr(value))
    return value


def regions_value(name: str, value: Any, folder: Location) -> list[Item]:
    if not isinstance(value, list) or not value or not all(isinstance(region, dict) for region in value):
        raise invalid(InputError, name, 'a list such as [{"image": "fox.png", "mask": "left.png"}]', short_repr(value))
    return [region_value(f"{name}[{i}]", region, folder) for i, region in enumerate(value)]


def region_value(name: str, region: Item, folder: Location) -> Item:
    if "image" not in region or region.keys() - {"image", "mask", "scale"}:
        raise invalid(InputError, name, "image, and possibly mask and scale", ", ".join(sorted(region)) or "none")
    checked: Item = {"image": file_value(f"{name}.image", region["image"], folder)}
    if "mask" in region:
        checked["mask"] = image_value(f"{name}.mask", region["mask"], folder)
    if isinstance(scale := region.get("scale"), dict):
        checked["scale"] = {block: check_float(f"{name}.scale.{block}", number) for block, number in scale.items()}
    elif "scale" in region:
        checked["scale"] = check_float(f"{name}.scale", scale)
    return checked


CHECKS: dict[str, Callable[[str, Any, Location], Any]] = {
    "image": file_value,
    "mix": mix_value,
    "slerp": slerp_value,
    "augment": augment_value,
    "regions": regions_value,
    "negative": file_value,
    "init": image_value,
    "strength": strength_value,
    "mask": image_value,
    "preprocess": preprocess_value,
}
"""The conditions of an item. Each function returns a checked value as the plan has it, with absolute paths, or raises
`InputError`."""


# Archives


def tar_images(path: Location) -> Iterator[tuple[str, Item]]:
    """Yield name and place of each image in an uncompressed tar file, such as a shard of webdataset."""
    with path.open("rb", HEADERS) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while member := archive.next():
                    cast(Any, archive).members.clear()  # which would hold all of them
                    if member.isreg() and is_image_name(os.path.basename(member.name)):
                        yield member.name, {"offset": member.offset_data, "size": member.size}
        except tarfile.TarError as error:
            raise invalid(InputError, path, "an uncompressed tar file", first_line(error)) from error


def parquet_images(path: Location) -> Iterator[tuple[str, Item]]:
    """Yield name and place of each row of a parquet file with a column of images, as bytes or as datasets has them."""
    parquet = import_pyarrow(path).parquet
    try:
        file = parquet.ParquetFile(opened_parquet(path))
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        raise invalid(InputError, path, "a parquet file", first_line(error)) from error
    names = file.schema_arrow.names
    column = next((name for name in IMAGE_COLUMNS if name in names), None)
    if column is None:
        raise invalid(InputError, path, f"a column named {' or '.join(IMAGE_COLUMNS)}", ", ".join(names) or "none")
    row = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        for index, name in enumerate(parquet_names(file, group) or map(str, range(row, row + count))):
            yield name, {"group": group, "row": index, "column": column}
        row += count


def parquet_names(file: Any, group: int) -> Iterator[str] | None:
    """Return the names of the rows of a row group, of their column of ids; with `k`, as batches have it, ID-K."""
    names = file.schema_arrow.names
    key = next((name for name in ID_COLUMNS if name in names), None)
    if key is None:
        return None
    keys = [key, "k"] if key == "id" and "k" in names else [key]
    batches = file.iter_batches(row_groups=[group], columns=keys)
    columns = ([batch.column(name).to_pylist() for name in keys] for batch in batches)
    return ("-".join(map(str, values)) for batch in columns for values in zip(*batch, strict=True))


ARCHIVES: dict[str, Callable[[Location], Iterator[tuple[str, Item]]]] = {".tar": tar_images, ".parquet": parquet_images}


def opened_parquet(path: Location) -> Any:
    """Return what pyarrow reads a path from."""
    return path.open_file() if isinstance(path, BucketPath) else path


def import_pyarrow(name: Any) -> Any:
    """Return pyarrow, with its module for parquet files. Raises `InputError` that begins with `name` without it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        hint = "pip install 'imvar[parquet]'"
        raise invalid(InputError, name, "pyarrow, for parquet files", "no such package", hint) from error
    return pyarrow
