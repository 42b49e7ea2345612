"""`from_single_file` loads the same as `from_pretrained` of the folder that the file is converted to."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import imvar
from imvar import CheckpointError, InputError, StableDiffusionImageVariationPipeline
from imvar.conversion import convert
from tests.support.expected_tensors import config_fields, same_tensors
from tests.support.original_checkpoint import LAYOUTS, original, write
from tests.support.random_checkpoint import TINY_VAE, randomize

PARTS = {
    "unet": imvar.UNet2DConditionModel,
    "vae": imvar.AutoencoderKL,
    "image_encoder": imvar.CLIPVisionModelWithProjection,
    "safety_checker": imvar.StableDiffusionSafetyChecker,
}
IN_ORIGINALS = {part: PARTS[part] for part in ("unet", "vae", "image_encoder")}
UNCHECKED = {"safety_checker": None, "requires_safety_checker": False}


def same_model(a, b):
    return same_tensors({"": a.state_dict()}, {"": b.state_dict()}) and config_fields(a.config) == config_fields(
        b.config
    )


def make_image(pipe, photo):
    """Return an image made with copied weights: mapped ones are not aligned, which changes rounding."""
    for model in pipe.modules.values():
        model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        photo,
        height=64,
        width=64,
        num_inference_steps=1,
        guidance_scale=2.0,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images


# Equality with the converted folder


@pytest.mark.filterwarnings("ignore:safety_checker=None")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pipeline_of_every_layout(originals, converted, layout, photo):
    """Components, configs and images are bit-identical to those of the converted folder."""
    pipe = StableDiffusionImageVariationPipeline.from_single_file(originals[layout])
    other = StableDiffusionImageVariationPipeline.from_pretrained(converted[layout], **UNCHECKED)
    for part in IN_ORIGINALS:
        assert same_model(getattr(pipe, part), getattr(other, part))
        assert getattr(pipe, part).dtype == torch.float32
        assert not getattr(pipe, part).training
    for part in ("scheduler", "feature_extractor"):
        assert config_fields(getattr(pipe, part).config) == config_fields(getattr(other, part).config)
        assert type(getattr(pipe, part)) is type(getattr(other, part))
    assert pipe.safety_checker is None
    if layout != "ema_only":  # which has the same tensors as `full`
        pixels = make_image(pipe, photo)
        assert pixels.isfinite().all()
        assert torch.equal(pixels, make_image(other, photo))


def test_every_part(originals, converted):
    for part, kind in IN_ORIGINALS.items():
        assert same_model(
            kind.from_single_file(originals["full"]), kind.from_pretrained(converted["full"], subfolder=part)
        )
    with pytest.raises(CheckpointError, match="the safety_checker, got those of unet and vae and image_encoder"):
        PARTS["safety_checker"].from_single_file(originals["full"])


def test_raw_and_averaged_weights(originals):
    raw, averaged = (
        imvar.UNet2DConditionModel.from_single_file(originals["full"], ema=ema).conv_in.weight for ema in ("no", "yes")
    )
    tensors = original("full")["state_dict"]
    assert averaged.equal(tensors["model_ema.diffusion_modelinput_blocks00weight"])
    assert raw.equal(tensors["model.diffusion_model.input_blocks.0.0.weight"])
    for layout, ema in (("v2", "yes"), ("ema_only", "no")):
        with pytest.raises(CheckpointError, match=f"ema='{ema}'"):
            StableDiffusionImageVariationPipeline.from_single_file(originals[layout], ema=ema)
    with pytest.raises(InputError, match=r"ema: expected .*, got 'both'"):
        imvar.AutoencoderKL.from_single_file(originals["v2"], ema="both")


@pytest.mark.parametrize("part", PARTS)
def test_the_file_of_one_part(checkpoint, tmp_path, part):
    """Next to its config in a folder; alone under the names of `state_dict`, with the config of another folder."""
    model = PARTS[part].from_pretrained(checkpoint, subfolder=part)
    (file,) = (checkpoint / part).glob("*.safetensors")
    assert same_model(PARTS[part].from_single_file(file), model)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    for where in (checkpoint, checkpoint / part):
        assert same_model(PARTS[part].from_single_file(tmp_path / "weights.pt", config=where), model)
    assert same_model(PARTS[part].from_single_file(tmp_path / "weights.pt", config=checkpoint, subfolder=part), model)


def test_a_published_autoencoder_file(tmp_path):
    """The original names without a prefix, and the tensors of training."""
    sizes = {"block_out_channels": (32, 32, 32, 64), "norm_num_groups": 32}
    vae = randomize(imvar.AutoencoderKL(**TINY_VAE | sizes), 0)
    vae.save_pretrained(tmp_path / "vae")
    convert(tmp_path / "vae", tmp_path / "prefixed.safetensors", to="original")
    tensors = {
        name.removeprefix("first_stage_model."): tensor
        for name, tensor in load_file(tmp_path / "prefixed.safetensors").items()
    }
    tensors |= {
        "loss.logvar": torch.zeros(()),
        "loss.discriminator.main.0.weight": torch.ones(2, 3, 4, 4),
        "model_ema.decay": torch.tensor(0.99),
        "model_ema.num_updates": torch.tensor(3, dtype=torch.int32),
    }
    torch.save({"state_dict": tensors, "global_step": 840000}, tmp_path / "vae.ckpt")
    loaded = imvar.AutoencoderKL.from_single_file(tmp_path / "vae.ckpt")
    assert same_tensors({"": loaded.state_dict()}, {"": vae.state_dict()})
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(x).sample, vae(x).sample)


# Options


def test_files_of_imvar_contain_configs(small, checkpoint):
    """The heads of a tiny encoder, and the sizes of a checkpoint, cannot be inferred from tensors."""
    pipe = StableDiffusionImageVariationPipeline.from_single_file(small, **UNCHECKED)
    other = StableDiffusionImageVariationPipeline.from_pretrained(checkpoint, **UNCHECKED)
    for part, value in pipe.components.items():
        if value is not None:
            assert config_fields(value.config) == config_fields(getattr(other, part).config), part
    assert pipe.unet.config.sample_size == 16


@pytest.mark.parametrize("name", ["blob", "M.SAFETENSORS", "model.safetensors.part"])
@pytest.mark.filterwarnings("error")
def test_configs_are_found_whatever_the_file_is_called(small, tmp_path, name):
    """The content decides what a file is, as in the hub's cache, where no file has an ending."""
    renamed = shutil.copy(small, tmp_path / name)
    pipe = StableDiffusionImageVariationPipeline.from_single_file(renamed, **UNCHECKED)
    other = StableDiffusionImageVariationPipeline.from_single_file(small, **UNCHECKED)
    assert all(same_model(model, other.modules[part]) for part, model in pipe.modules.items())
    assert config_fields(pipe.scheduler.config) == config_fields(other.scheduler.config)
    assert same_model(imvar.UNet2DConditionModel.from_single_file(renamed), other.unet)
    convert(renamed, tmp_path / "converted")
    assert same_model(imvar.UNet2DConditionModel.from_pretrained(tmp_path / "converted" / "unet"), other.unet)


