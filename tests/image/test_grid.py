"""`make_image_grid`, beside diffusers' where that is installed."""

import numpy as np
import pytest
from PIL import Image

from imvar import InputError, InputTypeError, make_image_grid


def images(count, size=(13, 9), mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (count, size[1], size[0], 4), dtype=np.uint8)
    return [Image.fromarray(x).convert(mode) for x in pixels]


@pytest.mark.parametrize("resize", [None, 20, 1])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (2, 3), (3, 2), (1, 6)])
def test_the_grid_equals_that_of_diffusers(rows, cols, mode, resize):
    reference = pytest.importorskip("diffusers").utils.make_image_grid
    expected = reference(images(rows * cols, mode=mode), rows=rows, cols=cols, resize=resize)
    grid = make_image_grid(images(rows * cols, mode=mode), rows, cols, resize)
    assert (grid.size, grid.mode) == (expected.size, expected.mode)
    assert grid.tobytes() == expected.tobytes()


def test_images_stand_row_by_row():
    colours = ["red", "green", "blue", "white", "black", "yellow"]
    grid = make_image_grid([Image.new("RGB", (4, 2), colour) for colour in colours], rows=2, cols=3)
    assert grid.size == (12, 4)
    expected = [Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in colours]
    assert [grid.getpixel((x, y)) for y in (1, 3) for x in (0, 4, 8)] == expected


def test_images_of_several_sizes_are_resized_to_one():
    assert make_image_grid(images(1) + images(1, (5, 5)), 1, 2, resize=8).size == (16, 8)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        ({"rows": 2, "cols": 2}, InputError, "images: expected 4 images for 2 rows of 2, got 3"),
        ({"rows": 0, "cols": 3}, InputError, "rows: expected an integer >= 1, got 0"),
        ({"rows": -1, "cols": -3}, InputError, "rows: expected an integer >= 1, got -1"),
        ({"rows": 1, "cols": 3.0}, InputTypeError, "cols: expected an integer >= 1, got 3.0"),
        ({"rows": 1, "cols": 3, "resize": 0}, InputError, "resize: expected an integer from 1"),
        ({"rows": 1, "cols": 3, "resize": (8, 8)}, InputTypeError, "resize: expected an integer from 1"),
        (
            {"images": images(2) + images(1, (5, 5))},
            InputError,
            "images: expected images of one size, .* pass resize",
        ),
        ({"images": [*images(2), "x.png"]}, InputTypeError, "images: expected a list of PIL images, got list"),
        ({"images": images(1)[0], "cols": 1}, InputTypeError, "images: expected a list of PIL images, got Image"),
        ({"images": np.zeros((3, 8, 8, 3))}, InputTypeError, "images: expected a list of PIL images, got an array"),
    ],
)
def test_other_arguments_are_refused(call, kind, words):
    with pytest.raises(kind, match=words):
        make_image_grid(**({"images": images(3), "rows": 1, "cols": 3} | call))
