"""From the items of a plan to the arguments of a call of the pipeline."""

from __future__ import annotations

import functools
import io
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..embeddings import augment, join_embeds, load_image_embeds, mix, slerp
from ..errors import CheckpointError, InputError, InputTypeError, describe, first_line, invalid, short_repr
from ..image.load_image import load_image, open_image
from ..image.mask import check_opaque
from ..photos import is_embedding
from ..pipeline import Region
from ..sources import embeds_note, note_embeds
from .bucket import BucketPath, absolute, location
from .inputs import Item, import_pyarrow, opened_parquet

BLANK = (64, 64), "white"  # of the image that fills up a call
OF_ONE = {"init", "mask", "strength", "regions"}
"""Conditions that all rows of a call share, so that a call has one item."""
OF_EMBEDS = {"mix", "slerp", "augment", "preprocess"}


@dataclass
class Condition:
    """The input of the variations of an item: a photo or its embedding (1, 1, c); `options`: other arguments."""

    photo: Image.Image | None = None
    embeds: Tensor | None = None
    negative: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)


def kind_of_item(item: Item) -> tuple[str, bool]:
    """Return what items of one call have in common: photos or embeddings, and whether they have a negative."""
    is_embeds = item.keys() & OF_EMBEDS or is_embedding_place(item.get("image"))
    return "embeds" if is_embeds else "photo", "negative" in item


def is_embedding_place(place: Any) -> bool:
    """Return whether an input is an embedding, which archives do not have."""
    return isinstance(place, str) and is_embedding(Path(place))


def open_item(item: Item, pipe: Any) -> Condition:
    """Read the files of an item. Raises `InputError` or `CheckpointError` for one that cannot be read."""
    condition = Condition()
    embed = functools.partial(read_embedding, pipe=pipe, preprocess=item.get("preprocess", "clip"))
    if "regions" in item:
        condition.options["image_embeds"] = [region_of(region, embed) for region in item["regions"]]
    elif kind_of_item(item)[0] == "embeds":
        condition.embeds = embedding_of_item(item, embed)
    else:
        condition.photo = read_place(item["image"])
    if "negative" in item:
        condition.negative = embed(item["negative"])
    if "init" in item:
        condition.options |= {"init_image": read_place(item["init"]), "strength": item.get("strength")}
    if "mask" in item:
        condition.options |= {"mask_image": read_mask_image(item["mask"]), "paste": True}
    return condition


def embedding_of_item(item: Item, embed: Callable[[Any], Tensor]) -> Tensor:
    """Return the embedding (1, 1, c) of an item. `embed`: a function that returns that of a file."""
    if "mix" in item:
        return mix([(embed(file), weight) for file, weight in item["mix"]])
    if "slerp" in item:
        a, b, fraction = item["slerp"]
        return slerp(embed(a), embed(b), fraction)
    embeds = embed(item["image"])
    return augment(embeds, item["augment"][0], [item["augment"][1]]) if "augment" in item else embeds


def region_of(region: Item, embed: Callable[[Any], Tensor]) -> Region:
    """Return a region of an item."""
    mask = read_mask_image(region["mask"]) if "mask" in region else None
    return Region(embed(region["image"]), mask, region.get("scale", 1.0))


def read_embedding(place: Any, pipe: Any, preprocess: str = "clip") -> Tensor:
    """Return the embedding (1, 1, c) in a file, or that of a photo."""
    if not is_embedding_place(place):
        embeds: Tensor = pipe.encode_image(read_place(place), preprocess=preprocess)
        return embeds
    path = location("image", place)
    if isinstance(path, BucketPath):
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, path.name)
            copy.write_bytes(path.read_bytes())
            embeds = load_image_embeds(copy)
    else:
        embeds = load_image_embeds(path)
    if len(embeds) != 1:
        raise invalid(CheckpointError, place, "one embedding (1, 1, c)", describe(embeds))
    note = embeds_note(embeds)
    return note_embeds(embeds.to(pipe.device), note.rows) if note else embeds.to(pipe.device)