def test_config_of_a_folder_takes_precedence(small, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "settings", ignore=shutil.ignore_patterns("*.safetensors"))
    for name, key, value in (
        ("unet/config.json", "sample_size", 24),
        ("scheduler/scheduler_config.json", "_class_name", "LMSDiscreteScheduler"),
    ):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | {key: value}))
    pipe = StableDiffusionImageVariationPipeline.from_single_file(small, config=folder, **UNCHECKED)
    assert pipe.unet.config.sample_size == 24
    assert type(pipe.scheduler) is imvar.LMSDiscreteScheduler
    assert imvar.UNet2DConditionModel.from_single_file(small, config=folder, sample_size=8).config.sample_size == 8
    shutil.rmtree(folder / "vae")
    with pytest.raises(CheckpointError, match=r"expected vae/config\.json or config\.json"):
        StableDiffusionImageVariationPipeline.from_single_file(small, config=folder)


def test_dtypes(small):
    load = StableDiffusionImageVariationPipeline.from_single_file
    kinds = {
        part: model.dtype
        for part, model in load(
            small, dtype={"unet": "bfloat16", "default": torch.float16}, **UNCHECKED
        ).modules.items()
    }
    assert kinds == {"unet": torch.bfloat16, "vae": torch.float16, "image_encoder": torch.float16}
    assert load(small, torch_dtype=torch.float16, **UNCHECKED).unet.dtype == torch.float16
    with pytest.raises(TypeError, match="text_encoder"):
        load(small, dtype={"text_encoder": torch.float16})


def test_dtype_auto_is_the_widest_in_the_file(originals, converted):
    kind = imvar.CLIPVisionModelWithProjection
    for encoder in (
        kind.from_single_file(originals["full"], dtype="auto"),
        kind.from_pretrained(converted["full"], subfolder="image_encoder", torch_dtype="auto"),
    ):
        assert {tensor.dtype for tensor in encoder.state_dict().values()} == {torch.float32}


def test_overrides(small, checkpoint):
    checker = imvar.StableDiffusionSafetyChecker.from_pretrained(checkpoint, subfolder="safety_checker")
    scheduler = imvar.DDIMScheduler()
    pipe = StableDiffusionImageVariationPipeline.from_single_file(small, safety_checker=checker, scheduler=scheduler)
    assert (pipe.safety_checker, pipe.scheduler) == (checker, scheduler)
    with pytest.warns(UserWarning, match="images are returned unchecked"):
        StableDiffusionImageVariationPipeline.from_single_file(small)
    with pytest.raises(TypeError, match="tokenizer"):
        StableDiffusionImageVariationPipeline.from_single_file(small, tokenizer=checker)


