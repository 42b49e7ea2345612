"""Records in image files: written by `save_image`, read by `read_record` and by another program's parser."""

import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from sd_parsers import ParserManager

import imvar
from imvar.records import schema
from imvar.records.files import FORMATS, MAX_LENGTH, read_record, save_image
from tests.support.records import hand_made

IMAGE = Image.effect_noise((96, 64), 90).convert("RGB")


def png_with(path, **texts):
    """Write a PNG with these text chunks."""
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    IMAGE.save(path, pnginfo=info)
    return path


# ---- What is written


@pytest.mark.parametrize("format", FORMATS)
def test_a_record_returns_as_it_was_written(tmp_path, format):
    record = hand_made()
    save_image(IMAGE, tmp_path / "image", record, format)
    assert read_record(tmp_path / "image") == record
    difference = np.asarray(Image.open(tmp_path / "image")).astype(int) - np.asarray(IMAGE)
    assert np.abs(difference).max() <= (60 if format == "jpeg" else 0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["fox.png", 'a "fox", red: 1.png', "лиса 狐 🦊.png", "bad-\udcff.png"])
def test_another_parser_reads_it(tmp_path, format, name):
    path = tmp_path / f"image.{format}"
    record = hand_made(scheduler__class="EulerAncestralDiscreteScheduler", settings__guidance_scale=7.5)
    record["inputs"][0]["name"] = name
    save_image(IMAGE, path, record, format)
    info = ParserManager().parse(path)
    assert info is not None
    (sampler,) = info.samplers
    assert sampler.name == "Euler a"
    assert sampler.parameters == {"cfg_scale": "7.5", "seed": "7", "steps": "20"}
    assert (sampler.model.name, sampler.model.hash) == ("imvar-emoji", "0123456789")
    assert info.metadata["Size"] == "96x64"
    assert info.metadata["Version"] == "imvar 0.1.0"


def test_two_files_of_one_record_are_equal_and_name_no_folder(tmp_path, monkeypatch):
    """Whenever and wherever they are written."""
    for folder, time in ("one", 1e9), ("two", 2e9):
        monkeypatch.setattr("time.time", lambda time=time: time)
        for format in FORMATS:
            save_image(IMAGE, tmp_path / folder / format, hand_made(), format)
    for format in FORMATS:
        data = (tmp_path / "one" / format).read_bytes()
        assert data == (tmp_path / "two" / format).read_bytes()
        assert os.fsencode(tmp_path) not in data
        assert b"tIME" not in data


@pytest.mark.parametrize("format", FORMATS)
def test_without_a_record_there_is_no_metadata(tmp_path, format):
    save_image(IMAGE, tmp_path / "image", None, format)
    image = Image.open(tmp_path / "image")
    assert not {"parameters", "imvar", "exif"} & set(image.info)
    with pytest.raises(imvar.InputError, match="a record of imvar, got an image without one"):
        read_record(tmp_path / "image")


@pytest.mark.parametrize("format", FORMATS)
def test_a_record_survives_another_save(tmp_path, format):
    """As an editor makes it that keeps metadata."""
    save_image(IMAGE, tmp_path / "first", hand_made(), format)
    with Image.open(tmp_path / "first") as image:
        chunks = PngInfo()
        chunks.add_text("imvar", image.info.get("imvar", ""))
        kept = {"pnginfo": chunks} if format == "png" else {"exif": image.getexif()}
        image.rotate(90).save(tmp_path / "second", FORMATS[format][0], **kept)
    assert read_record(tmp_path / "second") == hand_made()


def test_a_chunk_behind_the_pixels_is_read(tmp_path):
    """Where some programs write text."""
    path = tmp_path / "a.png"
    IMAGE.save(path)
    data, text = path.read_bytes(), b"imvar\0" + json.dumps(hand_made()).encode()
    chunk = struct.pack(">I", len(text)) + b"tEXt" + text + struct.pack(">I", zlib.crc32(b"tEXt" + text))
    path.write_bytes(data[:-12] + chunk + data[-12:])
    assert read_record(path) == hand_made()


