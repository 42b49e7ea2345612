"""`imvar again`: every kind of image is made again bit for bit, and what cannot be is refused by name."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import imvar
from imvar import cli
from imvar.kernels.int8_kernels import has_int8_kernels
from imvar.records.files import read_record, save_image

EXAMPLES = imvar.bundled_examples()
FOX, DOG, CAKE = (str(EXAMPLES[name]) for name in ("fox-noto", "dog-noto-held-out", "cake-noto"))
COMMON = ("--checkpoint", "imvar-emoji", "--steps", "2", "--device", "cpu", "-q")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working folder, where images are saved."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def again(capsys):
    """Return a function that makes an image again, and returns the exit status, stdout and stderr."""

    def again(*args):
        capsys.readouterr()
        status = cli.main(["again", *map(str, args)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return again


def make(command, *args):
    """Run a command that makes images; return their paths in the order of their names, without the sheet."""
    assert cli.main([command, *map(str, args), *COMMON, "-o", "made"]) == 0
    return sorted(path for path in Path("made").iterdir() if "contact-sheet" not in path.name)


def change_record(path, **changes):
    """Write an image again with other entries in its record; `call__row` is that of record["call"]."""
    record = read_record(path)
    for name, value in changes.items():
        *outer, last = name.split("__")
        entry = record
        for key in outer:
            entry = entry[key]
        entry[last] = value
    save_image(Image.open(path), path, record)
    return path


def assert_equal_again(again, path, *args):
    status, out, err = again(path, *args)
    new, verdict = out.splitlines()
    assert (status, verdict, err) == (0, f"equal in every pixel to {path}", "")
    assert np.array_equal(np.asarray(Image.open(new)), np.asarray(Image.open(path)))
    assert new == f"variations/{path.stem}-again.png"
    return new


# ---- Equal in every pixel


@pytest.mark.parametrize(("n", "rows"), [(1, [0]), (4, [0, 3]), (5, [1, 4]), (7, [2, 6])])
def test_an_image_of_a_batch(again, n, rows):
    """Of the first batch and of the last, which is smaller."""
    paths = make("vary", FOX, "-n", n, "--batch", 4, "--seed", 40)
    for row in rows:
        assert read_record(paths[row])["call"]["rows"] == (4 if row < 4 <= n else n % 4)
        assert_equal_again(again, paths[row], "--photo", FOX)


def test_of_several_photos(again):
    paths = make("vary", FOX, DOG, "-n", 2, "--size", "64x72", "--guidance", 1)
    assert_equal_again(again, paths[1], "--photo", DOG)


@pytest.mark.parametrize("name", ["init", "mask", "scheduler"])
def test_with_options(again, name):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save("mask.png")
    options, files = {
        "init": (["--init", DOG, "--strength", "0.6", "--negative", CAKE], ["--init", DOG, "--negative", CAKE]),
        "mask": (["--init", DOG, "--mask", "mask.png"], ["--init", DOG, "--mask", "mask.png"]),
        "scheduler": (["--scheduler", "euler-ancestral", "--dtype", "bfloat16"], []),
    }[name]
    paths = make("vary", FOX, "-n", 3, *options)
    assert_equal_again(again, paths[1], "--photo", FOX, *files)


def test_of_a_mixture(again, tmp_path):
    """Photos in any order, and an embedding in a file."""
    pipe = imvar.StableDiffusionImageVariationPipeline.from_pretrained("imvar-emoji")
    imvar.save_image_embeds("cake.safetensors", pipe.encode_image(imvar.load_image(CAKE)))
    paths = make("mix", f"{FOX}=0.6", f"{DOG}=-0.3", "cake.safetensors=0.7", "-n", 5, "--negative", "cake.safetensors")
    record = read_record(paths[4])
    assert [entry.get("weight") for entry in record["inputs"]] == [0.6, -0.3, 0.7, None]
    files = ["--photo", "cake.safetensors", "--photo", DOG, "--photo", FOX, "--negative", "cake.safetensors"]
    for path in paths[0], paths[4]:
        assert_equal_again(again, path, *files)


def test_of_an_interpolation(again):
    paths = make("interpolate", FOX, DOG, "-n", 4)
    for path in paths[0], paths[1]:
        assert_equal_again(again, path, "--photo", FOX, "--photo", DOG)


def test_of_a_grid(again):
    make("grid", FOX, "--rows", "scheduler=ddim,dpm++", "--columns", "guidance=1,3")
    for name in "scheduler-ddim-guidance-3", "scheduler-dpm++-guidance-1":
        assert_equal_again(again, Path("made") / f"fox-noto-{name}.png", "--photo", FOX)


def test_of_an_embedding(again):
    pipe = imvar.StableDiffusionImageVariationPipeline.from_pretrained("imvar-emoji")
    imvar.save_image_embeds("fox.safetensors", pipe.encode_image(imvar.load_image(FOX)))
    (path,) = make("vary", "fox.safetensors", "-n", 1)
    assert_equal_again(again, path, "--photo", "fox.safetensors")


def test_of_a_list_in_python(again):
    """With blanks, or anything, in the place of the other photos; with FreeU and DeepCache."""
    pipe = imvar.StableDiffusionImageVariationPipeline.from_pretrained("imvar-emoji")
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    pipe.scheduler = imvar.EulerDiscreteScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    photos = [imvar.load_image(path) for path in (FOX, DOG, CAKE)]
    options = {"cache_interval": 2, "guidance_interval": (0, 0.7), "guidance_rescale": 0.5}
    made = pipe(photos, num_inference_steps=4, num_images_per_prompt=2, seed=[5, 6, 7, 8, 9, 10], **options)
    paths = made.save("made")
    assert_equal_again(again, paths[3], "--photo", DOG)


@pytest.mark.skipif(not has_int8_kernels(), reason="needs VNNI or AMX instructions")
def test_in_int8(again):
    """Each sample has scales of its own, so that the other photos change nothing."""
    pipe = imvar.StableDiffusionImageVariationPipeline.from_pretrained("imvar-emoji")
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_int8()
    paths = pipe([imvar.load_image(path) for path in (FOX, DOG)], num_inference_steps=2, seed=[5, 6]).save("made")
    assert_equal_again(again, paths[1], "--photo", DOG)


def test_of_a_guidance_function_in_python(again):
    pipe = imvar.StableDiffusionImageVariationPipeline.from_pretrained("imvar-emoji")
    pipe.set_progress_bar_config(disable=True)
    made = pipe(imvar.load_image(FOX), num_inference_steps=3, seed=1, guidance_scale=lambda x: 5 - 4 * x)
    (path,) = made.save("made")
    assert_equal_again(again, path, "--photo", FOX)


@pytest.mark.parametrize("threads", [1, 2])
def test_in_processes_with_other_threads(threads):
    """Images by a process with some threads, made again by one with another number."""
    code = "import sys, torch, imvar.cli as cli; torch.set_num_threads(int(sys.argv[1])); cli.main(sys.argv[2:])"
    run = [sys.executable, "-c", code]
    command = ["vary", FOX, "-n", "4", *COMMON, "-o", "made"]
    subprocess.run([*run, str(threads), *command], check=True)
    path = "made/fox-noto-1.png"
    assert read_record(path)["machine"]["threads"] == threads
    done = subprocess.run([*run, str(3 - threads), "again", path, "--photo", FOX], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"equal in every pixel to {path}\n")


def test_the_settings_of_the_process_stay(again):
    (path,) = make("vary", FOX, "-n", 1)
    torch.set_num_threads(2)
    again(path, "--photo", FOX)
    assert torch.get_num_threads() == 2


def test_the_same_pixels_in_another_file_are_accepted(again, folder):
    (path,) = make("vary", FOX, "-n", 1)
    Image.open(FOX).save(folder / "copy.webp", lossless=True, exact=True)
    new = assert_equal_again(again, path, "--photo", "copy.webp")
    assert read_record(new)["inputs"][0]["name"] == "copy.webp"
    assert read_record(new)["inputs"][0]["pixels"] == read_record(path)["inputs"][0]["pixels"]


def test_a_checkpoint_under_another_name(again, checkpoint, folder):
    imvar.cli.main(["vary", FOX, "-n", "1", "--steps", "2", "--checkpoint", str(checkpoint), "-q", "-o", "made"])
    path = Path("made") / "fox-noto-0.png"
    status, _, err = again(path, "--photo", FOX)
    assert status == 1
    assert f"--checkpoint: expected the checkpoint that the image was made with, got '{checkpoint.name}'" in err
    assert_equal_again(again, path, "--photo", FOX, "--checkpoint", checkpoint)


# ---- Equal up to rounding


def test_alone_is_close(again):
    paths = make("vary", FOX, "-n", 3)
    status, out, err = again(paths[2], "--photo", FOX, "--alone")
    assert (status, err) == (0, "imvar: equal only up to rounding (recorded and here): made alone, not in its batch\n")
    old, new = (np.asarray(Image.open(path)).astype(int) for path in (paths[2], out.splitlines()[0]))
    assert np.abs(old - new).max() <= 1


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"versions__torch": "1.0"}, "versions.torch: 1.0 and 2."),
        ({"versions__imvar": "0.0.1"}, "versions.imvar: 0.0.1 and"),
        ({"machine__device": "xpu"}, "machine.device: xpu and"),
        ({"machine__device_name": "Another"}, "machine.device_name: Another and"),
        ({"reasons": ["compile: kernels are chosen by the clock"], "exact": False}, "compile: kernels are chosen"),
    ],
)
def test_another_machine_is_said(again, changes, note):
    (path,) = make("vary", FOX, "-n", 1)
    status, out, err = again(change_record(path, **changes), "--photo", FOX)
    assert status == 0
    assert f"imvar: equal only up to rounding (recorded and here): {note}" in err
    assert "equal in every pixel" in out  # since it is this machine


@pytest.mark.parametrize("format", ["webp", "jpeg"])
def test_other_formats(again, format):
    (path,) = make("vary", FOX, "-n", 1)
    other = path.with_suffix(f".{format}")
    save_image(Image.open(path), other, read_record(path), format)
    status, out, _ = again(other, "--photo", FOX)
    assert status == 0
    assert ("equal in every pixel" if format == "webp" else "which is a JPEG and so not exact") in out


# ---- What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exact": False, "reasons": ["generator: x"]}, "expected an image that can be made again, got generator: x"),
        ({"exact": False, "reasons": ["latents: x", "callback: y"]}, "got latents: x; callback: y"),
        ({"seed": None}, "got seed: none is recorded"),
        ({"pipeline__lora": {"a": 1}}, "got lora: it cannot be set again"),
        ({"checkpoint__others": {"vae": {}}}, "got vae: not of this checkpoint"),
        ({"checkpoint__weights": "sha256:" + "0" * 64}, "--checkpoint: expected weights with the digest sha256:000000"),
        ({"checkpoint__name": "../../etc"}, "--checkpoint: expected the checkpoint that the image was made with"),
        ({"checkpoint__name": None}, "--checkpoint: expected the checkpoint that the image was made with, got none"),
        (
            {"scheduler__class": "StableDiffusionImageVariationPipeline"},
            "scheduler: expected one of imvar's schedulers",
        ),
        ({"scheduler__config": {"beta_start": "x"}}, "beta_start: expected"),
        ({"machine__dtype": {"unet": "int8"}}, "dtype: expected one of float32, float16"),
        ({"settings__height": 13}, "height: expected a multiple of 8"),
        ({"settings__guidance_scale": [1, 2, 3]}, "expected"),
        ({"settings__unknown": 1}, "a pipeline and a call that can be made here, got unknown: 1 and none"),
        ({"pipeline__freeu": {"s1": 0}}, "s1: expected"),
        ({"pipeline__components__unet": {"class": "X", "config": "y"}}, "got pipeline.components.unet.class: X and"),
        ({"inputs": []}, "--photo: expected files that the image was made from, got"),
        ({"format": 2}, "expected a record of format 1, got 2"),
    ],
)
def test_records_that_cannot_be_made_again(again, changes, message):
    (path,) = make("vary", FOX, "-n", 1)
    status, out, err = again(change_record(path, **changes), "--photo", FOX)
    assert (status, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1


def test_other_photos_are_refused(again):
    (path,) = make("vary", FOX, "-n", 1)
    changed = Image.open(FOX).convert("RGB")
    changed.putpixel((3, 3), (1, 2, 3))
    changed.save("fox-noto.png")
    for args, message in [
        (["--photo", "fox-noto.png"], "--photo: expected 'fox-noto.png', pixels "),
        ([], "got none"),
        (["--photo", FOX, "--photo", DOG], "--photo: expected files that the image was made from, got "),
        (["--photo", FOX, "--negative", DOG], "--negative: expected files that the image was made from, got "),
        (["--photo", "nowhere.png"], "nowhere.png: expected"),
    ]:
        status, _, err = again(path, *args)
        assert status == 1
        assert message in err
    assert not Path("variations").exists()


def test_an_image_that_was_changed_since(again):
    (path,) = make("vary", FOX, "-n", 1)
    image = Image.open(path)
    image.putpixel((5, 5), (0, 0, 0))
    save_image(image, path, read_record(path))
    status, out, _ = again(path, "--photo", FOX)
    assert status == 1
    assert "differs by at most " in out
    save_image(image.resize((32, 32)), path, read_record(path))
    assert "of another size than" in again(path, "--photo", FOX)[1]


def test_no_path_is_in_a_file(again, folder):
    (path,) = make("vary", FOX, "-n", 1, "--negative", DOG)
    again(path, "--photo", FOX, "--negative", DOG)
    for file in path, folder / "variations" / f"{path.stem}-again.png":
        text = json.dumps(read_record(file)).encode() + file.read_bytes()
        assert b"fox-noto.png" in text
        assert str(folder).encode() not in text
        assert str(EXAMPLES["fox-noto"].parent).encode() not in text


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_the_format_of_saved_images(again, format):
    (path,) = make("vary", FOX, "-n", 1, "--save", format)
    assert path.name == f"fox-noto-0.{format}"
    assert Image.open(path).format == format.upper()
    assert again(path, "--photo", FOX)[0] == 0


def test_without_metadata(again):
    (path,) = make("vary", FOX, "-n", 1, "--no-metadata")
    assert not Image.open(path).info
    assert again(path, "--photo", FOX) == (
        1,
        "",
        f"imvar: {path}: expected a PNG, JPEG or WebP file with a record of imvar, got an image without one\n",
    )
