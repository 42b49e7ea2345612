"""Image processors against transformers and diffusers: the same images, outputs equal to the bit."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imvar.image import CLIPImageProcessor, VaeImageProcessor

logging.disable(logging.WARNING)  # transformers warns at import that torchvision is missing
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
Reference = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil
ReferenceVae = diffusers.image_processor.VaeImageProcessor
logging.disable(logging.NOTSET)

PHOTOS = sorted((Path(__file__).parents[1] / "photos").glob("*.jpg"))
SMALL = {"size": 24, "crop_size": 20}
SIZES = [(1, 1), (1, 9), (9, 1), (3, 200), (200, 3), (19, 23), (24, 24), (25, 24), (31, 48), (97, 64)]
EIGHT_BIT = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(width * 1000 + height)
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def as_mode(mode: str, width: int, height: int) -> Image.Image:
    image = Image.fromarray(noise(width, height, 4))
    if mode == "LAB":
        return Image.frombytes("LAB", image.size, image.convert("RGB").tobytes())
    return image.convert(mode) if mode in ("RGBA", "RGBa", "LA", "PA") else image.convert("RGB").convert(mode)


def transparent(kind: str, width: int, height: int) -> Image.Image:
    """Return an image whose transparency is in its metadata, not in an alpha channel."""
    image = Image.fromarray(noise(width, height, 4))
    grey, colour = image.convert("L"), image.convert("RGB")
    image, key = {
        "P index": (colour.quantize(16), 3),
        "P bytes": (colour.quantize(16), bytes(range(0, 256, 16))),
        "L": (grey, grey.getpixel((15, 24))),
        "1": (grey.convert("1"), 0),
        "RGB": (colour, colour.getpixel((15, 24))),
    }[kind]
    image.info["transparency"] = key
    return image


def check(images, settings=None, **call):
    """Compare both processors, constructed with `settings` and called with the same arguments."""
    settings = SMALL if settings is None else settings
    theirs = Reference(**settings)(images=images, return_tensors="pt", **call).pixel_values
    ours = CLIPImageProcessor(**settings)(images=images, return_tensors="pt", **call).pixel_values
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert torch.equal(ours, theirs)


# ---- CLIPImageProcessor: images


@pytest.mark.parametrize("mode", EIGHT_BIT)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_every_8_bit_mode(mode, size):
    check(as_mode(mode, *size))


@pytest.mark.parametrize("kind", ["P index", "P bytes", "L", "1", "RGB"])
def test_transparency_in_the_metadata(kind):
    image, opaque = transparent(kind, 31, 48), transparent(kind, 31, 48)
    check(image)
    del opaque.info["transparency"]
    ours = CLIPImageProcessor(**SMALL)
    assert not np.array_equal(ours(image).pixel_values, ours(opaque).pixel_values)


def test_a_palette_of_rgba():
    check(Image.fromarray(noise(31, 48, 4)).quantize(16, method=Image.Quantize.FASTOCTREE))


def test_transparent_pixels_are_white():
    clear = Image.new("RGBA", (30, 30), (200, 10, 10, 0))
    check(clear)
    pixels = CLIPImageProcessor(do_normalize=False)(clear, return_tensors="np").pixel_values
    assert (pixels == 1).all()


@pytest.mark.parametrize("photo", PHOTOS, ids=lambda p: p.stem)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA"])
def test_photos(photo, mode):
    image = Image.open(photo)
    if mode == "RGBA":
        image.putalpha(image.convert("L"))
    check(image.convert(mode), {})


@pytest.mark.parametrize("photo", PHOTOS, ids=lambda p: p.stem)
@pytest.mark.parametrize("size", [(224, 224), (225, 223), (640, 479), (1001, 333), (150, 151)], ids=str)
def test_photos_of_other_sizes(photo, size):
    check(Image.open(photo).resize(size), {})


def test_random_sizes():
    """The long side is rounded down; the odd pixel of a crop is on the same side."""
    rng = np.random.default_rng(0)
    for width, height in rng.integers(1, 400, (300, 2)).tolist():
        short, crop = int(rng.integers(1, 12)), (int(rng.integers(1, 16)), int(rng.integers(1, 16)))
        check(Image.fromarray(noise(width, height)), {"size": short, "crop_size": crop})


def test_exif_is_ignored(tmp_path):
    image = Image.fromarray(noise(40, 30))
    exif = image.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    turned = Image.open(tmp_path / "turned.png")
    assert turned.getexif()[0x0112] == 6
    check(turned)
    ours = CLIPImageProcessor(**SMALL)
    assert np.array_equal(ours(turned).pixel_values[0], ours(image).pixel_values[0])


@pytest.mark.parametrize("size", [(1, 700), (700, 1), (3, 1100), (1100, 7), (2, 333)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("resample", range(1, 6))
def test_only_the_crop_is_resized(size, resample, monkeypatch):
    """Images of extreme aspect ratio are resized inside the crop, without Pillow."""
    image, call = Image.fromarray(noise(*size)), {"size": 30, "crop_size": 20, "resample": resample}
    theirs = Reference()(images=image, return_tensors="np", **call).pixel_values
    monkeypatch.setattr(Image.Image, "resize", None)
    assert np.array_equal(CLIPImageProcessor()(image, return_tensors="np", **call).pixel_values, theirs)


@pytest.mark.parametrize("resample", range(1, 6))
@pytest.mark.parametrize(
    ("width", "height", "call"),
    [
        (30, 20, {"size": 90, "crop_size": (3, 5)}),
        (90, 70, {"size": {"height": 900, "width": 90}, "crop_size": (7, 30)}),  # one axis only
        (64, 65, {"size": 64, "crop_size": 2}),  # not at all
        (5, 7, {"size": {"height": 51, "width": 3000}, "crop_size": (90, 20)}),  # and padded
    ],
)
def test_a_crop_of_any_enlargement(width, height, call, resample, monkeypatch):
    image = Image.fromarray(noise(width, height))
    theirs = Reference()(images=image, return_tensors="np", resample=resample, **call).pixel_values
    monkeypatch.setattr(Image.Image, "resize", None)
    ours = CLIPImageProcessor()(image, return_tensors="np", resample=resample, **call).pixel_values
    assert np.array_equal(ours, theirs)


# ---- CLIPImageProcessor: settings


@pytest.mark.parametrize(
    "call",
    [
        {"size": 32},
        {"size": {"shortest_edge": 19}},
        {"size": {"height": 30, "width": 17}},
        {"size": (17, 30)},
        {"crop_size": 33},
        {"crop_size": {"height": 9, "width": 90}},
        {"crop_size": (90, 9)},
        {"crop_size": [1, 1]},
        {"do_resize": False},
        {"do_center_crop": False},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_resize": False, "do_center_crop": False},
        {"do_convert_rgb": False},
        {"resample": 0},
        {"resample": 1},
        {"resample": 2},
        {"resample": 4},
        {"resample": 5},
        {"resample": Image.Resampling.LANCZOS},
        {"rescale_factor": 1 / 127.5},
        {"rescale_factor": 0.5, "do_normalize": False},
        {"image_mean": 0.5, "image_std": 0.25},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": (0.4, 0.5, 0.6)},
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["call", "constructor", "attribute"])
def test_settings(call, how):
    image, ours = Image.fromarray(noise(47, 31)), CLIPImageProcessor(**SMALL)
    theirs = Reference(**SMALL)(images=image, return_tensors="np", **call).pixel_values
    if how == "call":
        pixels = ours(image, return_tensors="np", **call).pixel_values
        assert ours.config.to_dict() == CLIPImageProcessor(**SMALL).config.to_dict()
    elif how == "constructor":
        pixels = CLIPImageProcessor(**SMALL | call)(image, return_tensors="np").pixel_values
    else:
        for name, value in call.items():
            setattr(ours, name, value)
        pixels = ours(image, return_tensors="np").pixel_values
    assert pixels.dtype == theirs.dtype
    assert np.array_equal(pixels, theirs)


@pytest.mark.parametrize("mode", ["RGB", "YCbCr", "HSV", "LAB"])
def test_without_conversion_to_rgb(mode):
    check(as_mode(mode, 47, 31), do_convert_rgb=False)


PUBLISHED = {
    "old": {
        "crop_size": 224,
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": 224,
    },
    "new": {
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 224},
    },
    "custom": {
        "crop_size": {"height": 20, "width": 31},
        "size": {"height": 24, "width": 40},
        "resample": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_normalize": True,
        "image_processor_type": "CLIPImageProcessor",
    },
}


@pytest.mark.parametrize("form", PUBLISHED)
def test_files_are_read_by_both_libraries(form, tmp_path):
    """The published file, the one that imvar writes and the one that transformers writes."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PUBLISHED[form]))
    image = Image.open(PHOTOS[0])
    ours, theirs = CLIPImageProcessor.from_pretrained(tmp_path), Reference.from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    processors = [
        ours,
        theirs,
        Reference.from_pretrained(tmp_path / "ours"),
        CLIPImageProcessor.from_pretrained(tmp_path / "theirs"),
        transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours", use_fast=False),
    ]
    first, *others = [p(images=image, return_tensors="pt").pixel_values for p in processors]
    assert all(torch.equal(first, other) for other in others)
    written = json.loads((tmp_path / "ours" / "preprocessor_config.json").read_text())
    reference = json.loads((tmp_path / "theirs" / "preprocessor_config.json").read_text())
    assert {k: written[k] for k in reference} == reference
    assert set(written) - set(reference) == set(PUBLISHED[form]) & {"feature_extractor_type"}


