"""`make_image_grid`: images side by side in one."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ..checks import MAX_SIDE, check_int
from ..errors import InputError, InputTypeError, describe, invalid
from .read import decode_pil


def make_image_grid(images: Sequence[Image.Image], rows: int, cols: int, resize: int | None = None) -> Image.Image:
    """Return one RGB image of `rows` by `cols` images, row by row, without gaps: that of diffusers' function.

    `images` are `rows * cols` PIL images of one size. `resize` is a side in pixels, to which each is resized first.
    Raises `InputError` for another number of images, or sizes that differ.
    """
    if not isinstance(images, (list, tuple)) or not all(isinstance(image, Image.Image) for image in images):
        raise invalid(InputTypeError, "images", "a list of PIL images", describe(images))
    rows, cols = check_int("rows", rows), check_int("cols", cols)
    if len(images) != rows * cols:
        raise invalid(InputError, "images", f"{rows * cols} images for {rows} rows of {cols}", str(len(images)))
    for i, image in enumerate(images):
        decode_pil(image, f"images[{i}]")
    if resize is not None:
        side = check_int("resize", resize, high=MAX_SIDE)
        images = [image.resize((side, side)) for image in images]
    if len(sizes := {image.size for image in images}) > 1:
        raise invalid(InputError, "images", "images of one size", f"sizes {sorted(sizes)} (w, h)", "pass resize")
    width, height = images[0].size
    grid = Image.new("RGB", (cols * width, rows * height))
    for i, image in enumerate(images):
        grid.paste(image, (i % cols * width, i // cols * height))
    return grid
