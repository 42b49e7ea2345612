"""`init_image` and `mask_image` beside StableDiffusionImg2ImgPipeline and StableDiffusionInpaintPipeline.

Both of diffusers' sample the VAE's posterior, so the start is given as latents, which they use unchanged.
"""

import itertools

import diffusers
import pytest
import torch
from PIL import Image

import imvar
from imvar import schedulers
from tests.support.random_checkpoint import PUBLISHED_SCHEDULER

OURS = schedulers.__all__
THEIRS = ["HeunDiscreteScheduler", "UniPCMultistepScheduler", "KDPM2DiscreteScheduler", "DEISMultistepScheduler"]
STEPS = 10


@pytest.fixture(scope="module")
def x0():
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3)) * 0.8


@pytest.fixture(scope="module")
def mask():
    """Of odd shape and grey values, resized by both."""
    gradient = Image.linear_gradient("L").resize((100, 90))
    gradient.paste(255, (10, 10, 50, 40))
    return gradient


@pytest.fixture
def pair(ours, ref):
    """imvar's pipeline with a small output of the UNet, and the components of the text pipelines with the same."""
    ours.unet.conv_out.weight.data *= 0.1
    ref.unet.conv_out.weight.data *= 0.1
    texts = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    return ours, {"vae": ref.vae, "unet": ref.unet, **texts}


def scheduler_pair(name, **changes):
    """imvar's scheduler, or diffusers' where imvar has none, and diffusers', as the text pipelines configure it."""
    config = {"clip_sample": False} | PUBLISHED_SCHEDULER | changes
    theirs = getattr(diffusers, name).from_config(config)
    return getattr(imvar if name in OURS else diffusers, name).from_config(theirs.config), theirs


def compare(pair, name, pipeline, x0, seed=5, n=1, changes=(), **options):
    ours, components = pair
    ours.scheduler, scheduler = scheduler_pair(name, **dict(changes))
    theirs = getattr(diffusers, pipeline)(**components, scheduler=scheduler, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    context = torch.randn(len(x0), 1, 24, generator=torch.Generator().manual_seed(9))
    shared = {"num_inference_steps": STEPS, "guidance_scale": 3, "output_type": "latent", "num_images_per_prompt": n}
    shared |= options | {"height": 128, "width": 128}
    out = ours(image_embeds=context, init_image=x0, generator=torch.Generator().manual_seed(seed), **shared)
    if pipeline == "StableDiffusionImg2ImgPipeline":
        shared = {name: value for name, value in shared.items() if name not in ("height", "width")}
    else:
        shared["masked_image_latents"] = x0  # else it multiplies latents by the mask of pixels
    expected = theirs(
        image=x0.repeat_interleave(n, 0),
        prompt_embeds=context,
        negative_prompt_embeds=torch.zeros_like(context),
        generator=torch.Generator().manual_seed(seed),
        **shared,
    )
    assert out.images.shape == expected.images.shape
    assert out.images.std() > 0.3
    assert (out.images - expected.images).abs().max() <= (5e-4 if name == "LMSDiscreteScheduler" else 5e-5)


@pytest.mark.parametrize("strength", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", OURS + THEIRS)
def test_a_start_image_gives_the_latents_of_image_to_image(pair, x0, name, strength):
    compare(pair, name, "StableDiffusionImg2ImgPipeline", x0, strength=strength)


@pytest.mark.parametrize(
    ("name", "strength"),
    [*itertools.product(OURS + THEIRS, (0.6, 1.0)), *itertools.product(["DDIMScheduler", "PNDMScheduler"], (0.3, 0.9))],
)
def test_a_mask_gives_the_latents_of_inpainting(pair, x0, mask, name, strength):
    compare(pair, name, "StableDiffusionInpaintPipeline", x0, strength=strength, mask_image=mask)


def test_the_first_of_two_equal_timesteps_is_found_by_its_index(pair, x0):
    """At the last two of 60 steps, both at timestep 0, of different noise levels."""
    name, options = "DPMSolverMultistepScheduler", {"num_inference_steps": 60, "strength": 2.01 / 60}
    compare(pair, name, "StableDiffusionImg2ImgPipeline", x0, changes={"use_karras_sigmas": True}, **options)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_batches_start_from_an_image_each(pair, x0, mask, name, n):
    starts = torch.cat([x0, -x0.flip(2)])
    compare(pair, name, "StableDiffusionImg2ImgPipeline", starts, n=n, strength=0.6, eta=0.5)
    compare(pair, name, "StableDiffusionInpaintPipeline", starts, n=n, strength=0.6, mask_image=mask)


@pytest.mark.parametrize("steps", [1, 2, 7, 25])
@pytest.mark.parametrize("strength", [0.29, 0.5, 0.57, 0.999])
def test_the_number_of_steps_is_truncated_alike(pair, x0, steps, strength):
    if int(steps * strength):
        compare(
            pair, "DDIMScheduler", "StableDiffusionImg2ImgPipeline", x0, strength=strength, num_inference_steps=steps
        )


@pytest.mark.parametrize("kind", ["RGB", "L", "1", "RGBA", "P", "array", "tensor", "h w", "small"])
def test_masks_of_every_kind_are_read_alike(pair, x0, mask, kind):
    grey = torch.rand(30, 50, generator=torch.Generator().manual_seed(1))
    masks = {"array": grey.numpy()[..., None], "tensor": grey[None, None], "h w": grey, "small": mask.resize((3, 5))}
    if kind == "RGB":
        mask = Image.merge("RGB", [mask, mask.rotate(90).resize(mask.size), mask.rotate(180)])
    mask = masks[kind] if kind in masks else mask.convert(kind)
    compare(pair, "DDIMScheduler", "StableDiffusionInpaintPipeline", x0, mask_image=mask, num_inference_steps=2)


@pytest.mark.parametrize("skip_prk_steps", [True, False])
@pytest.mark.parametrize("strength", [0.5, 0.9])
def test_callbacks_count_the_steps_that_are_run(pair, x0, skip_prk_steps, strength):
    ours, components = pair
    ours.scheduler, scheduler = scheduler_pair("PNDMScheduler", skip_prk_steps=skip_prk_steps)
    theirs = diffusers.StableDiffusionImg2ImgPipeline(**components, scheduler=scheduler, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    context, calls = torch.ones(1, 1, 24), ([], [])
    for pipe, seen, more in (
        (ours, calls[0], {"image_embeds": context, "init_image": x0, "height": 128, "width": 128}),
        (theirs, calls[1], {"prompt_embeds": context, "negative_prompt_embeds": 0 * context, "image": x0}),
    ):
        pipe(
            num_inference_steps=8,
            output_type="latent",
            strength=strength,
            generator=torch.Generator().manual_seed(5),
            callback=lambda i, t, latents, seen=seen: seen.append((i, int(t), latents.clone())),
            callback_steps=2,
            **more,
        )
    assert [entry[:2] for entry in calls[0]] == [entry[:2] for entry in calls[1]]
    assert calls[0]
    for (*_, out), (*_, expected) in zip(*calls, strict=True):
        assert (out - expected).abs().max() <= 5e-5 * expected.abs().max()
