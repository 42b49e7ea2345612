"""The photos that commands read: folders, patterns, standard input, embeddings, and those that are refused."""

import io
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import imvar
from imvar import InputError, cli
from imvar.cli import render, sources
from imvar.cli.rows import Row, joined_name, side_by_side
from imvar.cli.sources import InputImage
from imvar.photos import expand_photos, unique_names


@pytest.fixture
def photos(tmp_path):
    """A folder of photos and other files."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name in ("fox 10.jpg", "fox 9.JPG", "a.gif", "z.webp", "more/deep.png"):
        Image.radial_gradient("L").convert("RGB").resize((60, 40)).save(folder / name)
    for name in ("notes.txt", "model.safetensors", "._fox 9.JPG"):
        (folder / name).write_text("no image")
    return folder


@pytest.fixture
def without_model(monkeypatch):
    """Replace the pipeline by one that makes grey images at once."""

    class Pipe:
        scheduler, safety_checker = None, object()

        def to(self, device):
            return self

        def __call__(self, image, num_images_per_prompt, **options):
            assert image.size == (32, 32)
            images = [Image.new("RGB", (64, 64), "grey")] * num_images_per_prompt
            return SimpleNamespace(images=images, nsfw_content_detected=None, scores=None, records=[None])

    monkeypatch.setattr(render, "load_pipeline", lambda *_: Pipe())


def names(paths):
    return [path.name for path in paths]


def test_a_folder_gives_its_images_in_natural_order(photos):
    assert names(expand_photos([photos])) == ["a.gif", "fox 9.JPG", "fox 10.jpg", "z.webp"]
    assert names(expand_photos([photos / "more", photos / "a.gif"])) == ["deep.png", "a.gif"]


def test_a_pattern_gives_its_files(photos):
    assert names(expand_photos([photos / "fox*"])) == ["fox 9.JPG", "fox 10.jpg"]
    assert names(expand_photos([photos / "**" / "*.png"])) == ["deep.png"]
    (photos / "[a].png").touch()  # the name of a file comes first
    assert names(expand_photos([photos / "[a].png"])) == ["[a].png"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("empty", "empty: expected a folder with images, got a folder without any"),
        ("*.tiff", r"\*.tiff: expected a file, or a pattern of the names of files, got no such file"),
    ],
)
def test_a_folder_or_pattern_without_images(photos, name, words):
    (photos / "empty").mkdir()
    with pytest.raises(InputError, match=words):
        expand_photos([photos / name])


def test_variations_of_a_folder(run, photos, tmp_path):
    assert run(photos, "-n", 1) == 0
    made = ["a-0.png", "contact-sheet.png", "fox 10-0.png", "fox 9-0.png", "z-0.png"]
    assert sorted(names((tmp_path / "out").iterdir())) == made


def test_a_broken_photo_in_a_folder_is_found_before_anything_is_made(run, photos, tmp_path, capsys):
    (photos / "fox 10.jpg").write_bytes((photos / "fox 10.jpg").read_bytes()[:500])
    assert run(photos, "--checkpoint", "/no/where") == 1
    assert "fox 10.jpg: expected a JPEG" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_broken_photos_of_a_folder_are_named_in_order(run, photos, tmp_path, capsys):
    (photos / "a.gif").write_bytes(b"")
    (photos / "fox 10.jpg").write_bytes((photos / "fox 10.jpg").read_bytes()[:500])
    assert run(tmp_path / "nowhere.png", photos, "--checkpoint", "/no/where") == 1
    nowhere, empty, cut = capsys.readouterr().err.splitlines()
    assert nowhere.startswith(f"imvar: {tmp_path / 'nowhere.png'}: expected a JPEG")
    assert empty.startswith(f"imvar: {photos / 'a.gif'}: expected a JPEG")
    assert empty.endswith("got an empty one")
    assert cut.startswith(f"imvar: {photos / 'fox 10.jpg'}: expected a JPEG")
    assert run(*[tmp_path / f"{k}.png" for k in range(7)], "--checkpoint", "/no/where") == 1
    lines = capsys.readouterr().err.splitlines()
    assert [Path(line.split(": ")[1]).name for line in lines[:5]] == [f"{k}.png" for k in range(5)]
    assert lines[5:] == ["imvar: 2 more files cannot be used"]


def test_the_folder_of_the_photos_is_not_that_of_the_variations(run, photos, capsys):
    assert run(photos, "-o", photos / "more" / "..") == 1
    assert "-o: expected another folder than that of the photos" in capsys.readouterr().err


def test_photos_are_not_kept_in_memory(run, tmp_path, without_model, monkeypatch):
    paths = [tmp_path / f"{k}.png" for k in range(9)]
    for path in paths:
        Image.new("RGB", (32, 32)).save(path)
    alive, counts = set(), []

    def load_image(path):
        image = imvar.load_image(path)
        alive.add(number := len(counts))
        weakref.finalize(image, alive.remove, number)
        counts.append(len(alive))
        return image

    monkeypatch.setattr(sources, "load_image", load_image)
    assert run(*paths, "-n", 1) == 0
    assert len(counts) >= 2 * len(paths)
    assert max(counts) <= 2


def test_many_photos_have_several_sheets(run, tmp_path, without_model, monkeypatch, capsys):
    paths = [tmp_path / f"{k}.png" for k in range(5)]
    for path in paths:
        Image.new("RGB", (32, 32)).save(path)
    monkeypatch.setattr(render, "SHEET_ROWS", 2)
    assert run(*paths, "-n", 1) == 0
    sheets = [Image.open(tmp_path / "out" / f"contact-sheet-{k}of3.png") for k in (1, 2, 3)]
    assert sheets[0].height == sheets[1].height > sheets[2].height
    assert capsys.readouterr().out.count("contact-sheet") == 3


@pytest.mark.parametrize(("columns", "lengths"), [(4, [40, 40, 20]), (100, [4] * 25), (1000, [1] * 100)])
def test_sheets_of_many_columns_have_fewer_rows(columns, lengths):
    rows = [Row("", "", Image.Image, [None] * columns)] * 100
    assert list(map(len, render.pages_of(rows))) == lengths


def test_standard_input(run, photos, tmp_path, monkeypatch, capsys):
    data = (photos / "a.gif").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert run("-", "-n", 1) == 0
    assert run(photos / "a.gif", "-n", 1) == 0
    piped, named = (np.asarray(Image.open(tmp_path / "out" / f"{name}-0.png")) for name in ("stdin", "a"))
    assert np.array_equal(piped, named)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"text")))
    assert run("-") == 1
    assert "standard input': expected a JPEG" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert run("-") == 1
    assert "-: expected an image on standard input, got an empty input" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert run("-") == 1
    assert "-: expected an image on standard input, got a terminal" in capsys.readouterr().err


def test_the_suffix_of_an_embedding_in_any_case(run, tmp_path):
    imvar.save_image_embeds(tmp_path / "FOX.SAFETENSORS", torch.ones(1, 1, 32))
    assert run(tmp_path / "FOX.SAFETENSORS", "-n", 1) in (0, 1)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["PHOTO", "--init", "E.safetensors"], "--init: expected an image, got E.safetensors, an embedding"),
        (["PHOTO", "--init", "PHOTO", "--mask", "E.safetensors"], "--mask: expected an image, got E.safetensors"),
        (["PHOTO", "--init", "PHOTO", "--mask", "CLEAR"], "clear.png: expected black and white, got transparent"),
    ],
)
def test_options_that_take_images(run, photo, tmp_path, capsys, args, words):
    Image.new("RGBA", (8, 8)).save(tmp_path / "clear.png")
    files = {"PHOTO": photo, "CLEAR": tmp_path / "clear.png"}
    assert run(*[files.get(arg, arg) for arg in args], "--checkpoint", "/no/where") == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["vary", "a.png", "--mask", "m.png"], "--mask: expected --init with it, got none"),
        (["vary", "a.png", "--strength", "0.5"], "--strength: expected --init with it, got none"),
        (["grid", "a.png", "--rows", "strength=0.5,1"], "--strength: expected --init with it, got none"),
        (["grid", "a.png", "--rows", "guidance=3,1,3.0"], "expected different values"),
        (["vary", "-", "--init", "-"], "-: expected standard input for one image"),
        (["interpolate", "-", "-"], "-: expected standard input for one image"),
    ],
)
def test_usage_errors_before_anything_is_read(args, words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(args)
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_photos_side_by_side_keep_their_proportions(tmp_path):
    for name, size in ("wide", (200, 100)), ("tall", (50, 100)), ("line", (3000, 1)):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    inputs = [InputImage(tmp_path / f"{name}.png", name) for name in ("wide", "tall", "line")]
    strip = np.asarray(side_by_side(inputs))
    is_red = (strip == (255, 0, 0)).all(-1)
    wide, tall, line = np.split(is_red, [384, 384 + 128], axis=1)
    assert strip.shape == (256, 384 + 128 + 384, 3)
    assert (wide.any(1).sum(), wide.any(0).sum()) == (192, 384)
    assert (tall.any(1).sum(), tall.any(0).sum()) == (256, 128)
    assert line.any(1).sum() == 1


def test_the_name_of_a_mixture_fits_a_file():
    inputs = [InputImage(Path(f"{k}.png"), f"photo of a fox {k}") for k in range(20)]
    assert joined_name(inputs[:2]) == "photo of a fox 0+photo of a fox 1"
    assert joined_name(inputs) == "photo of a fox 0+19 more"


def test_names_of_a_thousand_photos():
    assert unique_names(["a"] * 1000)[-1] == "a-1000"
    assert Path(unique_names(["x/a"])[0]).name == "a"
