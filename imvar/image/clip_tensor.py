"""CLIPImageProcessor for images already on a device: bit-identical to the CPU path, without a copy to the host."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..config import Config
from .resize import UNIT, Taps, center_span, target_size

EXACT_FILTERS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)  # the others need sines


def supports(images: Tensor, config: Config) -> bool:
    """Return whether `preprocess_batch` can process images of this size and device under this config."""
    size = target_size(config.size, *images.shape[2:])
    can_resize = not config.do_resize or rows_first(*images.shape[2:], *size, config.resample) is not None
    return can_resize and images.device.type in ("cpu", "cuda")  # which have double precision


def preprocess_batch(images: Tensor, config: Config) -> Tensor:
    """Return uint8 images (b, 3, h, w) as pixel values (b, 3, h', w'), float32 if rescaled or normalised.

    The operations of `clip.preprocess_image`, in its order.
    """
    x = images
    if config.do_resize:
        size = target_size(config.size, *x.shape[2:])
        x = resize_batch(x, *size, config.resample, bool(rows_first(*x.shape[2:], *size, config.resample)))
    if config.do_center_crop:
        top, bottom = center_span(x.shape[2], config.crop_size["height"])
        left, right = center_span(x.shape[3], config.crop_size["width"])
        x = F.pad(x, (-left, right - x.shape[3], -top, bottom - x.shape[2]))  # negative padding crops
    if config.do_rescale:
        x = (x.double() * config.rescale_factor).float()
    if config.do_normalize:
        mean = x.new_tensor(config.image_mean, dtype=torch.float32)[:, None, None]
        std = x.new_tensor(config.image_std, dtype=torch.float32)[:, None, None]
        x = (x.float() - mean) / std
    return x


def resize_batch(images: Tensor, height: int, width: int, resample: int, vertical_first: bool) -> Tensor:
    """Resize (..., h, w) uint8 to (..., height, width) uint8 as Pillow does: one axis at a time, in fixed point.

    Double precision represents the sums of integers exactly, in any order of addition.
    """
    down, across = (
        resampling_matrix(length, resized, resample).to(images.device)
        for length, resized in zip(images.shape[-2:], (height, width), strict=True)
    )
    x = images.double()
    for vertical in (vertical_first, not vertical_first):
        sums = down @ x if vertical else x @ across.T
        x = ((sums + UNIT // 2) / UNIT).floor_().clamp_(0, 255)
    return x.to(torch.uint8)


@lru_cache
def resampling_matrix(length: int, resized: int, resample: int) -> Tensor:
    """Return the matrix (resized, length) that resamples one axis, in fixed point: integers, UNIT for 1."""
    taps = Taps(length, resized, (0, resized), resample)
    matrix = np.zeros((resized, length))
    matrix[:, taps.first : taps.last] = taps.matrix()
    return torch.from_numpy(matrix)


@lru_cache
def rows_first(height: int, width: int, new_height: int, new_width: int, resample: int) -> bool | None:
    """Return whether Pillow resizes the vertical axis first at these sizes; None if its output matches neither order.

    Pillow rounds in between, so the order shows in the output. It differs between versions, so it is measured.
    """
    if resample not in EXACT_FILTERS:
        return None
    noise = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    resized = Image.fromarray(noise).resize((new_width, new_height), Image.Resampling(resample))
    expected, pixels = torch.from_numpy(np.array(resized)), torch.from_numpy(noise)
    for first in (False, True):
        if torch.equal(resize_batch(pixels, new_height, new_width, resample, first), expected):
            return first
    return None
