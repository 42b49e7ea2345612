"""What is promised on every device: the seed's noise, errors that say what would do, decodes that do not overflow."""

import numpy as np
import pytest
import torch
from random_checkpoint import tiny_pipeline

import imvar


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


def test_out_of_memory_is_named_and_leaves_a_good_pipeline(pipe, photo):
    expected = made(pipe.to("cuda"), photo)
    with pytest.raises(imvar.OutOfMemoryError, match="height and width"):
        made(pipe, photo, height=2**15, width=2**15, num_images_per_prompt=64)
    assert np.array_equal(made(pipe, photo), expected)


def test_half_precision_that_overflows_is_decoded_again(pipe, photo):
    layer = pipe.vae.decoder.up[1].resnets[0].conv1
    layer.weight.data *= 1e5
    layer.bias.data *= 1e5
    wide = made(pipe.to("cuda"), photo)
    with pytest.warns(UserWarning, match="float16 overflowed"):
        assert np.abs(made(pipe.to(torch.float16), photo, latents=None) - wide).mean() < 0.1


def test_parts_on_two_devices_are_named(pipe, photo):
    pipe.unet.to("cuda")
    with pytest.raises(imvar.InputError, match="device"):
        made(pipe, photo)
