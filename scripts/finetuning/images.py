"""The images that are trained on, as tensors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from finetuning.examples import Example
from imvar.batch.bucket import BucketPath, location
from imvar.batch.conditions import is_embedding_place, read_place
from imvar.batch.inputs import Item, find_items
from imvar.errors import InputError, invalid
from imvar.image.pixel_values import pixel_format, to_pixel_values


class Images(Dataset):
    """The images of folders, files, patterns, lists, tar and parquet files, as `imvar batch` finds them.

    Each is resized so that its shorter side is `resolution`, and cropped to the centre. With `flip`, all of them follow
    once more, mirrored: an epoch then has both orientations of each image. Raises `InputError` for inputs without
    images, and for conditions other than an image.
    """

    def __init__(
        self, inputs: list[str], out: Path, pipe: Any, resolution: int, preprocess: str = "training", flip: bool = False
    ):
        self.places = [place_of(item) for item in find_items(inputs, {}, out)]
        self.resolution, self.flip = resolution, flip
        self.preprocess: Any = preprocess
        self.feature_extractor = pipe.feature_extractor

    def __len__(self) -> int:
        return len(self.places) * (1 + self.flip)

    def __getitem__(self, index: int) -> Example:
        """Return `pixels` (3, h, w) in [-1, 1] for the VAE, and `pixel_values` (3, h', w') for the image encoder.

        Raises `InputError` that names an image that cannot be read.
        """
        image = self.cropped(index)
        if self.preprocess == "clip":
            pixel_values = torch.as_tensor(self.feature_extractor(image, return_tensors="pt")["pixel_values"][0])
        else:
            pixel_values = to_pixel_values(image, self.preprocess, *pixel_format(self.feature_extractor))[0]
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # h w c -> c h w
        return {"pixels": pixels.float() / 127.5 - 1, "pixel_values": pixel_values.float()}

    def cropped(self, index: int) -> Image.Image:
        """Return an image as the VAE sees it, before it becomes a tensor."""
        is_mirrored, number = divmod(range(len(self))[index], len(self.places))
        square = (self.resolution, self.resolution)
        image = ImageOps.fit(read_place(self.places[number]), square, Image.Resampling.BICUBIC)
        return ImageOps.mirror(image) if is_mirrored else image

    def name(self, index: int) -> str:
        """Return the path of an image, or its name within a tar or parquet file."""
        place = self.places[index % len(self.places)]
        return place if isinstance(place, str) else place["name"]

    def size(self, index: int) -> int:
        """Return the bytes of an image's file, 0 where that is not known: in parquet files and object stores."""
        place = self.places[index % len(self.places)]
        if not isinstance(place, str):
            return place.get("size", 0)
        state = file_state(place)
        return state[0] if state else 0

    def states(self) -> list[str]:
        """Return a text for each image that changes with its place, and with size or time of its file."""
        files: dict[str, tuple[int, int] | None] = {}
        texts = []
        for place in self.places:
            file = place if isinstance(place, str) else place["file"]
            if file not in files:
                files[file] = file_state(file)
            texts.append(repr((place, files[file])))
        return texts + [f"mirrored {text}" for text in texts] * self.flip


def place_of(item: Item) -> Any:
    """Return the place of the image of an item, which is a path, or a dictionary within a tar or parquet file."""
    if others := item.keys() - {"id", "image"}:
        raise invalid(InputError, item["id"], "an image and no other condition, for a training", min(others))
    if is_embedding_place(item["image"]):
        raise invalid(InputError, item["id"], "an image", "an embedding")
    return item["image"]


def file_state(file: str) -> tuple[int, int] | None:
    """Return size and time of change of a file; None for one that is missing or in an object store."""
    path = location("image", file)
    if isinstance(path, BucketPath):
        return None
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
