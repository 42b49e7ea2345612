"""The bundled checkpoint is complete and small, and found by its name in Python and on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import imvar
from imvar import CheckpointError, InputError, StableDiffusionImageVariationPipeline, cli, loading
from imvar.cli.parser import command_parser
from imvar.cli.render import apply_defaults
from imvar.weights import bundled

NAME = "imvar-emoji"
ROOT = Path(__file__).parents[2]
PARTS = {
    "vae": imvar.AutoencoderKL,
    "unet": imvar.UNet2DConditionModel,
    "image_encoder": imvar.CLIPVisionModelWithProjection,
    "safety_checker": imvar.StableDiffusionSafetyChecker,
}
SETTINGS = {"scheduler": imvar.DDIMScheduler, "feature_extractor": imvar.CLIPImageProcessor}


@pytest.fixture(autouse=True)
def _empty_folder_without_hub(tmp_path, monkeypatch):
    """Work in an empty folder, and fail if the hub is accessed."""

    def refuse(*args, **options):
        raise AssertionError("the hub was accessed")

    for name in ("model_info", "snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, refuse)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusionImageVariationPipeline.from_pretrained(imvar.bundled_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---- the folder


def test_the_folder_is_whole():
    folder = imvar.bundled_checkpoint()
    assert folder == imvar.bundled_checkpoint(NAME) == ROOT / "imvar" / "checkpoints" / NAME
    assert {path.name for path in folder.iterdir()} == {
        "model_index.json",
        *PARTS,
        *SETTINGS,
        "README.md",
        "NOTICE",
        "metrics.json",
        "training.json",
        "examples",
    }
    assert {path.suffix for part in PARTS for path in (folder / part).iterdir()} == {".json", ".safetensors"}
    assert json.loads((folder / "metrics.json").read_text()) is not None
    assert (folder / "README.md").read_text().strip()
    assert (folder / "NOTICE").read_text().strip()


def test_weights_are_small_and_in_half_precision():
    files = sorted(imvar.bundled_checkpoint().rglob("*.safetensors"))
    assert len(files) == len(PARTS)
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    tensors = [tensor for path in files for tensor in load_file(path).values()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in tensors)


def test_examples_are_pictures():
    examples = imvar.bundled_examples()
    assert examples
    assert examples == imvar.bundled_examples(NAME)
    assert list(examples) == sorted(path.stem for path in (imvar.bundled_checkpoint() / "examples").iterdir())
    for name, path in examples.items():
        assert path.name == f"{name}.png"
        picture = imvar.load_image(path)
        assert min(picture.size) >= 64
        assert np.ptp(np.asarray(picture)) > 100


# ---- found by name


def test_by_its_name_with_no_network_and_no_cache(pipe):
    for name, options in ((NAME, {}), (NAME, {"revision": "main"}), (Path(NAME), {"local_files_only": True})):
        named = StableDiffusionImageVariationPipeline.from_pretrained(name, **options)
        for part in PARTS:
            assert equal(getattr(named, part), getattr(pipe, part))
        assert type(named.scheduler) is imvar.DDIMScheduler
        assert dict(named.scheduler.config) == dict(pipe.scheduler.config)
    assert {model.dtype for model in named.modules.values()} == {torch.float32}


@pytest.mark.parametrize("part", PARTS | SETTINGS)
def test_a_part_by_its_name(pipe, part):
    found = (PARTS | SETTINGS)[part].from_pretrained(NAME, subfolder=part)
    assert dict(found.config) == dict(getattr(pipe, part).config)
    if part in PARTS:
        assert found.dtype == torch.float32
        assert equal(found, getattr(pipe, part))


def test_its_settings_for_a_single_file(pipe):
    file = imvar.bundled_checkpoint() / "vae" / "diffusion_pytorch_model.safetensors"
    assert equal(imvar.AutoencoderKL.from_single_file(file, config=NAME), pipe.vae)


def test_a_folder_of_that_name_wins(checkpoint, monkeypatch):
    shutil.copytree(checkpoint, NAME)
    mine = StableDiffusionImageVariationPipeline.from_pretrained(NAME, revision="v2.0")
    assert mine.unet.config.block_out_channels == [16, 32]
    unet = imvar.UNet2DConditionModel.from_pretrained(NAME, subfolder="unet")
    assert equal(unet, mine.unet)
    assert not loading.is_emoji(NAME)
    monkeypatch.chdir("..")
    assert loading.is_emoji(NAME)


def test_a_folder_of_that_name_without_a_checkpoint(capsys):
    Path(NAME).mkdir()
    with pytest.raises(
        CheckpointError, match=r"imvar-emoji: expected a checkpoint, got a folder without one, which hides"
    ):
        StableDiffusionImageVariationPipeline.from_pretrained(NAME)
    assert cli.main(["vary", str(imvar.bundled_examples()["fox-noto"]), "--checkpoint", NAME]) == 1
    assert "hides the bundled checkpoint of its name" in capsys.readouterr().err


def test_another_revision():
    for kind, options in (
        (StableDiffusionImageVariationPipeline, {}),
        (imvar.AutoencoderKL, {"subfolder": "vae"}),
        (imvar.DDIMScheduler, {"subfolder": "scheduler"}),
    ):
        with pytest.raises(
            InputError, match=r"revision: expected None or 'main', got 'v2.0'; imvar-emoji comes with imvar"
        ):
            kind.from_pretrained(NAME, revision="v2.0", **options)


@pytest.mark.parametrize("name", ["imvar-emojis", "emoji", "./imvar-emoji"])
def test_names_that_are_not_there(name):
    with pytest.raises(CheckpointError, match=f"{name}: expected a folder, .* or imvar-emoji, got no such folder"):
        StableDiffusionImageVariationPipeline.from_pretrained(name)


@pytest.mark.parametrize("name", ["emoji", "", "..", None, "lambdalabs/sd-image-variations-diffusers"])
def test_names_that_are_not_bundled(name):
    for ask in (imvar.bundled_checkpoint, imvar.bundled_examples):
        with pytest.raises(InputError, match=r"name: expected a bundled checkpoint \(imvar-emoji\), got"):
            ask(name)


def test_a_copy_of_imvar_without_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bundled, "HOME", tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="got an incomplete installation"):
        StableDiffusionImageVariationPipeline.from_pretrained(NAME)
    assert cli.main(["vary", "--checkpoint", NAME]) == 1
    assert "got an incomplete installation" in capsys.readouterr().err


# ---- the command line


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def same(pipe, path, made, steps):
    """Whether that is the picture that Python makes of `path` with seed 0, up to the rounding of a batch."""
    picture = pipe(
        imvar.load_image(path),
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    return np.abs(pixels(made) - np.asarray(picture)).max() <= 1


def test_without_photos_its_own_drawings(pipe, capsys):
    assert cli.main(["vary", "--checkpoint", NAME, "-n", "2", "--steps", "2", "--device", "cpu"]) == 0
    examples = imvar.bundled_examples()
    names = [f"{name}-{seed}.png" for name in examples for seed in (0, 1)]
    assert sorted(path.name for path in Path("variations").iterdir()) == sorted([*names, "contact-sheet.png"])
    assert {Image.open(f"variations/{name}").size for name in names} == {(64, 64)}
    name, path = next(iter(examples.items()))
    assert same(pipe, path, f"variations/{name}-0.png", steps=2)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("imvar: ")]
    assert len(notes) == 1
    for words in ("drawings in the style of emoji", "not on photographs", f"--checkpoint {loading.CHECKPOINT}"):
        assert words in notes[0]


def test_of_a_photo_with_its_own_defaults(pipe, monkeypatch):
    shutil.copy(ROOT / "tests" / "photos" / "chelsea.jpg", "cat.jpg")
    monkeypatch.setattr(loading, "has_bfloat16", lambda: True)
    assert cli.main(["vary", "cat.jpg", "--checkpoint", NAME, "-n", "1", "-o", "out", "--device", "cpu"]) == 0
    assert {path.name for path in Path("out").iterdir()} == {"cat-0.png", "contact-sheet.png"}
    assert same(pipe, "cat.jpg", "out/cat-0.png", steps=20)


@pytest.mark.parametrize(("size", "said"), [("64", 1), ("32x64", 2)])
def test_a_size_that_it_was_not_trained_at(size, said, capsys):
    fox = str(imvar.bundled_examples()["fox-noto"])
    assert cli.main(["vary", fox, "--checkpoint", NAME, "-n", "1", "--steps", "1", "--size", size]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("imvar: ")]
    assert len(lines) == said
    assert said == 1 or "trained at 64x64" in lines[1]


@pytest.mark.parametrize(
    ("args", "steps", "dtype"),
    [
        ([], 50, "auto"),
        (["--checkpoint", NAME], 20, "float32"),
        (["--checkpoint", NAME, "--steps", "7", "--dtype", "bfloat16"], 7, "bfloat16"),
    ],
)
def test_defaults_of_each_checkpoint(args, steps, dtype):
    found = command_parser().parse_args(["vary", "photo.jpg", *args])
    apply_defaults(found, loading.is_emoji(found.checkpoint))
    assert (found.steps, found.guidance, found.dtype, found.photos) == (steps, 3, dtype, [Path("photo.jpg")])


@pytest.mark.parametrize("args", [[], ["--checkpoint", "owner/name"], ["--checkpoint", "."]], ids=" ".join)
def test_without_photos_and_without_drawings(args, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["vary", *args])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "usage: imvar vary" in said
    assert "PHOTO: expected at least one, got none; name one, or use --checkpoint imvar-emoji" in said


def test_without_photos_where_a_folder_of_that_name_comes_first(capsys):
    """As after `-o imvar-emoji`."""
    Path(NAME).mkdir()
    with pytest.raises(SystemExit):
        cli.main(["vary", "--checkpoint", NAME])
    assert f"{Path(NAME).absolute()} takes precedence over the bundled checkpoint" in capsys.readouterr().err


def test_a_revision_of_it(capsys):
    with pytest.raises(SystemExit):
        cli.main(["vary", "--checkpoint", NAME, "--revision", "v1.0"])
    assert "--revision: expected none for imvar-emoji, which comes with imvar" in capsys.readouterr().err


def test_help_tells_of_it(capsys):
    with pytest.raises(SystemExit):
        cli.main(["vary", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("20 with imvar-emoji", "float32 with imvar-emoji", "not on photographs", "Without a PHOTO"):
        assert words in printed