def read_place(place: Any) -> Image.Image:
    """Return the image in a file, or at a place within a tar or parquet file."""
    return load_image(opened(place))


def read_mask_image(place: Any) -> Image.Image:
    """Return the image of a mask, which has to be without transparency."""
    with open_image(opened(place)) as (file, name):
        check_opaque(name, file)
    return read_place(place)


def opened(place: Any) -> Any:
    """Return a path, or the bytes at a place as a file with a name. Raises `InputError` where there are none."""
    if isinstance(place, str):
        path = location("image", place)
        return named_file(path.read_bytes(), place) if isinstance(path, BucketPath) else path
    try:
        data = read_tar(place) if "offset" in place else read_parquet(place)
    except (OSError, ValueError, LookupError, TypeError) as error:  # of files that have changed, pyarrow's among them
        raise invalid(InputError, place["name"], f"an image in {place['file']}", first_line(error)) from error
    if isinstance(data, str):
        return opened(str(absolute(location("image", data), location("image", place["file"]).parent)))
    if not isinstance(data, bytes):
        raise invalid(InputTypeError, place["name"], "the bytes of an image", short_repr(data))
    return named_file(data, place["name"])


def named_file(data: bytes, name: str) -> io.BytesIO:
    """Return bytes as a file with a name."""
    file = io.BytesIO(data)
    file.name = name
    return file


def read_tar(place: Item) -> bytes:
    """Return the bytes at a place in a tar file."""
    path, start = location("image", place["file"]), place["offset"]
    if isinstance(path, BucketPath):
        return path.read_bytes(start, start + place["size"])
    with path.open("rb") as archive:
        archive.seek(start)
        return archive.read(place["size"])


def read_parquet(place: Item) -> Any:
    """Return the bytes of an image in a parquet file, or its path: a value, or in a dictionary as datasets has them."""
    value = parquet_column(place["file"], place["group"], place["column"])[place["row"]]
    return value["bytes"] or value["path"] if isinstance(value, dict) else value


@functools.lru_cache(maxsize=2)
def parquet_column(path: str, group: int, column: str) -> Sequence[Any]:
    """Return the values of a column in a row group of a parquet file."""
    source = opened_parquet(location("image", path))
    table = import_pyarrow(path).parquet.ParquetFile(source).read_row_group(group, columns=[column])
    values: list[Any] = table.column(0).to_pylist()
    return values


def arguments_of_call(conditions: Sequence[Condition | None], seeds: Sequence[int], is_of_one: bool) -> dict[str, Any]:
    """Return the arguments of a call with a row for each condition; for None a blank one, which is thrown away.

    `is_of_one`: whether all rows are of one item, which then is encoded once.
    """
    first = next(condition for condition in conditions if condition is not None)
    shared = {name: value for name, value in first.options.items() if value is not None}
    rows = [first] if is_of_one else [condition or blank_like(first) for condition in conditions]
    arguments: dict[str, Any] = {"seed": list(seeds), **shared}
    if is_of_one:
        arguments["num_images_per_prompt"] = len(seeds)
    if first.photo is not None:
        arguments["image"] = [row.photo for row in rows]
    elif first.embeds is not None:
        arguments["image_embeds"] = join_embeds([row.embeds for row in rows if row.embeds is not None])
    if first.negative is not None:
        arguments["negative_image_embeds"] = join_embeds([row.negative for row in rows if row.negative is not None])
    return arguments


def blank_like(condition: Condition) -> Condition:
    """Return a condition of the same kind that shows nothing."""
    embeds, negative = condition.embeds, condition.negative
    return Condition(
        None if condition.photo is None else Image.new("RGB", *BLANK),
        None if embeds is None else torch.zeros_like(embeds),
        None if negative is None else torch.zeros_like(negative),
    )
