"""Code written against diffusers changes its import line: names and order of arguments, and options, mean the same."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import imvar
from imvar import CheckpointError, InputError, StableDiffusionImageVariationPipeline
from imvar.conversion import convert
from tests.support.random_checkpoint import tiny_pipeline

MODELS = [
    imvar.UNet2DConditionModel,
    imvar.AutoencoderKL,
    imvar.CLIPVisionModelWithProjection,
    imvar.StableDiffusionSafetyChecker,
]
SETTINGS = [
    imvar.PNDMScheduler,
    imvar.DDIMScheduler,
    imvar.LMSDiscreteScheduler,
    imvar.DDPMScheduler,
    imvar.DPMSolverMultistepScheduler,
    imvar.EulerAncestralDiscreteScheduler,
    imvar.EulerDiscreteScheduler,
    imvar.CLIPImageProcessor,
]
UNET = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def unet():
    return tiny_pipeline().unet


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", [*MODELS, *SETTINGS, StableDiffusionImageVariationPipeline], ids=lambda k: k.__name__)
def test_arguments_have_the_names_of_diffusers(kind):
    def first(method):
        return next(iter(inspect.signature(method).parameters))

    assert first(kind.from_pretrained) == "pretrained_model_name_or_path"
    assert list(inspect.signature(kind.save_pretrained).parameters)[1] == "save_directory"
    if kind in MODELS:
        assert first(kind.from_single_file) == "pretrained_model_link_or_path_or_dict"
    elif kind not in SETTINGS:
        assert first(kind.from_single_file) == "pretrained_model_link_or_path"


def test_arguments_by_position(unet, tmp_path):
    unet.save_pretrained(tmp_path / "model", True, torch.save, False)  # main process, save function, safetensors
    assert (tmp_path / "model" / "diffusion_pytorch_model.bin").exists()
    tiny_pipeline().save_pretrained(tmp_path / "pipeline", False)
    assert imvar.UNet2DConditionModel.from_pretrained(tmp_path / "pipeline", "unet").config.attention_head_dim == 4


def test_options_of_saving(unet, tmp_path):
    unet.save_pretrained(tmp_path / "a", push_to_hub=False, max_shard_size=None, variant=None)
    unet.save_pretrained(tmp_path / "b", is_main_process=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    pipe = tiny_pipeline()
    for thing in (unet, pipe, pipe.scheduler, pipe.feature_extractor):
        for option in ("push_to_hub", "other"):
            with pytest.raises(TypeError, match=f"save_pretrained: expected .*, got unknown argument {option!r}"):
                thing.save_pretrained(tmp_path / "c", **{option: True})
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("variant", ["/../../evil", "a/b", "..", "/abs", 5, "a\0b", " "])
def test_a_variant_is_a_name(unet, tmp_path, variant):
    inner = tmp_path / "one" / "two"
    for saved in (unet, tiny_pipeline()):
        with pytest.raises(InputError, match=r"variant[:=]"):
            saved.save_pretrained(inner / "x", variant=variant)
    unet.save_pretrained(inner / "good")
    with pytest.raises(InputError, match=r"variant[:=]"):
        imvar.UNet2DConditionModel.from_pretrained(inner / "good", variant=variant)
    assert {path.name for path in tmp_path.rglob("*")} == {"one", "two", "good", "config.json", UNET}


def test_pickles_replace_what_would_be_read_instead(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    other = tiny_pipeline(seed=5).unet
    other.save_pretrained(tmp_path, safe_serialization=False)
    assert equal(imvar.UNet2DConditionModel.from_pretrained(tmp_path), other)


@pytest.mark.parametrize("path", ["", None, 3, b"x", "x\0y"])
def test_what_is_no_path(unet, checkpoint, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    for saved in (unet, tiny_pipeline(), imvar.PNDMScheduler()):
        with pytest.raises(InputError, match=r"save_directory: expected .*, got"):
            saved.save_pretrained(path)
    for name in ("source", "target", "fill", "config"):
        if path is not None or name in ("source", "target"):
            with pytest.raises(InputError, match=f"{name}[=:]"):
                convert(**({"source": checkpoint, "target": tmp_path / "x"} | {name: path}))
    for load in (
        imvar.UNet2DConditionModel.from_pretrained,
        StableDiffusionImageVariationPipeline.from_pretrained,
        imvar.UNet2DConditionModel.from_single_file,
    ):
        with pytest.raises((InputError, CheckpointError)):
            load(path)
    assert not list(tmp_path.iterdir())


def test_ways_to_name_a_single_file(unet, checkpoint, tmp_path):
    kind, file = imvar.UNet2DConditionModel, checkpoint / "unet" / UNET
    for named in (
        kind.from_single_file(file, use_safetensors=True, disable_mmap=True, low_cpu_mem_usage=True),
        kind.from_single_file(str(file), config=checkpoint / "unet" / "config.json"),
        kind.from_single_file(load_file(file), config=checkpoint, subfolder="unet", original_config=None),
        kind.from_single_file(unet.state_dict(), config=str(checkpoint)),
    ):
        assert equal(named, unet)
        assert named.config.attention_head_dim == 4
    with pytest.raises(TypeError, match="expected a path, a link or a dictionary of str to tensor"):
        kind.from_single_file({"conv_in.weight": [1.0]})
    with pytest.raises(CheckpointError, match="from_single_file reads files"):
        kind.from_pretrained(file)


def test_extract_ema_says_which_weights(originals):
    kind = imvar.UNet2DConditionModel
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raw, averaged = (kind.from_single_file(originals["full"], extract_ema=ema) for ema in (False, True))
        assert equal(raw, kind.from_single_file(originals["full"], ema="no"))
        assert equal(averaged, kind.from_single_file(originals["full"]))
    assert not equal(raw, averaged)


def test_guessed_settings_are_told(checkpoint, tmp_path):
    alone = tmp_path / "unet.safetensors"
    alone.write_bytes((checkpoint / "unet" / UNET).read_bytes())
    with pytest.warns(UserWarning, match="attention_head_dim=8, norm_num_groups=32"), pytest.raises(CheckpointError):
        imvar.UNet2DConditionModel.from_single_file(alone)  # 16 channels, which are no 32 groups
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        imvar.UNet2DConditionModel.from_single_file(alone, config=checkpoint)
    lines = []
    (tmp_path / "vae").mkdir()
    vae = imvar.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=16,
    )
    save_file(vae.state_dict(), tmp_path / "vae.safetensors")
    convert(tmp_path / "vae.safetensors", tmp_path / "out", dry_run=True, log=lines.append)
    assert any("norm_num_groups=32" in line and "--config" in line for line in lines)


def test_any_length_of_header_is_one(unet, tmp_path):
    """Its lowest byte may look like the beginning of a web page."""
    unet.save_pretrained(tmp_path)
    content = (tmp_path / UNET).read_bytes()
    length = int.from_bytes(content[:8], "little")
    for look in b"<\n\t \xef":
        more = (look - length) % 256
        (tmp_path / UNET).write_bytes(
            (length + more).to_bytes(8, "little") + content[8 : 8 + length] + b" " * more + content[8 + length :]
        )
        assert equal(imvar.UNet2DConditionModel.from_pretrained(tmp_path), unet)
