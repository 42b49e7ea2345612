"""What CLIPImageProcessor makes of pictures, for such as lie on a device: the same to the bit, and they stay there."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..config import Config
from .resize import UNIT, Taps, center_span, target_size

EXACT_FILTERS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)  # the others ask for sines


def supports(levels: Tensor, settings: Config) -> bool:
    """Whether `prepare` can do what these settings ask for, and where the pictures lie."""
    size = target_size(settings.size, *levels.shape[2:])
    known = not settings.do_resize or rows_first(*levels.shape[2:], *size, settings.resample) is not None
    return known and levels.device.type in ("cpu", "cuda")  # which know double precision


def preprocess_batch(levels: Tensor, settings: Config) -> Tensor:
    """(b, 3, h, w) uint8 to pixel values (b, 3, h', w'), float32 if they are rescaled or normalised."""
    s, x = settings, levels
    if s.do_resize:
        x = resize_batch(x, *target_size(s.size, *x.shape[2:]), s.resample)
    if s.do_center_crop:
        (top, bottom), (left, right) = (
            center_span(n, s.crop_size[name]) for n, name in zip(x.shape[2:], ("height", "width"), strict=True)
        )
        x = F.pad(x, (-left, right - x.shape[3], -top, bottom - x.shape[2]))  # less than 0 cuts off
    if s.do_rescale:
        x = (x.double() * s.rescale_factor).float()
    if s.do_normalize:
        mean, std = (x.new_tensor(values, dtype=torch.float32)[:, None, None] for values in (s.image_mean, s.image_std))
        x = (x.float() - mean) / std
    return x


def resize_batch(levels: Tensor, height: int, width: int, resample: int) -> Tensor:
    """(b, 3, h, w) uint8 -> (b, 3, height, width) uint8, as Pillow does it: one axis after the other, in whole numbers.

    Double precision holds the sums of whole numbers exactly, in whatever order they are added.
    """
    h, w = levels.shape[2:]
    across = resampling_matrix(w, width, resample).to(levels.device)
    down = resampling_matrix(h, height, resample).to(levels.device)
    if rows_first(h, w, height, width, resample):
        return round_fixed_point(round_fixed_point(down @ levels.double()) @ across.T).to(torch.uint8)
    return round_fixed_point(down @ round_fixed_point(levels.double() @ across.T)).to(torch.uint8)


def round_fixed_point(sums: Tensor) -> Tensor:
    return ((sums + UNIT // 2) / UNIT).floor_().clamp_(0, 255)


@lru_cache
def resampling_matrix(length: int, resized: int, resample: int) -> Tensor:
    """(resized, length) whole numbers, UNIT standing for 1: how much of each pixel goes into each."""
    taps = Taps(length, resized, (0, resized), resample)
    made = np.zeros((resized, length))
    made[:, taps.first : taps.last] = taps.matrix()
    return torch.from_numpy(made)


@lru_cache
def rows_first(height: int, width: int, new_height: int, new_width: int, resample: int) -> bool | None:
    """Whether Pillow blends rows before columns for these sizes; None if its answer is neither.

    It rounds in between, so this shows, and what it depends on differs from version to version. So it is asked.
    """
    if resample not in EXACT_FILTERS:
        return None
    noise = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    resized = Image.fromarray(noise).resize((new_width, new_height), Image.Resampling(resample))
    answer = torch.from_numpy(np.array(resized)).double()
    across, down = resampling_matrix(width, new_width, resample), resampling_matrix(height, new_height, resample)
    pixels = torch.from_numpy(noise).double()
    if torch.equal(round_fixed_point(down @ round_fixed_point(pixels @ across.T)), answer):
        return False
    return True if torch.equal(round_fixed_point(round_fixed_point(down @ pixels) @ across.T), answer) else None
