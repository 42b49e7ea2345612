"""The images of a fine-tuning: where they are found, and their tensors."""

import io
import json
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from finetuning.images import Images
from PIL import Image

from imvar import load_image
from imvar.errors import InputError
from imvar.image.pixel_values import PREPROCESS

SIDE = 64


@pytest.fixture(scope="module")
def photos(photo):
    """Three square images of the resolution of the training."""
    return [photo.crop((x, 0, x + 200, 200)).resize((SIDE, SIDE)) for x in (0, 100, 200)]


@pytest.fixture
def files(photos, tmp_path):
    """A folder with the photos as PNG."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, image in enumerate(photos):
        image.save(folder / f"{i}.png")
    return folder


@pytest.fixture
def find(pipe, tmp_path):
    """A function that returns the images of an input, with options of `Images`."""
    return lambda path, *options, **named: Images([str(path)], tmp_path / "out", pipe, SIDE, *options, **named)


def write_tar(files, path):
    with tarfile.open(path, "w") as archive:
        for file in sorted(files.iterdir()):
            archive.add(file, file.name)
            about = tarfile.TarInfo(file.with_suffix(".json").name)
            archive.addfile(about, io.BytesIO(b""))


def write_parquet(files, path):
    rows = [file.read_bytes() for file in sorted(files.iterdir())]
    pyarrow.parquet.write_table(pyarrow.table({"bytes": rows}), path, row_group_size=2)


def write_datasets(files, path):
    rows = [{"bytes": file.read_bytes(), "path": None} for file in sorted(files.iterdir())]
    pyarrow.parquet.write_table(pyarrow.table({"image": rows, "label": [0] * len(rows)}), path)


def write_list(files, path):
    path.write_text("".join(f"{json.dumps({'image': str(file)})}\n" for file in sorted(files.iterdir())))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("photos", None),
        ("photos/*.png", None),
        ("00000.tar", write_tar),
        ("bytes.parquet", write_parquet),
        ("datasets.parquet", write_datasets),
        ("list.jsonl", write_list),
    ],
)
def test_all_kinds_of_inputs_give_the_same_images(find, files, photos, tmp_path, name, write):
    if write:
        write(files, tmp_path / name)
    images = find(tmp_path / name)
    assert len(images) == len(photos)
    for example, photo in zip(map(images.__getitem__, range(len(images))), photos, strict=True):
        expected = torch.from_numpy(np.array(photo)).permute(2, 0, 1).double() / 127.5 - 1
        torch.testing.assert_close(example["pixels"].double(), expected, rtol=0, atol=1e-7)
        assert example["pixels"].shape == (3, SIDE, SIDE)


@pytest.mark.parametrize("preprocess", PREPROCESS)
def test_pixel_values_give_the_embeddings_of_the_pipeline(find, files, photos, pipe, preprocess):
    images = find(files, preprocess)
    for i, photo in enumerate(photos):
        with torch.no_grad():
            embedding = pipe.image_encoder(images[i]["pixel_values"][None]).image_embeds
        assert torch.equal(embedding, pipe.encode_image(photo, preprocess=preprocess)[:, 0])


@pytest.mark.parametrize("size", [(2 * SIDE, SIDE), (SIDE, 3 * SIDE)])
def test_the_centre_of_a_wide_or_high_image_is_used(find, photos, tmp_path, size):
    canvas = Image.new("RGB", size, "red")
    canvas.paste(photos[0], ((size[0] - SIDE) // 2, (size[1] - SIDE) // 2))
    canvas.save(tmp_path / "wide.png")
    assert find(tmp_path / "wide.png").cropped(0).tobytes() == photos[0].tobytes()


def test_images_are_upright_on_white_and_in_colour(find, photos, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated
    turned = tmp_path / "turned.png"
    photos[0].save(turned, exif=exif)
    assert find(turned).cropped(0).tobytes() == photos[0].transpose(Image.Transpose.ROTATE_270).tobytes()

    transparent = tmp_path / "transparent.png"
    Image.new("RGBA", (SIDE, SIDE), (255, 0, 0, 0)).save(transparent)
    assert (find(transparent)[0]["pixels"] == 1).all()

    grey = tmp_path / "grey.png"
    photos[0].convert("L").save(grey)
    pixels = find(grey)[0]["pixels"]
    assert torch.equal(pixels[0], pixels[1])
    assert torch.equal(pixels[0], pixels[2])
    assert pixels.std() > 0.1


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (3, 2)])
def test_tiny_images_are_enlarged(find, tmp_path, size):
    Image.new("RGB", size, (0, 255, 0)).save(tmp_path / "tiny.png")
    example = find(tmp_path / "tiny.png")[0]
    assert (example["pixels"] == torch.tensor([-1.0, 1, -1])[:, None, None]).all()
    assert example["pixel_values"].isfinite().all()


def test_mirrored_images_follow_all_others(find, files, photos):
    plain, images = find(files), find(files, flip=True)
    assert len(images) == 2 * len(plain) == 6
    for i in range(3):
        assert torch.equal(images[i]["pixels"], plain[i]["pixels"])
        assert torch.equal(images[3 + i]["pixels"], plain[i]["pixels"].flip(-1))
        expected = plain[i]["pixel_values"].flip(-1)  # resized from the other side, which rounds otherwise
        torch.testing.assert_close(images[3 + i]["pixel_values"], expected, rtol=0, atol=1e-5)
    with pytest.raises(IndexError):
        images[6]


@pytest.mark.parametrize(
    ("line", "name", "message"),
    [
        ({"id": "a", "mix": {"0.png": 1}}, "a", "mix"),
        ({"image": "0.png", "negative": "1.png"}, "0.png", "negative"),
        ({"image": "0.png", "preprocess": "card"}, "0.png", "preprocess"),
        ({"image": "0.png", "init": "1.png", "strength": 0.5}, "0.png", "init"),
        ({"image": "0.safetensors"}, "0.safetensors", "an embedding"),
    ],
)
def test_other_conditions_than_an_image_are_refused(find, files, line, name, message):
    (files / "list.jsonl").write_text(json.dumps(line))
    with pytest.raises(InputError, match=rf"^{name}: expected an image.*, got {message}$"):
        find(files / "list.jsonl")


def test_an_image_that_cannot_be_read_is_named(find, files):
    (files / "1.png").write_bytes(b"\x89PNG")
    images = find(files)
    with pytest.raises(InputError, match=r"photos/1\.png: expected a JPEG"):
        images[1]
    assert images.cropped(0).tobytes() == load_image(files / "0.png").tobytes()


def test_a_folder_without_images_is_refused(find, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: expected images, got none"):
        find(tmp_path / "empty")
