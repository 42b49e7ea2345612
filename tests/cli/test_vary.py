"""`imvar vary` with a tiny checkpoint of random weights."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

import imvar
from imvar import choices, cli, loading
from imvar import contact_sheet as sheets
from imvar.cli import render
from imvar.contact_sheet import CAPTION, GAP, GUTTER, MARGIN, SIDE, SheetRow, contact_sheet, fit_text, size_on_sheet
from imvar.conversion import convert
from imvar.image.load_image import load_image
from imvar.photos import unique_names


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_a_file_per_variation_and_a_contact_sheet(run, photo, tmp_path, capsys):
    (tmp_path / "b").mkdir()
    other = tmp_path / "b" / "A PHOTO.png"
    Image.new("RGB", (40, 80), "teal").save(other)
    assert run(photo, other, "-n", 3, "--seed", 7, "--size", "64x96") == 0
    names = [f"{name}-{seed}.png" for name in ("a photo", "A PHOTO-2") for seed in (7, 8, 9)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*names, "contact-sheet.png"])
    assert {Image.open(tmp_path / "out" / name).size for name in names} == {(96, 64)}
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit("/")[-1] for line in lines[:-1]] == names
    assert "contact-sheet.png" in lines[-1]


def test_a_seed_gives_the_same_image_in_any_batch(run, photo, tmp_path):
    """Bit-identical in batches of equal size; otherwise up to rounding, at most one of 255 levels."""
    run(photo, "-n", 3, "--seed", 5)
    run(photo, "-n", 1, "--seed", 6, out="alone")
    run(photo, "-n", 2, "--seed", 6, "--batch", 1, out="singly")
    name = "a photo-6.png"
    alone, singly = pixels(tmp_path / "alone" / name), pixels(tmp_path / "singly" / name)
    assert np.array_equal(alone, singly)
    assert np.abs(alone - pixels(tmp_path / "out" / name)).max() <= 1
    assert np.abs(alone - pixels(tmp_path / "out" / "a photo-5.png")).max() > 50


def test_images_equal_those_of_the_pipeline(run, checkpoint, photo, tmp_path):
    run(photo, "-n", 2, "--guidance", 2, "--scheduler", "lms")
    pipe = imvar.StableDiffusionImageVariationPipeline.from_pretrained(checkpoint)
    pipe.scheduler = imvar.LMSDiscreteScheduler.from_config(pipe.scheduler.config)
    output = pipe(
        Image.open(photo),
        num_inference_steps=2,
        guidance_scale=2.0,
        num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
    )
    for seed, image in enumerate(output.images):
        assert np.abs(pixels(tmp_path / "out" / f"a photo-{seed}.png") - np.asarray(image)).max() <= 1


def test_an_original_file_is_a_checkpoint(run, checkpoint, photo, tmp_path, capsys):
    file = tmp_path / "original.safetensors"
    convert(checkpoint, file, to="original")
    assert run(photo, "-n", "1") == run(photo, "-n", "1", "--checkpoint", file, out="other") == 0
    assert "no safety checker" in capsys.readouterr().err
    assert (pixels(tmp_path / "out" / "a photo-0.png") == pixels(tmp_path / "other" / "a photo-0.png")).all()


def test_ddim_does_not_clip(checkpoint):
    pipe = loading.load_pipeline(str(checkpoint), None, "ddim", torch.float32)
    assert type(pipe.scheduler) is imvar.DDIMScheduler
    assert pipe.scheduler.config.clip_sample is False
    assert pipe.scheduler.config.steps_offset == 1
    assert type(loading.load_pipeline(str(checkpoint), None, None, torch.float32).scheduler) is imvar.PNDMScheduler


@pytest.mark.parametrize("name", choices.SCHEDULERS)
def test_each_scheduler_runs(run, photo, tmp_path, name):
    assert run(photo, "-n", 1, "--scheduler", name) == 0
    assert pixels(tmp_path / "out" / "a photo-0.png").std() > 1


def test_flagged_images_are_reported(run, photo, tmp_path, capsys, monkeypatch):
    def check(self, images, clip_input):
        return images * torch.tensor([1.0, 0.0])[:, None, None, None], [False, True]

    monkeypatch.setattr(imvar.StableDiffusionSafetyChecker, "forward", check)
    assert run(photo, "-n", 2) == 0
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first.endswith("a photo-0.png")
    assert second.endswith("a photo-1.png, flagged by the safety checker and replaced by a black image")
    assert not pixels(tmp_path / "out" / "a photo-1.png").any()


# ---- Errors


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere.jpg"], "nowhere.jpg: expected a JPEG, PNG, WEBP, GIF, BMP, TIFF"),
        ([__file__], " file, got an unknown or another format"),
        (["PHOTO", "--dtype", "float16"], "about a hundred times slower"),
        (
            ["PHOTO", "--device", "meta"],
            "--device: expected 'auto', 'cpu' or another device that this machine and PyTorch have, got 'meta'",
        ),
        (["PHOTO", "--device", "gpu"], "have, got 'gpu'"),
        (["PHOTO", "--steps", "1001"], "num_inference_steps"),
        (["PHOTO", "-o", __file__], f"-o: expected a folder, got {__file__} (it, or one of its parents, is a file)"),
        (["PHOTO", "--checkpoint", "/no/where"], "/no/where: expected a folder"),
    ],
)
def test_invalid_arguments(run, photo, args, message, capsys):
    assert run(*[photo if arg == "PHOTO" else arg for arg in args]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("imvar: ")
    assert message in line


def test_photos_are_read_before_the_checkpoint(run, photo, tmp_path, capsys):
    photo.write_bytes(photo.read_bytes()[:400])
    assert run(photo, "--checkpoint", "/no/where") == 1
    assert "a photo.jpg" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_out_of_memory(run, photo, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render, "load_pipeline", lambda *_: torch.empty(2**60))
        assert run(photo) == 1
    assert capsys.readouterr().err.startswith("imvar: out of memory; use --batch 1")


def test_a_name_that_the_terminal_cannot_encode(run, photo, tmp_path):
    fox = photo.rename(tmp_path / "🦊.jpg")
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "imvar",
            "vary",
            str(fox),
            "--checkpoint",
            "imvar-emoji",
            "-n",
            "1",
            "--steps",
            "1",
            "-o",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONIOENCODING": "cp1252"},
    )
    assert b"\\U0001f98a-0.png" in result.stdout
    assert (tmp_path / "out" / "🦊-0.png").exists()


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["draw"],
        ["vary"],
        ["vary", "x.jpg", "--scheduler", "heun"],
        ["vary", "x.jpg", "--size", "500"],
        ["vary", "x.jpg", "--size", "64x64x64"],
        ["vary", "x.jpg", "-n", "0"],
        ["vary", "x.jpg", "--seed", "-1"],
        ["vary", "x.jpg", "--steps", "2.5"],
    ],
    ids=" ".join,
)
def test_usage_errors(args, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    assert caught.value.code == 2
    assert "usage: imvar" in capsys.readouterr().err


# ---- Helpers


def test_as_a_module():
    result = subprocess.run([sys.executable, "-m", "imvar", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"imvar {imvar.__version__}\n"


def test_half_precision_only_on_devices_that_support_it(monkeypatch):
    cpu, cuda, mps = map(torch.device, ("cpu", "cuda", "mps"))
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(loading, "has_bfloat16", lambda native=native: native)
        assert loading.pick_dtype("auto", cpu) is dtype
    assert loading.pick_dtype("auto", cuda) is torch.float16
    assert loading.pick_dtype("auto", mps) is torch.float32
    assert loading.pick_dtype("bfloat16", cpu) is torch.bfloat16


def test_exif_orientation_is_applied(tmp_path):
    """An image that is dark at the top and rotated clockwise by a quarter is dark on the right."""
    path, exif = tmp_path / "turned.jpg", Image.Exif()
    exif[0x0112] = 6
    Image.linear_gradient("L").resize((40, 20)).save(path, exif=exif)
    image = load_image(path)
    assert (image.size, image.mode) == ((20, 40), "RGB")
    assert image.getpixel((0, 20)) > (200,) * 3
    assert image.getpixel((19, 20)) < (50,) * 3


def test_unique_names():
    assert unique_names(["a", "b", "A", "a", "a-2"]) == ["a", "b", "A-2", "a-3", "a-2-2"]


def test_fit_text():
    font = ImageFont.load_default(13)
    assert fit_text("short", font, 100) == "short"
    short = fit_text("w" * 99, font, 100)
    assert font.getlength(short) <= 100 < font.getlength("w" + short)


def sheet_of(name):
    image = Image.new("RGB", (64, 64), "teal")
    return contact_sheet([SheetRow(name, image, [(name, image)])] * 2, name)


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("two\nlines\tand\x1b[2J.png", "two lines and [2J.png"),
        ("\u202egnp.exe", " gnp.exe"),
        (os.fsdecode(b"caf\xe9.png"), "caf?.png"),
        ("Z\u00fcrich caf\u00e9.png", "Zurich cafe.png"),
        ("Zu\u0308rich.png", "Zurich.png"),  # decomposed, as on macOS
        ("\u72d0 \u2764\ufe0f.png", "? ?.png"),
    ],
)
def test_names_on_the_sheet_are_lines_of_glyphs(name, drawn, monkeypatch):
    """Here without fonts of the system, as each has other glyphs."""
    monkeypatch.setattr(sheets, "system_fonts", list)
    assert sheet_of(name).tobytes() == sheet_of(drawn).tobytes()


def test_names_in_other_characters_are_drawn_in_a_font_of_the_system():
    if not (fonts := sheets.system_fonts()):
        pytest.skip("no font of the system")
    text, font = sheets.drawable("Zu\u0308rich \u043b\u0438\u0441\u0430")
    assert (text, font in fonts) == ("Z\u00fcrich \u043b\u0438\u0441\u0430", True)
    assert sheets.drawable("fox.png")[1] not in fonts


@pytest.mark.parametrize(
    ("size", "on_sheet"),
    [
        ((64, 64), (256, 256)),
        ((96, 64), (192, 128)),
        ((40, 100), (80, 200)),
        ((256, 128), (256, 128)),
        ((300, 200), (256, 171)),
        ((512, 512), (256, 256)),
    ],
)
def test_small_images_are_enlarged_by_an_integer(size, on_sheet):
    assert size_on_sheet(Image.new("RGB", size)) == on_sheet


def test_size_of_the_contact_sheet():
    image = Image.new("RGB", (384, 256), "teal")
    rows = [
        SheetRow("wide", Image.new("RGB", (300, 100)), [("", image)] * 3),
        SheetRow("tall", Image.new("RGB", (100, 300)), [("", image)]),
    ]
    height = SIDE * 256 // 384 + 1
    sheet = contact_sheet(rows, "a footer that is too long " * 99)
    assert sheet.width == MARGIN + 3 * height // 2 + GUTTER + 3 * SIDE + 2 * GAP + MARGIN
    assert sheet.height == MARGIN + 2 * (height + CAPTION + GAP) + CAPTION + MARGIN // 2


@pytest.mark.parametrize(
    ("policy", "note"),
    [
        ("black", "flagged by the safety checker and replaced by a black image\n"),
        ("blur", "flagged by the safety checker and blurred\n"),
        ("keep", "flagged by the safety checker\n"),
    ],
)
def test_flag_policies(run, photo, tmp_path, capsys, monkeypatch, policy, note):
    scores = imvar.StableDiffusionSafetyChecker.scores
    monkeypatch.setattr(imvar.StableDiffusionSafetyChecker, "scores", lambda *args: tuple(s + 3 for s in scores(*args)))
    assert run(photo, "-n", 1, "--on-flagged", policy) == 0
    assert note in capsys.readouterr().out
    assert pixels(tmp_path / "out" / "a photo-0.png").any() == (policy != "black")
