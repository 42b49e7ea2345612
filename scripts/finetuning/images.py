"""The images that are trained on, as tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from finetuning.examples import Example
from imvar.batch.conditions import read_place
from imvar.batch.inputs import find_items
from imvar.image.pixel_values import pixel_format, to_pixel_values


class Images(Dataset):
    """The images of folders, files, patterns, tar and parquet files, as `imvar batch` finds them.

    Each is resized so that its shorter side is `resolution`, and cropped to the centre.
    """

    def __init__(self, inputs: list[str], out: Path, pipe: Any, resolution: int, preprocess: str):
        self.items = list(find_items(inputs, {}, out))
        self.resolution, self.preprocess = resolution, preprocess
        self.feature_extractor = pipe.feature_extractor

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        """Return `pixels` (3, h, w) in [-1, 1] for the VAE, and `pixel_values` (3, h', w') for the image encoder."""
        square = (self.resolution, self.resolution)
        image = ImageOps.fit(read_place(self.items[index]["image"]), square, Image.Resampling.BICUBIC)
        if self.preprocess == "clip":
            pixel_values = torch.as_tensor(self.feature_extractor(image, return_tensors="pt")["pixel_values"][0])
        else:
            pixel_values = to_pixel_values(image, self.preprocess, *pixel_format(self.feature_extractor))[0]
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*square, 3).permute(2, 0, 1)
        return {"pixels": pixels.float() / 127.5 - 1, "pixel_values": pixel_values.float()}
