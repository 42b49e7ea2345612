"""Converted checkpoints in diffusers and transformers: they load, with the outputs of the source and of imvar."""

import diffusers
import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

import imvar
from imvar.conversion import convert
from tests.support.expected_tensors import same_tensors

REFERENCE = {
    "unet": diffusers.UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
    "image_encoder": transformers.CLIPVisionModelWithProjection,
    "safety_checker": StableDiffusionSafetyChecker,
}
IMVAR = {
    "unet": imvar.UNet2DConditionModel,
    "vae": imvar.AutoencoderKL,
    "image_encoder": imvar.CLIPVisionModelWithProjection,
}
UNCHECKED = {"safety_checker": None, "requires_safety_checker": False}


def outputs(models):
    """Return the outputs of a UNet, a VAE and an image encoder for noise."""

    def noise(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))

    with torch.no_grad():
        return [
            models["unet"](noise(1, 4, 8, 8), 7, noise(1, 1, 24)).sample,
            models["vae"].decode(noise(1, 4, 8, 8)).sample,
            models["vae"].encode(noise(1, 3, 32, 32)).latent_dist.mean,
            models["image_encoder"](noise(1, 3, 28, 28)).image_embeds,
        ]


def assert_close(actual, expected, tolerance=1e-5):
    for a, b in zip(actual, expected, strict=True):
        assert b.abs().max() > 1e-2
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def load_models(classes, folder, **options):
    return {part: kind.from_pretrained(folder / part, **options).eval() for part, kind in classes.items()}


@pytest.mark.parametrize("layout", ["full", "v2"])
def test_originals(converted, originals, layout):
    """A pipeline of diffusers has bit-identical tensors to imvar's, and its outputs."""
    pipe = diffusers.StableDiffusionImageVariationPipeline.from_pretrained(converted[layout], **UNCHECKED)
    expected = {part: getattr(pipe, part).float() for part in IMVAR}
    actual = {part: kind.from_single_file(originals[layout]) for part, kind in IMVAR.items()}
    for part, model in actual.items():
        assert same_tensors({"": model.keymap.to_file(model.state_dict())}, {"": expected[part].state_dict()})
    assert_close(outputs(actual), outputs(expected))


def test_an_image(converted, photo):
    images = []
    for kind in (diffusers.StableDiffusionImageVariationPipeline, imvar.StableDiffusionImageVariationPipeline):
        pipe = kind.from_pretrained(converted["v2"], **UNCHECKED)
        pipe.set_progress_bar_config(disable=True)
        images.append(
            torch.as_tensor(
                pipe(
                    photo,
                    height=64,
                    width=64,
                    num_inference_steps=3,
                    guidance_scale=3.0,
                    output_type="np",
                    generator=torch.Generator().manual_seed(0),
                ).images
            )
        )
    assert_close(images[:1], images[1:], 1e-4)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "9MB"}], ids=str)
def test_a_published_folder(published, tmp_path, options):
    """Diffusers and transformers load the same tensors from the new folder as from the old one."""
    convert(published, tmp_path, **options)
    before, after = load_models(REFERENCE, published), load_models(REFERENCE, tmp_path)
    for part, model in before.items():
        tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("position_ids")}
        assert same_tensors({"": tensors}, {"": after[part].state_dict()})
    assert_close(outputs(after), outputs(before))
    pipe = diffusers.StableDiffusionImageVariationPipeline.from_pretrained(tmp_path)
    assert isinstance(pipe.safety_checker, StableDiffusionSafetyChecker)
    old = diffusers.PNDMScheduler.from_pretrained(published / "scheduler")
    assert {key: pipe.scheduler.config[key] for key in old.config if key[0] != "_"} == {
        key: value for key, value in old.config.items() if key[0] != "_"
    }


def test_half_precision(originals, tmp_path):
    convert(originals["full"], tmp_path, dtype="fp16")
    half = load_models({part: REFERENCE[part] for part in IMVAR}, tmp_path, torch_dtype=torch.float16)
    assert {tensor.dtype for model in half.values() for tensor in model.state_dict().values()} == {torch.float16}


@pytest.mark.parametrize("part", ["unet", "vae"])
@pytest.mark.parametrize("source", ["original", "imvar"])
def test_diffusers_reads_the_same_from_single_files(originals, converted, tmp_path, part, source):
    """The original v2 file, and the one that imvar converts the folder to."""
    file = originals["v2"]
    if source == "imvar":
        convert(converted["v2"], file := tmp_path / "v2.safetensors", to="original")
    expected = REFERENCE[part].from_single_file(str(file), config=str(converted["v2"]), subfolder=part)
    actual = IMVAR[part].from_single_file(file)
    assert same_tensors({"": actual.keymap.to_file(actual.state_dict())}, {"": expected.state_dict()})
