"""Pictures of every mode, size and state: what becomes of each, in the pipeline as well."""

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

CLOSE = {"YCbCr": 2, "LAB": 5, "HSV": 1}  # of 255: what the eight bits of another way to tell colours lose


def as_mode(mode):
    """The colour red, or as much of it as the mode has, and the RGB that it is."""
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
    picture, colour = as_mode(mode)
    before = picture.tobytes()
    away = np.asarray(to_rgb(picture)).astype(int) - np.asarray(colour.convert("RGB"))
    assert np.abs(away).max() <= CLOSE.get(mode, 0)
    made = [pipe(one, num_inference_steps=1, output_type="np", seed=0).images for one in (picture, to_rgb(picture))]
    assert np.array_equal(*made)
    assert (picture.tobytes(), picture.mode) == (before, mode)


@pytest.mark.parametrize("picture", [CLEAR, CLEAR.convert("LA"), CLEAR.convert("PA")], ids=lambda picture: picture.mode)
def test_what_is_transparent_turns_white(picture):
    assert (np.asarray(to_rgb(picture)) == 255).all()


def test_a_colour_that_stands_for_transparent(tmp_path):
    RED.quantize().save(tmp_path / "red.png", transparency=0)
    assert (np.asarray(to_rgb(Image.open(tmp_path / "red.png"))) == 255).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 2)])
def test_sizes(pipe, size):
    assert pipe(Image.new("RGB", size, "red"), num_inference_steps=1, output_type="np").images.shape == (1, 128, 128, 3)


def test_lists_that_are_mixed(pipe, photo):
    mixed = [photo, photo.convert("L"), photo.resize((30, 90)).convert("CMYK"), np.asarray(photo), RED.quantize()]
    made = pipe(mixed, num_inference_steps=1, output_type="np", seed=0).images
    for i, one in enumerate(mixed):
        alone = pipe([one], num_inference_steps=1, output_type="np", seed=i).images[0]
        assert np.abs(made[i] - alone).max() < 2e-5


def cut():
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[:2000]))


def closed():
    file = io.BytesIO()
    RED.save(file, "PNG")
    picture = Image.open(file)
    picture.close()
    file.close()
    return picture


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (cut, r"image\[1\].*cannot be read"),
        (closed, r"image\[1\].*cannot be read"),
        (lambda: Image.new("F", (4, 4)), r"image\[1\].*mode F"),
        (lambda: Image.new("RGB", (0, 4)), r"image\[1\].*0x4 pixels"),
        (lambda: None, r"image\[1\]: NoneType"),
        (lambda: "cat.png", r"image\[1\]: str came"),
        (lambda: np.zeros((2, 5)), r"image\[1\].*shape"),
        (lambda: np.full((5, 6, 3), np.nan), r"image\[1\].*NaN"),
        (lambda: np.zeros((5, 6, 3), complex), r"image\[1\].*complex"),
        (lambda: np.zeros((5, 6, 3), object), r"image\[1\].*object"),
        (lambda: np.full((5, 6, 3), 700), r"image\[1\].*0\.\.255"),
    ],
)
def test_a_bad_one_is_named_before_the_first_step(pipe, photo, make, words):
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(InputError, match=words):
        pipe([photo, make()], num_inference_steps=1)


def test_the_autoencoder_is_shown_no_broken_picture():
    with pytest.raises(InputError, match=r"image\[0\]: a mode L picture came that cannot be read"):
        VaeImageProcessor().preprocess(cut())


def test_broken_files_stay_errors(pipe, monkeypatch):
    """Pillow has a switch that lets them through, for the whole process; it is the user's to turn."""
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert pipe(cut(), num_inference_steps=1, output_type="np").images.shape == (1, 128, 128, 3)


def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "f.png")
    for path in (tmp_path / "f.png", tmp_path):
        with pytest.raises(InputError, match="is no file"):
            load_image(path)


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (torch.zeros(3, 8, 8, device="meta"), "on the meta device"),
        (torch.zeros(3, 8, 8).to_sparse(), "torch.sparse_coo"),
    ],
)
def test_tensors_that_have_no_values_of_their_own(picture, words):
    with pytest.raises(InputError, match=f"images.*{words}.*would do"):
        CLIPImageProcessor()(picture)