def test_defaults_equal_transformers():
    assert CLIPImageProcessor().saved_config() == json.loads(Reference().to_json_string())


# ---- CLIPImageProcessor: arrays and tensors

A = noise(47, 31)
T = torch.from_numpy(A).permute(2, 0, 1).contiguous()
IMAGE = Image.fromarray(A)
UINT8 = {
    "array hwc": A,
    "array chw": T.numpy(),
    "tensor chw": T,
    "tensor hwc": torch.from_numpy(A),
    "a flipped array": A[::-1],
    "batch of arrays": np.stack([A, 255 - A]),
    "batch of tensors": torch.stack([T, 255 - T]),
    "list of arrays": [A, A[:20]],
    "list of tensors": [T, T[:, :20]],
    "list of batches": [T[None], torch.stack([T, T])],
    "mixed list": [IMAGE, A, T],
    "tuple": (IMAGE, IMAGE.crop((0, 0, 9, 9))),
    "int64": A.astype(np.int64),
    "int16 tensor": T.short(),
    "float32": A.astype(np.float32),
    "float64": A / 1.0,
    "float32 tensor": T.float(),
    "float16 tensor": T.half(),
    "rgba array": noise(47, 31, 4),
    "rgba tensor": torch.from_numpy(noise(47, 31, 4)).permute(2, 0, 1),
    "one channel": A[..., :1],
    "one channel chw": T[:1],
}