def test_an_override_of_a_missing_part(small, checkpoint, tmp_path):
    tensors = {name: tensor for name, tensor in load_file(small).items() if not name.startswith("cond_stage_model.")}
    with safe_open(small, "pt") as file:
        save_file(tensors, tmp_path / "half.safetensors", file.metadata())
    load = StableDiffusionImageVariationPipeline.from_single_file
    with pytest.raises(CheckpointError, match=r"got no image_encoder; pass image_encoder="):
        load(tmp_path / "half.safetensors")
    encoder = imvar.CLIPVisionModelWithProjection.from_pretrained(checkpoint, subfolder="image_encoder")
    assert load(tmp_path / "half.safetensors", image_encoder=encoder, **UNCHECKED).image_encoder is encoder


# The hub


@pytest.mark.parametrize("source", ["nowhere.ckpt", "owner/name", "https://example.com/owner/name/x.ckpt", "/x/y.ckpt"])
def test_no_such_file(source):
    with pytest.raises(CheckpointError, match="no such file"):
        StableDiffusionImageVariationPipeline.from_single_file(source)


# Errors


def test_folders_are_for_from_pretrained(checkpoint):
    for kind in (StableDiffusionImageVariationPipeline, imvar.UNet2DConditionModel):
        with pytest.raises(CheckpointError, match="expected a file, got a folder; from_pretrained reads folders"):
            kind.from_single_file(checkpoint)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("other", PARTS)
def test_the_file_of_another_part(checkpoint, tmp_path, part, other):
    """The error names both parts, for a file and for a folder with swapped files."""
    if part == other:
        return
    (file,), (mine,) = ((checkpoint / name).glob("*.safetensors") for name in (other, part))
    with pytest.raises(CheckpointError, match=f"expected tensors of the {part}, got those of {other}"):
        PARTS[part].from_single_file(file)
    shutil.copy(checkpoint / part / "config.json", tmp_path)
    shutil.copy(file, tmp_path / mine.name)
    with pytest.raises(CheckpointError, match=f"expected weights of the {part}, got those of the {other}") as caught:
        PARTS[part].from_pretrained(tmp_path)
    assert caught.value.path == tmp_path / mine.name


@pytest.mark.parametrize(
    "tower", ["transformer.text_model.encoder.layers.0.mlp.fc1.weight", "model.transformer.resblocks.0.ln_1.weight"]
)
def test_text_to_image_checkpoints(small, tmp_path, tower):
    tensors = {name: tensor for name, tensor in load_file(small).items() if not name.startswith("cond_stage_model.")}
    with safe_open(small, "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors | {f"cond_stage_model.{tower}": torch.ones(8, 8)}, tmp_path / "sd.safetensors", metadata)
    for load in (
        StableDiffusionImageVariationPipeline.from_single_file,
        PARTS["image_encoder"].from_single_file,
        lambda file: convert(file, tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError, match="as in text-to-image checkpoints; load its UNet or VAE alone"):
            load(tmp_path / "sd.safetensors")
    for part in ("unet", "vae"):
        assert same_model(
            PARTS[part].from_single_file(tmp_path / "sd.safetensors"), PARTS[part].from_single_file(small)
        )


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda text: text[:-1],
        lambda text: "[]",
        lambda text: '{"unet": 3}',
        lambda text: '{"unet": {"act_fn": "no"}}',
        lambda text: json.dumps(json.loads(text) | {"scheduler": {}}),
    ],
)
def test_invalid_configs_in_a_file(small, tmp_path, corrupt):
    with safe_open(small, "pt") as opened:
        text = corrupt(opened.metadata()["imvar.settings"])
    save_file(load_file(small), tmp_path / "x.safetensors", {"imvar.settings": text})
    with pytest.raises(CheckpointError) as caught:
        StableDiffusionImageVariationPipeline.from_single_file(tmp_path / "x.safetensors")
    assert caught.value.path == tmp_path / "x.safetensors"


def test_harmful_pickles_are_refused(tmp_path, capsys):
    class Harmful:
        def __reduce__(self):
            return (print, ("this must never run",))

    write(tmp_path / "x.ckpt", original("v2") | {"callbacks": Harmful()})
    with pytest.raises(CheckpointError, match=r"references builtins\.print"):
        StableDiffusionImageVariationPipeline.from_single_file(tmp_path / "x.ckpt")
    assert "never" not in capsys.readouterr().out
