"""From the items of a plan to the arguments of a call of the pipeline."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..embeddings import augment, load_image_embeds, mix, slerp
from ..errors import CheckpointError, describe, invalid
from ..image.load_image import load_image, open_image
from ..image.mask import check_opaque
from ..photos import is_embedding
from ..pipeline import Region
from ..sources import embeds_note, note_embeds
from .inputs import Item, import_parquet

BLANK = (64, 64), "white"  # of the image that fills up a call
OF_ONE = {"init", "mask", "strength", "regions"}
"""Conditions that all rows of a call share, so that a call has one item."""
OF_EMBEDS = {"mix", "slerp", "augment"}


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
    if "regions" in item:
        condition.options["image_embeds"] = [region_of(region, pipe) for region in item["regions"]]
    elif kind_of_item(item)[0] == "embeds":
        condition.embeds = embedding_of_item(item, pipe)
    else:
        condition.photo = read_place(item["image"])
    if "negative" in item:
        condition.negative = read_embedding(item["negative"], pipe)
    if "init" in item:
        condition.options["init_image"] = read_place(item["init"])
        condition.options["strength"] = item.get("strength")
    if "mask" in item:
        condition.options |= {"mask_image": read_mask_image(item["mask"]), "paste": True}
    return condition


def embedding_of_item(item: Item, pipe: Any) -> Tensor:
    """Return the embedding (1, 1, c) of an item."""
    if "mix" in item:
        return mix([(read_embedding(file, pipe), weight) for file, weight in item["mix"]])
    if "slerp" in item:
        a, b, fraction = item["slerp"]
        return slerp(read_embedding(a, pipe), read_embedding(b, pipe), fraction)
    embeds = read_embedding(item["image"], pipe)
    return augment(embeds, item["augment"][0], [item["augment"][1]]) if "augment" in item else embeds


def read_embedding(place: Any, pipe: Any) -> Tensor:
    """Return the embedding (1, 1, c) in a file, or that of a photo."""
    if not is_embedding_place(place):
        embeds: Tensor = pipe.encode_image(read_place(place))
        return embeds
    embeds = load_image_embeds(place)
    if len(embeds) != 1:
        raise invalid(CheckpointError, place, "one embedding (1, 1, c)", describe(embeds))
    return embeds.to(pipe.device)


def region_of(region: Item, pipe: Any) -> Region:
    """Return a region of an item."""
    mask = read_mask_image(region["mask"]) if "mask" in region else None
    return Region(read_embedding(region["image"], pipe), mask, region.get("scale", 1.0))


def read_place(place: Any) -> Image.Image:
    """Return the image in a file, or at a place within a tar or parquet file."""
    return load_image(opened(place))


def read_mask_image(place: Any) -> Image.Image:
    """Return the image of a mask, which has to be without transparency."""
    with open_image(opened(place)) as (file, name):
        check_opaque(name, file)
    return read_place(place)


def opened(place: Any) -> Any:
    """Return a path, or the bytes at a place as a file with a name."""
    if isinstance(place, str):
        return Path(place)
    if "offset" in place:
        with open(place["file"], "rb") as archive:
            archive.seek(place["offset"])
            data = archive.read(place["size"])
    else:
        value = parquet_column(place["file"], place["group"], place["column"])[place["row"]]
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None and isinstance(value, dict) and value.get("path"):
            return Path(place["file"]).parent / value["path"]
        data = content if isinstance(content, bytes) else b""
    file = io.BytesIO(data)
    file.name = place["name"]
    return file


@functools.lru_cache(maxsize=2)
def parquet_column(path: str, group: int, column: str) -> Sequence[Any]:
    """Return the values of a column in a row group of a parquet file."""
    table = import_parquet(path).ParquetFile(path).read_row_group(group, columns=[column])
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
        arguments["image_embeds"] = joined([row.embeds for row in rows])
    if first.negative is not None:
        arguments["negative_image_embeds"] = joined([row.negative for row in rows])
    return arguments


def blank_like(condition: Condition) -> Condition:
    """Return a condition of the same kind that shows nothing."""
    embeds, negative = condition.embeds, condition.negative
    return Condition(
        None if condition.photo is None else Image.new("RGB", *BLANK),
        None if embeds is None else torch.zeros_like(embeds),
        None if negative is None else torch.zeros_like(negative),
    )


def joined(embeds: Sequence[Any]) -> Tensor:
    """Return embeddings (1, 1, c) as one tensor (b, 1, c), with the notes of where they come from."""
    tensor: Tensor = embeds[0]
    if len(embeds) == 1:
        return tensor
    tensor, notes = torch.cat(list(embeds)), [embeds_note(each) for each in embeds]
    encoders = {note.encoder for note in notes if note and note.encoder}
    if len(encoders) > 1:
        return tensor
    rows = [note.rows[0] if note else [] for note in notes]
    note_embeds(tensor, rows, next(iter(encoders), None))
    return tensor