@pytest.mark.parametrize("kind", UINT8)
def test_8_bit_arrays(kind):
    check(UINT8[kind])


@pytest.mark.parametrize("kind", ["array hwc", "tensor chw", "float32", "float32 tensor", "int64", "one channel"])
def test_8_bit_arrays_without_resizing(kind):
    check(UINT8[kind], do_resize=False)


@pytest.mark.parametrize(
    "call", [{}, {"do_normalize": False}, {"do_resize": False}, {"do_center_crop": False}], ids=str
)
@pytest.mark.parametrize("divisor", [255, 256.3])
def test_floats_from_0_to_1(call, divisor):
    """Resized in 8 bits, to which they are truncated, not rounded."""
    for x in (T.float() / divisor, A.astype(np.float32) / np.float32(divisor)):
        check(x, do_rescale=False, **call)


def test_layout_by_name():
    check(A[:3], input_data_format="channels_last")
    check(T[:, :, :3], input_data_format="channels_first")


def test_results():
    ours, theirs = (p(images=[IMAGE, IMAGE.crop((0, 0, 20, 40))]) for p in (CLIPImageProcessor(), Reference()))
    assert [x.shape for x in ours.pixel_values] == [x.shape for x in theirs.pixel_values]
    assert all(np.array_equal(a, b) for a, b in zip(ours["pixel_values"], theirs["pixel_values"], strict=True))
    assert list(ours.keys()) == list(theirs.keys())
    ours, theirs = (p(images=IMAGE, return_tensors="pt") for p in (CLIPImageProcessor(), Reference()))
    ours, theirs = ours.to("cpu", torch.float16), theirs.to("cpu", torch.float16)
    assert torch.equal(ours.pixel_values, theirs.pixel_values)


# ---- VaeImageProcessor


