"""The published model's own preprocessing for CLIP: the whole image, bicubic without antialiasing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError, InputTypeError, describe, invalid, short_repr
from .read import to_rgb

PREPROCESS = ("clip", "card", "training")  # "clip": by the feature extractor


def pixel_format(feature_extractor: Any) -> tuple[tuple[int, int], Any, Any]:
    """Return height and width, mean and standard deviation of the pixel values that a feature extractor returns."""
    with suppress(AttributeError, KeyError, TypeError):
        sides = feature_extractor.crop_size if feature_extractor.do_center_crop else feature_extractor.size
        size = int(sides["height"]), int(sides["width"])
        if feature_extractor.do_normalize:
            return size, feature_extractor.image_mean, feature_extractor.image_std
    expected = "one that returns a height and width, normalized by image_mean and image_std"
    got = "None" if feature_extractor is None else f"another {describe(feature_extractor)}"
    raise invalid(InputError, "feature_extractor", expected, got, "pass preprocess='clip'")


def to_pixel_values(
    images: Image.Image | Sequence[Image.Image],
    preprocess: Literal["card", "training"],
    size: tuple[int, int],
    mean: float | Sequence[float],
    std: float | Sequence[float],
) -> Tensor:
    """Return PIL images as the pixel values (b, 3, h, w) float32 that the model was trained with.

    `preprocess`: "card" is the code on the model card of sd-image-variations-diffusers (version 2.0), torchvision's
    `Resize(size, BICUBIC, antialias=False)` of values in [0, 1]; "training" is that of the training, which aligns the
    corners, on values in [-1, 1]. Both resize to `size`, height and width, without cropping, and normalize by `mean`
    and `std`, one number or three. Computed on the CPU.

    Raises `InputError` for images that cannot be read, or another word.
    """
    if preprocess not in ("card", "training"):
        raise invalid(InputError, "preprocess", "'card' or 'training'", short_repr(preprocess))
    batch = list(images) if isinstance(images, (list, tuple)) else [images]
    if not batch:
        raise invalid(InputTypeError, "images", "at least one PIL image", f"an empty {type(images).__name__}")
    mean_, std_ = (torch.from_numpy(np.array(values, np.float32).reshape(-1, 1, 1)) for values in (mean, std))
    pixel_values = []
    for i, image in enumerate(batch):
        name = f"images[{i}]" if isinstance(images, (list, tuple)) else "images"
        if not isinstance(image, Image.Image):
            hint = f"with preprocess={preprocess!r}, convert it by PIL.Image.fromarray"
            raise invalid(InputTypeError, name, "a PIL image", describe(image), hint)
        pixels = np.array(to_rgb(image, name))  # h w 3
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous().float() / 255
        if preprocess == "card":
            x = F.interpolate(x, size=size, mode="bicubic", align_corners=False, antialias=False)
        else:
            x = F.interpolate(2 * x - 1, size=size, mode="bicubic", align_corners=True, antialias=False)
            x = (x + 1) / 2
        pixel_values.append((x - mean_) / std_)
    return torch.cat(pixel_values)
