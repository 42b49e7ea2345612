"""The published model's own preprocessing: equal to `F.interpolate`'s bits, and close to the formula in float64."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from imvar import InputError, InputTypeError
from imvar.image.clip import CLIP_MEAN, CLIP_STD
from imvar.image.pixel_values import to_pixel_values

SIZES = [(640, 427), (224, 224), (300, 224), (100, 60), (3, 500), (1, 1), (512, 512)]  # w h
MEAN, STD = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))


def image(size, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def preprocessed(images, preprocess, size=(224, 224)):
    return to_pixel_values(images, preprocess, size, CLIP_MEAN, CLIP_STD)


def as_batch(image):
    """(1, 3, h, w) in [0, 1], as torchvision's ToTensor."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()[None].float().div(255)


def bicubic_matrix(length, resized, align_corners):
    """Keys' cubic convolution with a = -0.75 and clamped borders, for one axis: (resized, length) float64."""
    to = np.arange(resized, dtype=np.float64)
    at = to * ((length - 1) / max(resized - 1, 1)) if align_corners else (to + 0.5) * (length / resized) - 0.5
    first, a, matrix = np.floor(at).astype(int), -0.75, np.zeros((resized, length))
    for tap in (-1, 0, 1, 2):
        x = np.abs(at - (first + tap))
        near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
        weight = np.where(x <= 1, near, np.where(x < 2, far, 0))
        np.add.at(matrix, (np.arange(resized), np.clip(first + tap, 0, length - 1)), weight)
    return matrix


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_card_equals_interpolate_without_antialiasing(size):
    x = interpolate(as_batch(image(size)), (224, 224), mode="bicubic", align_corners=False, antialias=False)
    out = preprocessed(image(size), "card")
    assert torch.equal(out, x.sub(MEAN).div(STD))
    assert (out.shape, out.dtype) == ((1, 3, 224, 224), torch.float32)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_training_equals_interpolate_of_centred_values_with_aligned_corners(size):
    x = as_batch(image(size)) * 2.0 - 1.0
    x = interpolate(x, (224, 224), mode="bicubic", align_corners=True)
    assert torch.equal(preprocessed(image(size), "training"), ((x + 1.0) / 2.0 - MEAN) / STD)


def from_formula(image, preprocess):
    pixels = np.array(image).transpose(2, 0, 1) / 255
    down, across = (bicubic_matrix(n, 224, preprocess == "training") for n in (image.height, image.width))
    return (torch.from_numpy(down @ pixels @ across.T) - MEAN) / STD


@pytest.mark.parametrize("preprocess", ["card", "training"])
def test_both_are_close_to_the_formula_in_float64(photo, preprocess):
    error = preprocessed(photo, preprocess) - from_formula(photo, preprocess)
    assert error.abs().max() < 1e-4


@pytest.mark.parametrize("preprocess", ["card", "training"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_both_are_close_to_the_formula_before_normalizing_noise(size, preprocess):
    """Noise has the largest gradients, and `interpolate` computes where it samples in float32."""
    error = preprocessed(image(size), preprocess) - from_formula(image(size), preprocess)
    assert (error * STD).abs().max() < 1e-4


def test_a_batch_equals_its_images():
    images = [image((40, 30)), image((30, 90)), image((50, 50), "L")]
    for preprocess in ("card", "training"):
        batch = preprocessed(images, preprocess, (20, 24))
        assert batch.shape == (3, 3, 20, 24)
        assert torch.equal(batch, torch.cat([preprocessed(x, preprocess, (20, 24)) for x in images]))
        assert torch.equal(batch, preprocessed(tuple(images), preprocess, (20, 24)))


def test_transparent_images_are_composited_on_white():
    white = preprocessed(Image.new("RGB", (30, 30), "white"), "card")
    assert torch.equal(preprocessed(Image.new("RGBA", (30, 30), (0, 0, 0, 0)), "card"), white)


def test_neither_is_the_feature_extractors():
    """Which antialiases, crops and rounds to 8 bits; and they differ from each other."""
    card, training = (preprocessed(image((640, 427)), preprocess) for preprocess in ("card", "training"))
    assert (card - training).abs().max() > 0.1


@pytest.mark.parametrize(
    ("images", "preprocess", "kind", "words"),
    [
        (image((9, 9)), "clip", InputError, "preprocess: expected 'card' or 'training', got 'clip'"),
        (image((9, 9)), None, InputError, "preprocess: expected 'card' or 'training', got None"),
        ([], "card", InputTypeError, "images: expected at least one PIL image, got an empty list"),
        (None, "card", InputTypeError, "images: expected a PIL image, got NoneType"),
        (torch.zeros(1, 3, 9, 9), "card", InputTypeError, "images: expected a PIL image, got a tensor"),
        ([image((9, 9)), np.zeros((9, 9, 3))], "card", InputTypeError, r"images\[1\]: .*PIL.Image.fromarray"),
        ([image((9, 9)), Image.new("F", (9, 9))], "training", InputError, r"images\[1\]: .*got mode F"),
    ],
)
def test_other_arguments_are_refused(images, preprocess, kind, words):
    with pytest.raises(kind, match=words):
        preprocessed(images, preprocess)
