"""Exported weights are those that were trained, and imvar and diffusers load them to equal outputs."""

import json
import shutil

import diffusers
import pytest
import torch
from finetuning.export import adapter_key, export
from finetuning.settings import Settings
from finetuning.state import Run
from finetuning.trainable import CONSTANT, MovingAverage, choose_parameters
from safetensors import safe_open
from safetensors.torch import load_file

from imvar import StableDiffusionImageVariationPipeline
from imvar.loading import load_pipeline

TOLERANCE = 2e-6  # of the largest value: float32 in another order
RANK, ALPHA = 4, 6.0
COMPONENTS = ("feature_extractor", "image_encoder", "safety_checker", "scheduler", "unet", "vae")


def train(settings, scale=0.1):
    """Write the state of a run whose parameters have random values, and return its UNet with the last ones."""
    settings.out.mkdir()
    unet = load_pipeline(settings.checkpoint, None, None, torch.float32).unet
    parameters = choose_parameters(unet, settings.stage, settings.rank, settings.alpha)
    average = None if settings.ema_decay is None else MovingAverage(parameters, settings.ema_decay)
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters.values():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    optimizer = torch.optim.AdamW(parameters.values())
    Run(unet, parameters, optimizer, average, settings.recipe(1), step=7).save(settings.out, True)
    return unet.eval()


def settings_for(tmp_path, checkpoint, **changes):
    options = {"stage": "lora", "rank": RANK, "alpha": ALPHA, "ema_decay": None} | changes
    return Settings([], tmp_path / "out", str(checkpoint), **options)


@torch.no_grad()
def output(unet):
    """Return what a UNet of imvar or diffusers predicts for the same inputs."""
    generator = torch.Generator().manual_seed(1)
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    latents = torch.randn(2, unet.config.in_channels, side, side, generator=generator)
    embedding = torch.randn(2, 1, width, generator=generator)
    return unet(latents, torch.tensor([10, 900]), embedding, return_dict=False)[0]


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert float((actual - expected).abs().max()) <= tolerance * float(expected.abs().max())


def diffusers_unet(folder):
    return diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()


