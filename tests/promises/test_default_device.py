"""PyTorch's default device moves nothing that has values: what is loaded while it is "meta" is whole.

diffusers loads models then, too; its pipeline, whose schedulers would be without values, is refused by transformers.
"""

import contextlib

import pytest
import torch

import imvar
from imvar import StableDiffusionImageVariationPipeline as Pipeline
from imvar.conversion import convert
from imvar.kernels import cpu_kernels
from tests.support.random_checkpoint import TINY_UNET, TINY_VAE, randomize

SCHEDULERS = [
    imvar.DDIMScheduler,
    imvar.DDPMScheduler,
    imvar.DPMSolverMultistepScheduler,
    imvar.EulerAncestralDiscreteScheduler,
    imvar.EulerDiscreteScheduler,
    imvar.LMSDiscreteScheduler,
    imvar.PNDMScheduler,
]


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.fixture(params=["default", "context"])
def on_meta(request):
    return lambda: default_device("meta") if request.param == "default" else torch.device("meta")


def images_of(pipe, photo):
    pipe.set_progress_bar_config(disable=True)
    return pipe(photo, num_inference_steps=3, output_type="pt", seed=0).images


LOADS = {
    "folder": lambda checkpoint, published, small: Pipeline.from_pretrained(checkpoint),
    "without memory mapping": lambda checkpoint, published, small: Pipeline.from_pretrained(
        checkpoint, disable_mmap=True
    ),
    "pickles": lambda checkpoint, published, small: Pipeline.from_pretrained(published, use_safetensors=False),
    "cast": lambda checkpoint, published, small: Pipeline.from_pretrained(checkpoint, dtype=torch.bfloat16),
    "single file": lambda checkpoint, published, small: Pipeline.from_single_file(small),
}


@pytest.mark.parametrize("load", LOADS)
def test_a_pipeline_is_loaded_with_values(on_meta, load, checkpoint, published, small, photo):
    files = checkpoint, published, small
    expected = images_of(LOADS[load](*files), photo)
    with on_meta():
        pipe = LOADS[load](*files)
    tables = [value for value in vars(pipe.scheduler).values() if isinstance(value, torch.Tensor)]
    assert {tensor.device.type for tensor in tables} == {"cpu"}
    assert torch.equal(images_of(pipe, photo), expected)
    with on_meta():
        assert torch.equal(images_of(pipe, photo), expected)


def test_kernels_are_tried_on_the_cpu(on_meta):
    with on_meta():
        is_available = cpu_kernels.has_onednn_linear.__wrapped__(torch.float32)
    assert is_available == cpu_kernels.has_onednn_linear.__wrapped__(torch.float32)


@pytest.mark.parametrize("part", ["unet", "vae", "image_encoder", "safety_checker"])
def test_a_model_is_loaded_with_values(on_meta, part, checkpoint):
    kind = type(getattr(Pipeline.from_pretrained(checkpoint), part))
    with on_meta():
        model = kind.from_pretrained(checkpoint, subfolder=part)
    expected = kind.from_pretrained(checkpoint, subfolder=part).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_computes_on_the_cpu(on_meta, kind, checkpoint):
    sample, output = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()

    def run(scheduler):
        scheduler.set_timesteps(5)
        torch.manual_seed(0)
        result = sample
        for t in scheduler.timesteps:
            result = scheduler.step(output, t, scheduler.scale_model_input(result, t)).prev_sample
        return result

    expected = run(kind.from_pretrained(checkpoint, subfolder="scheduler"))
    with on_meta():
        loaded, made = kind.from_pretrained(checkpoint, subfolder="scheduler"), kind(beta_schedule="linear")
        assert torch.equal(run(loaded), expected)
    assert torch.equal(run(loaded), expected)
    assert torch.equal(run(made), run(kind(beta_schedule="linear")))


@pytest.mark.parametrize(
    ("kind", "settings"), [(imvar.UNet2DConditionModel, TINY_UNET), (imvar.AutoencoderKL, TINY_VAE)]
)
def test_a_model_that_is_made_from_a_config_has_the_default_device(on_meta, kind, settings):
    with on_meta():
        models = kind(**settings), kind.from_config(kind(**settings).config)
    assert {tensor.device.type for model in models for tensor in model.state_dict().values()} == {"meta"}


def test_a_conversion_writes_values(on_meta, checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "expected.safetensors", to="original", dtype="fp16")
    with on_meta():
        convert(checkpoint, tmp_path / "half.safetensors", to="original", dtype="fp16")
    assert (tmp_path / "half.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_training_steps_stay_on_the_device_of_the_weights(on_meta):
    unet = randomize(imvar.UNet2DConditionModel(**TINY_UNET), 0).train()
    sample, context = torch.randn(1, 4, 8, 8), torch.randn(1, 1, 24)
    with on_meta():
        unet(sample, 5, context).sample.square().mean().backward()
    assert all(parameter.grad.device.type == "cpu" for parameter in unet.parameters())
