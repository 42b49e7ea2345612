"""Images of every mode, size and state, in the image processors and in the pipeline."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile

from imvar import CLIPImageProcessor, InputError, VaeImageProcessor, load_image
from imvar.image.read import to_rgb

RED, CLEAR = Image.new("RGB", (9, 7), "red"), Image.new("RGBA", (9, 7), (0, 0, 0, 0))
MODES = ["1", "L", "P", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LA", "PA", "I", "I;16", "I;16B", "LAB"]

TOLERANCE = {"YCbCr": 2, "LAB": 5, "HSV": 1}  # of 255: rounding of 8-bit colour spaces


def as_mode(mode):
    """Return a red image in this mode, or grey where it has no colour, and the RGB image that it shows."""
    grey = RED.convert("L")
    if mode in ("LA", "PA"):
        return grey.convert("LA").convert(mode), grey.convert("RGB")
    if mode.startswith("I;16"):
        wide = np.asarray(grey).astype(np.uint16) * 257
        return Image.frombytes(mode, RED.size, wide.astype(">u2" if mode.endswith("B") else "<u2").tobytes()), grey
    if mode == "1":
        return Image.new("1", RED.size, 1), Image.new("RGB", RED.size, "white")
    if mode == "RGBa":
        return RED.convert("RGBA").convert("RGBa"), RED
    if mode == "LAB":
        profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        return ImageCms.applyTransform(RED, ImageCms.buildTransform(*profiles, "RGB", "LAB")), RED
    return RED.convert(mode), grey if mode in ("L", "I") else RED


@pytest.mark.parametrize("mode", MODES)
def test_modes(pipe, mode):
    image, colour = as_mode(mode)
    before = image.tobytes()
    difference = np.asarray(to_rgb(image)).astype(int) - np.asarray(colour.convert("RGB"))
    assert np.abs(difference).max() <= TOLERANCE.get(mode, 0)
    outputs = [pipe(i, num_inference_steps=1, output_type="np", seed=0).images for i in (image, to_rgb(image))]
    assert np.array_equal(*outputs)
    assert (image.tobytes(), image.mode) == (before, mode)


@pytest.mark.parametrize("image", [CLEAR, CLEAR.convert("LA"), CLEAR.convert("PA")], ids=lambda image: image.mode)
def test_transparent_images_are_composited_on_white(image):
    assert (np.asarray(to_rgb(image)) == 255).all()


def test_a_transparent_palette_colour(tmp_path):
    RED.quantize().save(tmp_path / "red.png", transparency=0)
    assert (np.asarray(to_rgb(Image.open(tmp_path / "red.png"))) == 255).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 2)])
def test_sizes(pipe, size):
    assert pipe(Image.new("RGB", size, "red"), num_inference_steps=1, output_type="np").images.shape == (1, 128, 128, 3)


def test_mixed_lists(pipe, photo):
    mixed = [photo, photo.convert("L"), photo.resize((30, 90)).convert("CMYK"), np.asarray(photo), RED.quantize()]
    batch = pipe(mixed, num_inference_steps=1, output_type="np", seed=0).images
    for i, image in enumerate(mixed):
        single = pipe([image], num_inference_steps=1, output_type="np", seed=i).images[0]
        assert np.abs(batch[i] - single).max() < 2e-5


def cut():
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[:2000]))


def closed():
    file = io.BytesIO()
    RED.save(file, "PNG")
    image = Image.open(file)
    image.close()
    file.close()
    return image


def with_info(image, info):
    image.info = info
    return image


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: with_info(RED.copy(), None),
            r"image\[1\]: expected an image whose info is a dictionary, got info=None",
        ),
        (lambda: with_info(RED.copy(), {"transparency": "x"}), r"image\[1\]: .*transparency of mode RGB.*got .*='x'"),
        (lambda: with_info(RED.copy(), {"transparency": (1, 2)}), r"image\[1\]: .*transparency=\(1, 2\)"),
        (lambda: with_info(RED.quantize(), {"transparency": 300}), r"image\[1\]: .*mode P.*transparency=300"),
        (cut, r"image\[1\].*cannot be decoded"),
        (closed, r"image\[1\].*cannot be decoded"),
        (lambda: Image.new("F", (4, 4)), r"image\[1\].*mode F"),
        (lambda: Image.new("RGB", (0, 4)), r"image\[1\].*got 0x4"),
        (lambda: None, r"image\[1\].*NoneType"),
        (lambda: "cat.png", r"image\[1\].*\bstr\b"),
        (lambda: np.zeros((2, 5)), r"image\[1\].*shape"),
        (lambda: np.full((5, 6, 3), np.nan), r"image\[1\].*NaN"),
        (lambda: np.zeros((5, 6, 3), complex), r"image\[1\].*complex"),
        (lambda: np.zeros((5, 6, 3), object), r"image\[1\].*object"),
        (lambda: np.full((5, 6, 3), 700), r"image\[1\].*from 0 to 255"),
    ],
)
def test_an_invalid_image_is_refused_before_the_first_step(pipe, photo, make, words):
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(InputError, match=words):
        pipe([photo, make()], num_inference_steps=1)


def test_a_truncated_image_in_preprocess():
    with pytest.raises(
        InputError, match=r"image\[0\]: expected a readable image, got a mode L image that cannot be decoded"
    ):
        VaeImageProcessor().preprocess(cut())


def test_truncated_files_are_errors_unless_pillow_accepts_them(pipe, monkeypatch):
    """Pillow's process-wide switch is left to the user."""
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert pipe(cut(), num_inference_steps=1, output_type="np").images.shape == (1, 128, 128, 3)


def test_a_pipe_is_not_an_image_file(tmp_path):
    os.mkfifo(tmp_path / "f.png")
    for path in (tmp_path / "f.png", tmp_path):
        with pytest.raises(InputError, match=r"expected an image file, got a (folder|pipe)"):
            load_image(path)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.zeros(3, 8, 8, device="meta"), "on the meta device"),
        (torch.zeros(3, 8, 8).to_sparse(), "torch.sparse_coo"),
    ],
)
def test_meta_and_sparse_tensors(image, words):
    with pytest.raises(InputError, match=f"images.*{words}"):
        CLIPImageProcessor()(image)
