"""`load_image` on files of each format: whole, of several frames, turned, huge, and corrupted."""

import contextlib
import io
import random
import struct
import warnings

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError, features

from imvar import InputError, load_image
from imvar.image.load_image import FORMATS

ALL = [name for name in FORMATS if name != "HEIF" and (name != "AVIF" or "avif" in features.get_supported())]
LOSSLESS = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}, "JPEG": {"quality": 100}}
TIFF_KINDS = ["raw", "tiff_lzw", "tiff_deflate", "jpeg", "packbits"]


def encoded(image, name, **options):
    file = io.BytesIO()
    image.save(file, name, **(LOSSLESS.get(name, {}) | options))
    return file.getvalue()


def pattern(size=(40, 24)):
    return Image.merge("RGB", [Image.radial_gradient("L").resize(size), *[Image.linear_gradient("L").resize(size)] * 2])


@pytest.mark.parametrize("name", ALL)
def test_each_format(name):
    image = load_image(encoded(pattern(), name))
    assert image.mode == "RGB"
    tolerance = 40 if name == "GIF" else 0 if name in ("PNG", "WEBP", "BMP", "TIFF") else 10
    assert np.abs(np.asarray(image).astype(int) - np.asarray(pattern())).max() <= tolerance


@pytest.mark.parametrize("name", ["WEBP", "GIF", "TIFF", "AVIF", "PNG"])
def test_the_first_of_several_frames_or_pages(name):
    if name not in ALL:
        pytest.skip(f"this Pillow has no {name}")
    frames = [Image.new("RGB", (40, 24), color) for color in ("red", "blue", "lime")]
    with pytest.warns(UserWarning, match="of several frames or pages only the first is used"):
        image = load_image(encoded(frames[0], name, save_all=True, append_images=frames[1:]))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(frames[0])).max() <= 4


def test_a_photo_with_a_preview_in_its_file_is_no_animation(tmp_path):
    Image.new("RGB", (40, 24), "red").save(
        tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(tmp_path / "phone.jpg").size == (40, 24)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("GIF", "BMP")])
def test_each_format_is_upright(name):
    """An image that is dark at the top and turned clockwise by a quarter is dark on the right."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = load_image(encoded(Image.linear_gradient("L").resize((40, 24)).convert("RGB"), name, exif=exif))
    assert image.size == (24, 40)
    assert image.getpixel((0, 20))[0] > 200
    assert image.getpixel((23, 20))[0] < 50


@pytest.mark.parametrize("name", ALL)
def test_the_size_is_limited_before_decoding(name, monkeypatch):
    data = encoded(pattern(), name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 24 // 2 - 1)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(InputError, match="decompression bomb"):
        load_image(data)


def tiff_of_tiles(side):
    """Return a TIFF of one pixel in a compressed tile."""
    rows = {256: 1, 257: 1, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 140, 325: 12}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in rows.items())
    return b"II*\0" + struct.pack("<IH", 8, len(rows)) + entries + bytes(4 + 12)


def test_a_tiff_of_one_pixel_in_a_huge_tile(monkeypatch):
    """libtiff allocates a gigabyte for it."""
    assert Image.open(io.BytesIO(tiff_of_tiles(32000))).size == (1, 1)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(InputError, match=r"tiles of up to 16777216 pixels, got \[32000, 32000\]"):
        load_image(tiff_of_tiles(32000))


def corruptions(data, rng):
    """Yield cut files, and files with changed bytes: mostly among the first, where the header is."""
    for end in (0, 3, 12, 30, len(data) // 2, len(data) - 3):
        yield data[:end]
    for _ in range(60):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(rng.choice([64, 256, len(data)])) % len(data)] = rng.choice([0, 1, 127, 128, 255])
        yield bytes(changed)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own, and that of several frames
@pytest.mark.parametrize("kind", [*ALL, *TIFF_KINDS], ids=str)
def test_a_corrupted_file_is_an_input_error_or_an_image(kind):
    name, options = ("TIFF", {"compression": kind}) if kind in TIFF_KINDS else (kind, {})
    data = encoded(pattern(), name, **options)
    with pytest.raises(InputError, match=r"got (one that cannot be decoded|an unknown)"):
        load_image(data[: len(data) // 3])
    for corrupted in corruptions(data, random.Random(0)):
        with contextlib.suppress(InputError):
            assert load_image(corrupted).mode == "RGB"


@pytest.mark.parametrize(
    ("brands", "words"),
    [
        (b"heic\0\0\0\0mif1heic", "got HEIC; convert it to JPEG: .*sips"),
        (b"mif1\0\0\0\0mif1miaf", "got HEIC"),
        (b"mif1\0\0\0\0avifmif1", "got AVIF, which this Pillow does not read; pip install --upgrade Pillow"),
        (b"isom\0\0\0\0isommp42", "got an unknown or another format"),
    ],
    ids=["heic", "heif", "avif", "mp4"],
)
def test_a_format_that_pillow_does_not_read_is_named(brands, words, monkeypatch, tmp_path):
    monkeypatch.setattr(features, "get_supported", list)
    data = struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(80)
    (tmp_path / "IMG_1.HEIC").write_bytes(data)
    for file in (data, tmp_path / "IMG_1.HEIC", io.BytesIO(data)):
        with pytest.raises(InputError, match=words):
            load_image(file)


def test_a_format_that_a_plugin_adds(monkeypatch):
    """As `pillow_heif.register_heif_opener()` does, here for a file of text."""
    Image.init()
    red = Image.new("RGB", (3, 2), "red")
    monkeypatch.setitem(Image.OPEN, "HEIF", (lambda file, name: red.copy(), lambda head: head.startswith(b"text")))
    monkeypatch.setattr(Image, "ID", [*Image.ID, "HEIF"])
    assert load_image(b"text").size == (3, 2)
    with pytest.raises(InputError, match="or HEIF file, got an unknown") as caught:
        load_image(b"other")
    assert isinstance(caught.value.__cause__, UnidentifiedImageError)