def images(pipe, photo):
    """Return the images of a pipeline of imvar or diffusers, from the same latents."""
    unet = pipe.unet.config
    shape = (1, unet.in_channels, unet.sample_size, unet.sample_size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    pipe.set_progress_bar_config(disable=True)
    return torch.from_numpy(pipe(photo, latents=latents, num_inference_steps=3, output_type="np").images)


def test_an_adapter_loads_in_imvar_and_diffusers(checkpoint, tmp_path):
    """Its alpha is not its rank, so that a reader that lost it would show; a reader may ignore the config."""
    settings = settings_for(tmp_path, checkpoint)
    trained = output(train(settings))
    path = export(settings)
    assert path == settings.out / "pytorch_lora_weights.safetensors"
    (settings.out / "bank.safetensors").write_bytes(path.read_bytes())  # another file in the folder
    base = load_pipeline(str(checkpoint), None, None, torch.float32)
    assert (output(base.unet) - trained).abs().max() > 0.01
    for source in (settings.out, path):
        pipe = load_pipeline(str(checkpoint), None, None, torch.float32)
        pipe.load_lora_weights(source)
        assert_close(output(pipe.unet), trained)
    for source, options in ((settings.out, {"weight_name": path.name}), (path, {"use_safetensors": True}), (path, {})):
        reference = diffusers_unet(checkpoint)
        reference.load_lora_adapter(source, prefix="unet", **options)  # without options, it ignores the metadata
        assert_close(output(reference), trained)
    pipeline = diffusers.StableDiffusionPipeline(
        base.components["vae"],
        None,
        None,
        diffusers_unet(checkpoint),
        diffusers.DDIMScheduler(),
        None,
        None,
        None,
        False,
    )
    pipeline.load_lora_weights(settings.out)
    assert_close(output(pipeline.unet), trained)


def test_names_of_an_adapter():
    """ComfyUI has the names of attention layers with "processor", and without the index of to_out."""
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2"
    assert adapter_key(f"{layer}.to_q", "up") == f"unet.{layer}.processor.to_q_lora.up.weight"
    assert adapter_key(f"{layer}.to_out.0", "down") == f"unet.{layer}.processor.to_out_lora.down.weight"
    assert adapter_key("mid_block.attentions.0.proj_in", "up") == "unet.mid_block.attentions.0.proj_in.lora.up.weight"


def test_a_merged_adapter_is_a_checkpoint(folder, tmp_path, photo):
    """It has all components of the base, and its licence, and gives the images of the adapter."""
    (folder / "NOTICE").write_text("credits")
    settings = settings_for(tmp_path, folder, merge=True)
    trained = output(train(settings))
    exported = export(settings)
    assert exported == settings.out / "checkpoint"
    assert (settings.out / "pytorch_lora_weights.safetensors").exists()
    assert {"model_index.json", "README.md", "training.json", "NOTICE", *COMPONENTS} == {
        path.name for path in exported.iterdir()
    }
    assert (exported / "NOTICE").read_text() == "credits"
    assert "license_link: NOTICE" in (exported / "README.md").read_text()
    pipe = StableDiffusionImageVariationPipeline.from_pretrained(exported)
    assert_close(output(pipe.unet), trained)
    reference = diffusers.StableDiffusionImageVariationPipeline.from_pretrained(exported)
    assert_close(output(reference.unet), trained)
    adapted = load_pipeline(str(folder), None, None, torch.float32)
    adapted.load_lora_weights(settings.out)
    for other in (pipe, reference):
        assert_close(images(other, photo), images(adapted, photo), tolerance=5e-6)


@pytest.mark.parametrize("stage", ["cross-attention", "unet"])
def test_a_trained_unet_beside_the_frozen_weights_of_the_base(checkpoint, tmp_path, stage):
    """The trained ones are bit for bit the trained ones, in both libraries, and all others those of the base."""
    settings = settings_for(tmp_path, checkpoint, stage=stage)
    trained = train(settings)
    exported = export(settings)
    pipe = StableDiffusionImageVariationPipeline.from_pretrained(exported)
    base = StableDiffusionImageVariationPipeline.from_pretrained(checkpoint)
    reference = diffusers.StableDiffusionImageVariationPipeline.from_pretrained(exported)
    assert_close(output(reference.unet), output(trained))
    changed = {name for name, value in base.unet.state_dict().items() if not value.equal(pipe.unet.state_dict()[name])}
    chosen = {name for name in base.unet.state_dict() if stage == "unet" or ".attn2." in name}
    assert changed == {name for name in chosen if not CONSTANT.search(name)}
    for name, value in trained.state_dict().items():
        assert value.equal(pipe.unet.state_dict()[name])
        assert value.equal(reference.unet.state_dict()[name])
    for part in ("vae", "image_encoder", "safety_checker"):
        values = base.modules[part].state_dict()
        for other in (pipe.modules[part], getattr(reference, part)):
            assert all(values[name].equal(value) for name, value in other.state_dict().items() if name in values)


@pytest.mark.parametrize("base", ["legacy", "half", "single file"])
def test_any_checkpoint_is_a_base(base, published, checkpoint, small, tmp_path):
    """In the published layout of 2022, in half precision, and a single file, which has no safety checker."""
    if base == "half":
        source = tmp_path / "half"
        StableDiffusionImageVariationPipeline.from_pretrained(checkpoint, dtype=torch.float16).save_pretrained(source)
    else:
        source = {"legacy": published, "single file": small}[base]
    settings = settings_for(tmp_path, source, stage="cross-attention")
    trained = output(train(settings))
    exported = export(settings)
    assert StableDiffusionImageVariationPipeline.from_pretrained(exported).unet.dtype == torch.float32
    reference = diffusers.StableDiffusionImageVariationPipeline.from_pretrained(exported)
    assert_close(output(reference.unet), trained)
    assert (reference.safety_checker is None) == (base == "single file")


@pytest.mark.parametrize("averaged", [True, False])
def test_the_moving_average_is_exported_by_default(checkpoint, tmp_path, averaged):
    """Here it has the values from before the training."""
    settings = settings_for(tmp_path, checkpoint, stage="cross-attention", ema_decay=0.99)
    trained = train(settings)
    exported = StableDiffusionImageVariationPipeline.from_pretrained(export(settings, averaged))
    base = StableDiffusionImageVariationPipeline.from_pretrained(checkpoint)
    expected = (base.unet if averaged else trained).state_dict()
    assert all(value.equal(expected[name]) for name, value in exported.unet.state_dict().items())
    record = json.loads((settings.out / "training.json").read_text())
    assert record["exported weights"] == ("moving average" if averaged else "last step")


def test_the_record_is_in_the_adapter(checkpoint, tmp_path):
    settings = settings_for(tmp_path, checkpoint)
    train(settings)
    (settings.out / "log.jsonl").write_text('{"step": 5, "loss": 0.5}\n{"step": 7, "loss": 0.25}\n{"step": 9, "lo')
    path = export(settings)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    record = json.loads(metadata["training"])
    assert record == json.loads((settings.out / "training.json").read_text())
    assert (record["step"], record["loss"], record["stage"]) == (7, 0.25, "lora")
    assert record["checkpoint"]["name"] == checkpoint.name
    assert record["checkpoint"]["weights"].startswith("sha256:")
    assert json.loads(metadata["lora_adapter_metadata"])["unet.r"] == RANK


def test_an_export_alone_is_of_the_run(checkpoint, tmp_path):
    """Its checkpoint, stage and rank are those of the saved state."""
    settings = settings_for(tmp_path, checkpoint)
    train(settings)
    expected = load_file(export(settings))
    shutil.rmtree(settings.out / "checkpoint", ignore_errors=True)
    path = export(Settings([], settings.out, stage="unet"))
    assert all(expected[name].equal(value) for name, value in load_file(path).items())


def test_an_export_without_a_state(checkpoint, tmp_path):
    settings = settings_for(tmp_path, checkpoint)
    with pytest.raises(SystemExit, match=r"state\.pt: expected the state of a run"):
        export(settings)


def test_an_export_of_another_checkpoint(folder, published, tmp_path):
    settings = settings_for(tmp_path, folder)
    train(settings)
    shutil.rmtree(folder)
    shutil.copytree(published, folder)
    with pytest.raises(SystemExit, match=r"state\.pt: \S+: expected shape .* of .*, got"):
        export(settings)