def test_a_failed_save_keeps_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_image(IMAGE, path, hand_made())
    before = path.read_bytes()
    with pytest.raises(imvar.InputError, match="format: expected one of png, webp, jpeg, got 'gif'"):
        save_image(IMAGE, path, hand_made(), "gif")
    with pytest.raises(imvar.InputError, match=r"at most 65500 bytes of EXIF, got \d+; use PNG"):
        save_image(IMAGE, path, hand_made(reasons=["x" * 70_000]), "jpeg")
    with pytest.raises(imvar.InputError, match="at most 262144 characters"):
        save_image(IMAGE, path, hand_made(reasons=["x" * MAX_LENGTH]))
    monkeypatch.setattr(Image.Image, "save", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_image(IMAGE, path, hand_made())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# ---- What is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a record in JSON, nested up to 16 levels, got Expecting value"),
        ("{", "a record in JSON, nested up to 16 levels, got Expecting property name"),
        ("[" * 50_000, "got one nested too deeply"),
        ('{"format": 1, "seed": ' + "9" * 5000 + "}", "got Exceeds the limit"),
        ('{"format": 1, "seed": NaN}', "a record in JSON, got NaN"),
        (" " * (MAX_LENGTH + 1), f"a record of at most {MAX_LENGTH} characters, got"),
        ("[]", "a record with its format, got []"),
        ('{"seed": 1}', "a record with its format"),
        ('{"format": 2}', "a record of format 1, got 2; another version of imvar wrote it"),
        ('{"format": true}', "a record of format 1, got True"),
        ('{"format": 1}', "a record with versions, got one without it"),
    ],
)
def test_hostile_texts_are_refused(tmp_path, text, message):
    path = png_with(tmp_path / "a.png", imvar=text)
    with pytest.raises(imvar.InputError) as caught:
        read_record(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "7"}, "a record whose seed is an integer or null, got '7'"),
        ({"seed": True}, "a record whose seed is an integer or null, got True"),
        ({"seed": 1.5}, "a record whose seed is an integer or null, got 1.5"),
        ({"versions": []}, "a record whose versions is a dictionary, got list"),
        ({"versions__torch": 2}, "a record whose versions.torch is text, got 2"),
        ({"checkpoint": {}}, "a record with checkpoint.name, got one without it"),
        ({"inputs": {}}, "a record whose inputs is a list"),
        ({"inputs": [3]}, "a record whose inputs[0] is a dictionary, got int"),
        ({"inputs": [{"role": "image"}] * (schema.MAX_INPUTS + 1)}, "a list of at most 4096"),
        ({"call__row": 4}, "a row and an image within those of its call"),
        ({"call__rows": 10**9}, "a row and an image within those of its call"),
        ({"call__images": 0}, "a row and an image within those of its call"),
        ({"exact": 1}, "a record whose exact is true or false, got 1"),
        ({"reasons": ["\x1b[2J", 1]}, "a record whose reasons[1] is text"),
        ({"settings__x": [[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]}, "nested up to 16 levels, got one nested deeper"),
    ],
)
def test_records_of_another_form_are_refused(tmp_path, changes, message):
    path = png_with(tmp_path / "a.png", imvar=json.dumps(hand_made(**changes)))
    with pytest.raises(imvar.InputError) as caught:
        read_record(path)
    assert message in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    image = tmp_path / "a.png"
    save_image(IMAGE, image, hand_made())
    bomb = tmp_path / "bomb.png"
    text = b"imvar\0\0" + zlib.compress(b" " * 2**24)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    bomb.write_bytes(image.read_bytes()[:33] + chunk + image.read_bytes()[33:])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(image.read_bytes()[:100])
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in [
        ("none.png", "got no such file"),
        ("", "got a folder"),
        ("pipe.png", "got a pipe, device or socket"),
        ("text.png", "got one that cannot be read"),
        ("cut.png", "got one that cannot be read"),
        ("bomb.png", "got one that cannot be read"),
    ]:
        with pytest.raises(imvar.InputError) as caught:
            read_record(tmp_path / name)
        assert message in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("length", [*range(0, 400, 23), 1000])
@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_broken_exif_is_refused(tmp_path, format, length):
    """Cut anywhere, or of another program."""
    path = tmp_path / "a"
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "imvar:" + json.dumps(hand_made())
    IMAGE.save(path, FORMATS[format][0], exif=exif.tobytes()[:length])
    with pytest.raises(imvar.InputError):
        read_record(path)