def vae_pair(**settings):
    return VaeImageProcessor(**settings), ReferenceVae(**settings)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("flags", [None, [True, True, True], [True, False, True], [False, False, False]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [3, 1])
def test_postprocess(output_type, flags, dtype, channels):
    x = torch.randn(3, channels, 9, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    if flags and output_type == "pil":
        x = torch.stack([image if flag else image.clamp(0, 1) for image, flag in zip(x, flags, strict=True)])
    before = x.clone()
    ours, theirs = (p.postprocess(x, output_type=output_type, do_denormalize=flags) for p in vae_pair())
    if output_type == "pil":
        assert [image.mode for image in ours] == [image.mode for image in theirs]
        ours, theirs = np.stack([np.asarray(i) for i in ours]), np.stack([np.asarray(i) for i in theirs])
    assert type(ours) is type(theirs)
    assert ours.dtype == theirs.dtype
    assert (ours == theirs).all()
    assert torch.equal(x, before)


def test_every_8_bit_value_and_the_halves_between():
    """Rounding to 8 bits, half to even."""
    x = (torch.arange(-20, 4 * 255 + 20) / (2 * 255) - 1).expand(1, 3, 2, -1)
    ours, theirs = (np.asarray(p.postprocess(x)[0]) for p in vae_pair())
    assert np.array_equal(ours, theirs)
    assert set(np.unique(ours)) == set(range(256))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"vae_scale_factor": 4},
        {"vae_scale_factor": 16},
        {"resample": "bicubic"},
        {"resample": "bilinear"},
        {"resample": "nearest"},
        {"do_normalize": False},
        {"do_resize": False},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "kind",
    [
        "image",
        "images",
        "grey",
        "array",
        "arrays",
        "batch of arrays",
        "tensor",
        "tensors",
        "batch of tensors",
        "half",
        "float64",
    ],
)
def test_preprocess(settings, kind):
    array, grey = A.astype(np.float32) / 255, IMAGE.convert("L")
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    image = {
        "image": IMAGE,
        "images": [IMAGE, IMAGE.rotate(180)],
        "grey": grey,
        "array": array,
        "arrays": [array, array[::-1]],
        "batch of arrays": array[None],
        "tensor": tensor,
        "tensors": [tensor, 1 - tensor],
        "batch of tensors": torch.stack([tensor, 1 - tensor]),
        "half": tensor.half(),
        "float64": array.astype(np.float64),
    }[kind]
    ours, theirs = (p.preprocess(image) for p in vae_pair(**settings))
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [(64, 72), (61, 79), (16, None), (None, 33)], ids=str)
def test_preprocess_to_a_size(size):
    for image in (Image.open(PHOTOS[1]), torch.rand(1, 3, 30, 40, generator=torch.Generator().manual_seed(0))):
        ours, theirs = (p.preprocess(image, *size) for p in vae_pair())
        assert torch.equal(ours, theirs)


def test_preprocess_converts_to_rgb():
    ours, theirs = (p.preprocess([IMAGE.convert("RGBA"), IMAGE.convert("L")]) for p in vae_pair(do_convert_rgb=True))
    assert torch.equal(ours, theirs)


def test_preprocess_returns_latents_unchanged():
    latents = torch.randn(2, 4, 5, 5)
    assert all(torch.equal(p.preprocess(latents), latents) for p in vae_pair())


def test_preprocess_takes_negative_values_as_normalised():
    x = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)
    with pytest.warns(UserWarning, match="below 0"):
        ours = VaeImageProcessor().preprocess(x)
    with pytest.warns(FutureWarning):
        assert torch.equal(ours, ReferenceVae().preprocess(x))


def test_vae_helpers():
    array = A[None].astype(np.float32) / 255
    for name, argument in {
        "normalize": array,
        "denormalize": T[None].float() / 128 - 1,
        "numpy_to_pt": array,
        "pil_to_numpy": [IMAGE, IMAGE],
        "pt_to_numpy": T[None].float(),
    }.items():
        ours, theirs = (getattr(cls, name)(argument) for cls in (VaeImageProcessor, ReferenceVae))
        assert type(ours) is type(theirs)
        assert ours.shape == theirs.shape
        assert (ours == theirs).all()
    grey = [cls.numpy_to_pt(cls.pil_to_numpy(IMAGE.convert("L"))) for cls in (VaeImageProcessor, ReferenceVae)]
    assert torch.equal(*grey)
    for images in (array, array[0], array[..., :1]):
        ours, theirs = (cls.numpy_to_pil(images) for cls in (VaeImageProcessor, ReferenceVae))
        assert [(i.mode, i.tobytes()) for i in ours] == [(i.mode, i.tobytes()) for i in theirs]


def test_vae_defaults_equal_diffusers():
    theirs = {k: v for k, v in ReferenceVae().config.items() if k != "_use_default_values"}
    assert VaeImageProcessor().config.to_dict() == theirs
