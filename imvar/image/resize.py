"""Resizing as Pillow does it, bit for bit, of no more of the picture than survives the crop."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from ..errors import InputError

MAX_ENLARGED_TO_KEPT = 64  # times the kept area: an enlarged picture beyond this is never made whole
MAX_RESIZED_PIXELS = 1 << 28  # pixels of a resized picture that is made whole
UNIT = 1 << 22  # Pillow's weights are whole numbers, this one standing for 1


def target_size(size: Mapping[str, int], height: int, width: int) -> tuple[int, int]:
    """Height and width after resizing; under "shortest_edge" the long side is cut to a whole number."""
    if "height" in size:
        return size["height"], size["width"]
    short = size["shortest_edge"]
    return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)


def center_span(length: int, crop: int) -> tuple[int, int]:
    """Where a centred crop begins and ends; outside 0..length where the picture is the smaller one."""
    start = (length - crop) // 2
    return start, start + crop


def center_crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h w c) -> (height width c), black where the picture does not reach."""
    top, bottom = center_span(pixels.shape[0], height)
    left, right = center_span(pixels.shape[1], width)
    kept = pixels[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    if kept.shape[:2] == (height, width):
        return kept
    top, left = max(-top, 0), max(-left, 0)
    canvas = np.zeros((height, width, pixels.shape[2]), pixels.dtype)
    canvas[top : top + kept.shape[0], left : left + kept.shape[1]] = kept
    return canvas


def resize(
    image: Image.Image, height: int, width: int, resample: int, crop: tuple[int, int] | None = None
) -> np.ndarray:
    """An RGB picture as (height width 3) uint8, or as little of its middle as a crop to `crop` needs.

    Pillow does it, unless it would enlarge far more than is kept. (Where it makes pictures smaller there is
    little to save, and it takes the two axes in an order that depends on its version.)
    """
    enlarged = height >= image.height and width >= image.width
    if (
        crop is None
        or height * width <= MAX_ENLARGED_TO_KEPT * crop[0] * crop[1]
        or not enlarged
        or resample not in FILTERS
    ):
        if height * width > MAX_RESIZED_PIXELS:
            raise InputError(
                f"images: a picture of {image.width}x{image.height} would become {width}x{height} pixels "
                f"(w x h); up to {MAX_RESIZED_PIXELS} in all would do"
            )
        return np.asarray(image.resize((width, height), Image.Resampling(resample)))
    rows = Taps(image.height, height, center_span(height, crop[0]), resample)
    columns = Taps(image.width, width, center_span(width, crop[1]), resample)
    pixels = np.asarray(image.crop((columns.first, rows.first, columns.last, rows.last)))
    return rows.blend(columns.blend(pixels.swapaxes(0, 1)).swapaxes(0, 1))


class Taps:
    """Some rows of a resized picture, as blends of the rows `first` to `last` of the picture."""

    def __init__(self, length: int, resized: int, span: tuple[int, int], resample: int):
        radius, weigh = FILTERS[resample]
        scale = length / resized
        wider = max(scale, 1.0)  # where it shrinks, a row blends as many as become one
        center = (np.arange(max(span[0], 0), min(span[1], resized)) + 0.5) * scale
        start = np.maximum((center - radius * wider + 0.5).astype(int), 0)
        stop = np.minimum((center + radius * wider + 0.5).astype(int), length)
        at = start[:, None] + np.arange((stop - start).max())  # rows taps
        weight = np.where(at < stop[:, None], weigh((at - center[:, None] + 0.5) * (1.0 / wider)), 0.0)
        weight = weight / weight.cumsum(axis=1)[:, -1:] * UNIT
        self.weight = np.trunc(weight + np.copysign(0.5, weight)).astype(int)
        self.first, self.last = int(start.min()), int(stop.max())
        self.at = np.minimum(at, self.last - 1) - self.first

    def blend(self, pixels: np.ndarray) -> np.ndarray:
        """(last - first, w, 3) uint8 -> (rows, w, 3) uint8"""
        total = np.full((len(self.at), *pixels.shape[1:]), UNIT // 2)
        for at, weight in zip(self.at.T, self.weight.T, strict=True):
            total += weight[:, None, None] * pixels[at]
        return (total // UNIT).clip(0, 255).astype(np.uint8)

    def matrix(self) -> np.ndarray:
        """(rows, last - first) float64: whole numbers, UNIT standing for 1."""
        made = np.zeros((len(self.at), self.last - self.first))
        np.add.at(made, (np.arange(len(self.at))[:, None], self.at), self.weight)  # beyond a row's own taps they are 0
        return made


def hamming(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 1, np.sinc(x) * (0.54 + 0.46 * np.cos(np.pi * x)), 0.0)


def keys_cubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Keys' convolution: 1 at 0, 0 at every other whole number."""
    x = np.abs(x)
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


FILTERS: dict[int, tuple[float, Callable[[np.ndarray], np.ndarray]]] = {  # how far it reaches; weight at a distance
    Image.Resampling.BOX: (0.5, lambda x: np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)),
    Image.Resampling.BILINEAR: (1.0, lambda x: np.maximum(1 - np.abs(x), 0.0)),
    Image.Resampling.HAMMING: (1.0, hamming),
    Image.Resampling.BICUBIC: (2.0, keys_cubic),
    Image.Resampling.LANCZOS: (3.0, lambda x: np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)),
}
