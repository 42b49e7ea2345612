"""Resizing, bit-identical to Pillow, of no more of an image than the following crop keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from ..errors import InputError, invalid

MAX_ENLARGED_TO_KEPT = 64  # ratio of areas: an image enlarged beyond this is only computed inside the crop
MAX_RESIZED_PIXELS = 1 << 28  # of an image that is resized before it is cropped
UNIT = 1 << 22  # 1.0 in Pillow's fixed-point filter weights


def target_size(size: Mapping[str, int], height: int, width: int) -> tuple[int, int]:
    """Return height and width after resizing; with "shortest_edge" the long side is rounded down."""
    if "height" in size:
        return size["height"], size["width"]
    short = size["shortest_edge"]
    return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)


def center_span(length: int, crop: int) -> tuple[int, int]:
    """Return start and end of a center crop; outside 0..length if the image is smaller."""
    start = (length - crop) // 2
    return start, start + crop


def center_crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crop (h w c) to (height width c), padded with black if the image is smaller."""
    h, w, _ = pixels.shape
    (top, bottom), (left, right) = center_span(h, height), center_span(w, width)
    padding = ((max(-top, 0), max(bottom - h, 0)), (max(-left, 0), max(right - w, 0)), (0, 0))
    return np.pad(pixels[max(top, 0) : bottom, max(left, 0) : right], padding)


def resize(
    image: Image.Image, height: int, width: int, resample: int, crop: tuple[int, int] | None = None
) -> np.ndarray:
    """Resize an RGB image to (height width 3) uint8, or only as much of its center as a crop to `crop` keeps.

    Done by Pillow, unless it would enlarge far more than is kept. (When it reduces there is little to save, and the
    order of the two axes depends on its version.)
    """
    reduces = height < image.height or width < image.width
    if crop is None or reduces or resample not in FILTERS or height * width <= MAX_ENLARGED_TO_KEPT * math.prod(crop):
        if height * width > MAX_RESIZED_PIXELS:
            got = f"{width}x{height} (w x h) from an image of {image.width}x{image.height}"
            raise invalid(InputError, "images", f"at most {MAX_RESIZED_PIXELS} pixels after resizing", got)
        return np.asarray(image.resize((width, height), Image.Resampling(resample)))
    rows = Taps(image.height, height, center_span(height, crop[0]), resample)
    columns = Taps(image.width, width, center_span(width, crop[1]), resample)
    pixels = np.asarray(image.crop((columns.first, rows.first, columns.last, rows.last)))
    return rows.apply(columns.apply(pixels.swapaxes(0, 1)).swapaxes(0, 1))


class Taps:
    """The filter of rows `span` of a resized image: weights over the rows `first` to `last` of the original."""

    def __init__(self, length: int, resized: int, span: tuple[int, int], resample: int):
        radius, kernel = FILTERS[resample]
        scale = length / resized
        stretch = max(scale, 1.0)  # of the kernel, when reducing
        center = (np.arange(max(span[0], 0), min(span[1], resized)) + 0.5) * scale
        start = np.maximum((center - radius * stretch + 0.5).astype(int), 0)
        stop = np.minimum((center + radius * stretch + 0.5).astype(int), length)
        at = start[:, None] + np.arange((stop - start).max())  # rows taps
        weight = np.where(at < stop[:, None], kernel((at - center[:, None] + 0.5) * (1.0 / stretch)), 0.0)
        weight = weight / weight.cumsum(axis=1)[:, -1:] * UNIT
        self.weight = np.trunc(weight + np.copysign(0.5, weight)).astype(int)
        self.first, self.last = int(start.min()), int(stop.max())
        self.at = np.minimum(at, self.last - 1) - self.first

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Filter (last - first, w, 3) uint8 to (rows, w, 3) uint8."""
        total = np.full((len(self.at), *pixels.shape[1:]), UNIT // 2)
        for at, weight in zip(self.at.T, self.weight.T, strict=True):
            total += weight[:, None, None] * pixels[at]
        return (total // UNIT).clip(0, 255).astype(np.uint8)

    def matrix(self) -> np.ndarray:
        """Return the weights as a matrix (rows, last - first) float64 of integers, UNIT for 1."""
        out = np.zeros((len(self.at), self.last - self.first))
        np.add.at(out, (np.arange(len(self.at))[:, None], self.at), self.weight)  # 0 beyond a row's own taps
        return out


def keys_cubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Keys' cubic convolution kernel: 1 at 0, 0 at every other integer."""
    x = np.abs(x)
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


FILTERS: dict[int, tuple[float, Callable[[np.ndarray], np.ndarray]]] = {  # radius and kernel
    Image.Resampling.BOX: (0.5, lambda x: np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)),
    Image.Resampling.BILINEAR: (1.0, lambda x: np.maximum(1 - np.abs(x), 0.0)),
    Image.Resampling.HAMMING: (1.0, lambda x: np.where(abs(x) < 1, np.sinc(x) * (0.54 + 0.46 * np.cos(np.pi * x)), 0)),
    Image.Resampling.BICUBIC: (2.0, keys_cubic),
    Image.Resampling.LANCZOS: (3.0, lambda x: np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)),
}
