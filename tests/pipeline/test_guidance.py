"""`guidance_scale` as a function of the steps, and `guidance_rescale`."""

import math
from functools import partial

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from imvar import DDIMScheduler, InputError, InputTypeError, LMSDiscreteScheduler, PNDMScheduler
from imvar.runtime.guidance import ClassifierFreeGuidance

SCHEDULERS = DDIMScheduler, PNDMScheduler, LMSDiscreteScheduler


def run(pipe, *args, **options):
    return pipe(*args, **({"num_inference_steps": 4, "output_type": "latent", "seed": 1} | options)).images


def rows_of_the_unet(pipe, calls):
    """Record how many rows each call of the UNet has, through a hook and so without precomputation."""
    pipe.unet.conv_in.register_forward_hook(lambda layer, inputs, output: calls.append(len(output)))


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("options", [{}, {"cache_interval": 2}, {"guidance_interval": (0.2, 0.8)}])
def test_a_constant_function_is_the_number(pipe, photo, kind, options):
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    constant = run(pipe, photo, guidance_scale=lambda done: 3, **options)
    assert torch.equal(constant, run(pipe, photo, guidance_scale=3, **options))


@pytest.mark.parametrize("options", [{}, {"cache_interval": 3}])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_step_function_is_the_interval(pipe, photo, kind, options):
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    n = 6 if kind is PNDMScheduler else 8  # with the second call at PNDM's second timestep, 7
    options = {"num_inference_steps": n, **options}
    stepped = run(pipe, photo, guidance_scale=lambda done: 3 if done < 0.5 else 1, **options)
    assert torch.equal(stepped, run(pipe, photo, guidance_scale=3, guidance_interval=(0, 0.5), **options))


@pytest.mark.parametrize(("kind", "calls"), [(DDIMScheduler, 4), (PNDMScheduler, 5)])
def test_the_function_gets_the_fraction_of_steps_done_before_the_first_step(pipe, photo, kind, calls):
    pipe.scheduler, order = kind.from_config(pipe.scheduler.config), []
    pipe.unet.conv_in.register_forward_hook(lambda *_: order.append("step"))
    run(pipe, photo, guidance_scale=lambda done: order.append(done) or 3.0)
    assert order == [i / calls for i in range(calls)] + ["step"] * calls


def test_steps_with_a_scale_up_to_1_run_unguided_also_within_an_interval(pipe, photo):
    pipe.scheduler, rows = DDIMScheduler.from_config(pipe.scheduler.config), []
    rows_of_the_unet(pipe, rows)
    run(pipe, photo, guidance_scale=lambda done: [3, 1, 0, 1.001][int(4 * done)])
    assert rows == [2, 1, 1, 2]
    rows.clear()
    run(pipe, photo, guidance_scale=lambda done: [3, 3, 1, 3][int(4 * done)], guidance_interval=(0.25, 1))
    assert rows == [1, 2, 1, 2]


def test_a_run_without_a_guided_step_is_an_unguided_run(pipe, photo):
    expected, contexts = run(pipe, photo, guidance_scale=1), []
    encode = pipe._encode_image
    pipe._encode_image = lambda *args: contexts.append(encode(*args)) or contexts[-1]
    assert torch.equal(run(pipe, photo, guidance_scale=lambda done: 1.0), expected)
    assert [len(context) for context in contexts] == [1]
    assert torch.equal(run(pipe, photo, guidance_interval=(0, 0)), expected)


@pytest.mark.parametrize(
    "unguided", [{"guidance_scale": 1}, {"guidance_scale": lambda done: 1.0}, {"guidance_interval": (0, 0)}]
)
@pytest.mark.parametrize(
    ("name", "value"), [("negative_image_embeds", torch.zeros(1, 1, 24)), ("guidance_rescale", 0.7)]
)
def test_what_needs_guidance_is_refused_without_a_guided_step(pipe, photo, unguided, name, value):
    with pytest.raises(InputError, match=f"{name}: .*only under guidance"):
        run(pipe, photo, **unguided, **{name: value})


async def never_awaited(done):
    return 3


def never_iterated(done):
    yield 3


@pytest.mark.parametrize(
    ("scale", "kind", "message"),
    [
        (lambda done: math.nan if done == 0.5 else 3, InputError, "guidance_scale in step 2 of 4: .*got nan"),
        (lambda done: math.inf, InputError, "guidance_scale in step 0 of 4: .*got inf"),
        (lambda done: 3 if done < 0.7 else -1, InputError, "guidance_scale in step 3 of 4: .*from 0, got -1"),
        (lambda done: None, InputTypeError, "guidance_scale in step 0 of 4: .*got None"),
        (lambda done: True, InputTypeError, "guidance_scale in step 0 of 4: .*got True"),
        (lambda: 3, InputTypeError, "guidance_scale: expected a number, or a function"),
        (lambda done, total: 3, InputTypeError, "guidance_scale: expected a number, or a function"),
        (never_awaited, InputTypeError, "neither async nor a generator"),
        (never_iterated, InputTypeError, "neither async nor a generator"),
        (partial(never_awaited), InputTypeError, "neither async nor a generator"),
        ([3, 3, 3, 3], InputTypeError, "guidance_scale: expected a finite number"),
    ],
)
def test_functions_without_a_scale_are_refused_before_the_first_step(pipe, photo, scale, kind, message):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(kind, match=message) as info:
        run(pipe, photo, guidance_scale=scale, callback=lambda *_: pytest.fail("a step was taken"))
    assert info.value.key == "guidance_scale"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescaling_is_that_of_diffusers(dtype, rescale):
    predictions = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    uncond, cond = predictions.chunk(2)
    expected = rescale_noise_cfg(uncond + 7.5 * (cond - uncond), cond, guidance_rescale=rescale)
    guidance = ClassifierFreeGuidance(lambda x, step: predictions, None, [7.5], 4, rescale)
    assert torch.equal(guidance(cond, 0), expected)


def test_rescaling_lowers_the_contrast_of_high_scales(pipe, photo):
    plain = run(pipe, photo, guidance_scale=15)
    assert torch.equal(run(pipe, photo, guidance_scale=15, guidance_rescale=0.0), plain)
    assert run(pipe, photo, guidance_scale=15, guidance_rescale=1.0).std() < plain.std()


@pytest.mark.parametrize("rescale", [-0.1, 1.1, math.nan, None, "1", True])
def test_rescaling_outside_of_0_to_1_is_refused(pipe, photo, rescale):
    with pytest.raises(InputError, match=r"guidance_rescale: expected a number from 0 to 1"):
        run(pipe, photo, guidance_rescale=rescale)
