"""What is promised on every device: the seed's noise, errors that say what would do, decodes that do not overflow."""

import numpy as np
import pytest
import torch

import imvar
from tests.support.random_checkpoint import tiny_pipeline


def made(pipe, photo, **options):
    return pipe(photo, **({"num_inference_steps": 3, "output_type": "np", "seed": 4} | options)).images


@pytest.fixture
def pipe():
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_seed_has_the_noise_of_the_cpu(pipe, photo, eta):
    pipe.scheduler = imvar.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    expected = made(pipe, photo, num_images_per_prompt=2, eta=eta)
    assert np.abs(made(pipe.to("cuda"), photo, num_images_per_prompt=2, eta=eta) - expected).max() < 1e-3
    assert np.abs(made(pipe, photo, seed=5, eta=eta)[0] - expected[1]).max() < 1e-3


@pytest.mark.parametrize("way", ["plain", "offload"])
def test_half_precision_that_overflows_is_decoded_again(pipe, photo, way):
    layer = pipe.vae.decoder.up_blocks[1].resnets[0].conv1
    layer.weight.data *= 1e4
    layer.bias.data *= 1e4
    pipe.to("cuda", torch.float16)
    layer.weight.data *= 10  # past what float16 holds, in what it makes
    if way == "offload":
        pipe.enable_model_cpu_offload()
    latents = pipe(photo, num_inference_steps=3, output_type="latent", seed=4).images
    with pytest.warns(UserWarning, match="float16 overflowed"):
        narrow = made(pipe, photo)
    pipe.remove_all_hooks()
    pipe.to("cuda", torch.float32)
    with torch.no_grad():
        wide = pipe.image_processor.postprocess(pipe.decode(latents.float()), "np")
    assert np.abs(narrow - wide).max() < 1e-2


def test_parts_on_two_devices_are_named(pipe, photo):
    pipe.unet.to("cuda")
    with pytest.raises(imvar.InputError, match="device"):
        made(pipe, photo)
