"""Every argument that controls a variation, against every promise of a call."""

import copy
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from imvar import InputError, Region
from tests.support.random_checkpoint import tiny_pipeline

LEFT = torch.cat([torch.ones(16, 8), torch.zeros(16, 8)], dim=1)


def falling(fraction):
    return 6 - 6 * fraction


def brighten(pipe, step, timestep, tensors):
    return {"latents": tensors["latents"] + 0.01}


def see(pipe, step, timestep, tensors):
    assert tensors["pred_original_sample"].shape == tensors["latents"].shape
    return {}


ARGUMENTS = {
    "image_embeds": lambda photo, embeds: {"image": None, "image_embeds": embeds[:1]},
    "negative_image_embeds": lambda photo, embeds: {"negative_image_embeds": embeds[1:]},
    "masked regions": lambda photo, embeds: {
        "image": None,
        "image_embeds": [Region(embeds[:1]), Region(embeds[1:], mask=LEFT)],
    },
    "scaled regions": lambda photo, embeds: {
        "image": None,
        "image_embeds": [
            Region(embeds[:1], scale={"up_blocks.1": 0.7}),
            Region(embeds[1:], scale={"down_blocks.0": 1}),
        ],
    },
    "init_image": lambda photo, embeds: {"init_image": photo.rotate(90), "strength": 0.6},
    "mask_image": lambda photo, embeds: {
        "init_image": photo.rotate(90),
        "mask_image": Image.linear_gradient("L"),
        "paste": True,
    },
    "guidance_scale": lambda photo, embeds: {"guidance_scale": falling},
    "guidance_rescale": lambda photo, embeds: {"guidance_rescale": 0.7},
    "callback_on_step_end": lambda photo, embeds: {"callback_on_step_end": brighten},
    "pred_original_sample": lambda photo, embeds: {
        "callback_on_step_end": see,
        "callback_on_step_end_tensor_inputs": ["latents", "pred_original_sample"],
    },
}


@pytest.fixture(params=ARGUMENTS)
def options(request, pipe, photo):
    """The options of a call with one of the arguments."""
    embeds = torch.randn(2, 1, pipe.unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(0))
    return {"image": photo, **ARGUMENTS[request.param](photo, embeds)}


def run(pipe, options, **more):
    defaults = {"num_inference_steps": 4, "guidance_scale": 3, "output_type": "pt", "seed": 0}
    return pipe(**(defaults | options | more)).images


def equal_up_to_rounding(a, b):
    return torch.allclose(a, b, atol=2e-5)


def test_it_has_an_effect(pipe, options, photo, request):
    plain = run(pipe, {"image": photo})
    same = equal_up_to_rounding(run(pipe, options), plain)
    assert same == (request.node.callspec.params["options"] == "pred_original_sample")


def test_a_seed_gives_the_same_variation_in_any_batch(pipe, options):
    together = run(pipe, options, num_images_per_prompt=3, seed=[7, 8, 9])
    for image, seed in zip(together, (7, 8, 9), strict=True):
        assert equal_up_to_rounding(run(pipe, options, seed=seed)[0], image)


def test_the_next_call_is_a_plain_one_again(pipe, options, photo):
    plain = run(pipe, {"image": photo})
    run(pipe, options)
    assert torch.equal(run(pipe, {"image": photo}), plain)


def test_threads_do_not_see_each_other(pipe, options, photo):
    expected = [run(pipe, {"image": photo}), run(pipe, options)]
    made = [None, None]

    def work(k):
        made[k] = run(pipe, (({"image": photo}), options)[k])

    threads = [threading.Thread(target=work, args=[k]) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


@pytest.mark.parametrize("setting", ["sliced", "offloaded", "copied"])
def test_settings_that_change_no_result(pipe, options, setting):
    expected = run(pipe, options)
    if setting == "sliced":
        pipe.enable_attention_slicing("max")
        pipe.enable_vae_slicing()
    elif setting == "offloaded":
        pipe.enable_model_cpu_offload(device="cpu:0")
    else:
        pipe = copy.deepcopy(pipe)
    assert equal_up_to_rounding(run(pipe, options), expected)


@pytest.fixture(scope="module")
def compiled_pipe():
    """Compiled once: what arguments share is not compiled for each."""
    torch._dynamo.reset()
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.compile(backend="eager")
    return pipe


@pytest.mark.filterwarnings("error::UserWarning")  # a fallback would be one
def test_compiled(pipe, compiled_pipe, options):
    assert torch.allclose(run(compiled_pipe, options), run(pipe, options), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(pipe, options, dtype):
    expected = run(pipe, options)
    half = run(pipe.to(dtype), options).float()
    assert half.isfinite().all()
    assert (half - expected).abs().mean() < 0.03


@pytest.mark.parametrize(
    ("scheduler", "approximation"),
    [
        ("DDIMScheduler", {"cache_interval": 2}),
        ("LMSDiscreteScheduler", {"guidance_interval": (0.2, 0.8)}),
        ("EulerDiscreteScheduler", {"cache_interval": 2, "guidance_interval": (0.2, 0.8)}),
    ],
)
def test_approximations_and_schedulers_go_together(pipe, options, scheduler, approximation):
    import imvar

    pipe.scheduler = getattr(imvar, scheduler).from_config(pipe.scheduler.config)
    made = run(pipe, options, **approximation)
    assert made.isfinite().all()
    assert torch.equal(made, run(pipe, options, **approximation))


@pytest.mark.parametrize("kind", ["pil", "np", "pt", "latent"])
def test_every_type_of_output(pipe, options, kind):
    if options.get("paste") and kind == "latent":
        with pytest.raises(InputError, match="paste"):
            run(pipe, options, output_type=kind)
        return
    made = run(pipe, options, output_type=kind)
    expected = run(pipe, options)
    if kind == "pil":
        made = torch.from_numpy(np.stack([np.asarray(image) for image in made])).movedim(-1, 1) / 255
        assert (made - expected).abs().max() <= 0.5001 / 255
    elif kind == "np":
        assert torch.equal(torch.from_numpy(made).movedim(-1, 1), expected)
    elif kind == "pt":
        assert torch.equal(made, expected)
    else:
        assert made.shape == (1, 4, 16, 16)


def test_an_error_on_the_way_changes_nothing(pipe, options, photo):
    plain = run(pipe, {"image": photo})
    handle = pipe.vae.decoder.conv_in.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(pipe, options)
    handle.remove()
    assert torch.equal(run(pipe, {"image": photo}), plain)


def test_arguments_are_not_written_to(pipe, options):
    def contents(value):
        if isinstance(value, Region):
            return contents(value.image_embeds), contents(value.mask)
        if isinstance(value, list):
            return [contents(element) for element in value]
        is_array = isinstance(value, (torch.Tensor, Image.Image))
        return np.asarray(value).tobytes() if is_array else value

    before = {name: contents(value) for name, value in options.items()}
    run(pipe, options)
    assert {name: contents(value) for name, value in options.items()} == before
