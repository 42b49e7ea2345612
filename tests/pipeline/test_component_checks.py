"""Components that are missing, or that do not fit together: named before the first step, with what is expected."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import imvar
from imvar import FlaggedError, InputError, InputTypeError
from imvar.pipeline.components import PROTOCOLS, required_members
from tests.support.random_checkpoint import TINY_CHECKER, TINY_ENCODER, TINY_UNET, TINY_VAE, TINY_VISION, randomize


def run(pipe, photo, **options):
    return pipe(photo, **({"num_inference_steps": 2, "output_type": "np", "seed": 0} | options))


def another(kind, settings, **changes):
    return randomize(kind(**(settings | changes)), 0)


def unfit_components():
    """Return components that do not fit, by the name and value in the message."""
    unet, vae, encoder = imvar.UNet2DConditionModel, imvar.AutoencoderKL, imvar.CLIPVisionModelWithProjection
    checker = imvar.StableDiffusionSafetyChecker
    return {
        ("image_encoder", "embeddings of width 16"): {
            "image_encoder": another(encoder, TINY_ENCODER, projection_dim=16)
        },
        ("vae", "latent_channels=8"): {"vae": another(vae, TINY_VAE, latent_channels=8)},
        ("unet", "in_channels=4 and out_channels=8"): {"unet": another(unet, TINY_UNET, out_channels=8)},
        ("unet", "in_channels=9 and out_channels=4"): {"unet": another(unet, TINY_UNET, in_channels=9)},
        ("vae", "out_channels=4"): {"vae": another(vae, TINY_VAE, out_channels=4)},
        ("safety_checker", "one for 24 x 24 pixels"): {
            "safety_checker": another(checker, TINY_CHECKER, vision_config=TINY_VISION | {"image_size": 24})
        },
        ("image", "(32, 32)"): {"image_encoder": another(encoder, TINY_ENCODER, image_size=24)},
        ("scheduler", "the class PNDMScheduler"): {"scheduler": imvar.PNDMScheduler},
        ("unet", "the class UNet2D"): {"unet": unet},
        ("safety_checker", "the class Stable"): {"safety_checker": checker},
        ("feature_extractor", "the class CLIPImageProcessor"): {"feature_extractor": imvar.CLIPImageProcessor},
        ("image_encoder", "Tensor from Identity; use"): {"image_encoder": torch.nn.Identity()},
        ("feature_extractor", "Image from function; use"): {"feature_extractor": lambda images, return_tensors: images},
        ("feature_extractor", "None; or pass a tensor"): {"feature_extractor": None, "safety_checker": None},
        ("feature_extractor", "None; pass one, or safety_checker=None"): {"feature_extractor": None},
        ("components", "different devices (vae on cpu, image_encoder on cpu, unet on meta"): {
            "unet": unet(**TINY_UNET).to("meta")
        },
        ("unet", "None"): {"unet": None},
    }


@pytest.mark.parametrize(("name", "got"), unfit_components())
def test_named_before_the_first_step(pipe, photo, name, got):
    for component, value in unfit_components()[name, got].items():
        setattr(pipe, component, value)
    with pytest.raises(InputError) as caught:
        run(pipe, photo, output_type="pil", callback=lambda *_: pytest.fail("a step was taken"))
    assert str(caught.value).startswith(f"{name}: expected ")
    assert f"got {got}" in str(caught.value)


MEMBERS = {
    "vae": ["decode", "config"],
    "image_encoder": ["__call__", "parameters"],
    "unet": ["__call__", "config"],
    "scheduler": ["set_timesteps", "scale_model_input", "step", "init_noise_sigma"],
    "safety_checker": ["__call__"],
    "feature_extractor": ["__call__"],
}


@pytest.mark.parametrize(("name", "member"), [(name, member) for name in MEMBERS for member in MEMBERS[name]])
def test_a_missing_member_is_named(pipe, photo, name, member):
    assert required_members(PROTOCOLS[name][0]) == MEMBERS[name]
    custom = type("Custom", (), dict.fromkeys(set(MEMBERS[name]) - {member}))
    setattr(pipe, name, custom())
    with pytest.raises(InputTypeError, match=f"{name}: expected .*, got Custom, which has no {member}"):
        run(pipe, photo)


def test_latents_need_no_autoencoder_that_fits(pipe, photo):
    expected = run(pipe, photo, output_type="latent").images
    pipe.vae, pipe.feature_extractor.crop_size = another(imvar.AutoencoderKL, TINY_VAE, latent_channels=8), 32
    assert torch.equal(run(pipe, photo, output_type="latent").images, expected)


class Enlarging(imvar.AutoencoderKL):
    def decode(self, z, return_dict=True):
        return (torch.nn.functional.interpolate(super().decode(z).sample, scale_factor=2),)


def test_custom_components(pipe, photo):
    """Their sizes are free, and a component that a call does not use may be missing or on another device."""
    expected = run(pipe, photo, output_type="latent").images
    pipe.vae = another(imvar.AutoencoderKL, TINY_VAE, out_channels=1)
    pipe.safety_checker = None
    assert run(pipe, photo, output_type="pil").images[0].mode == "L"
    pipe.vae = another(Enlarging, TINY_VAE)
    assert run(pipe, photo, height=64, width=64).images.shape == (1, 128, 128, 3)
    pipe.vae.to("meta")
    pipe.register_modules(second=imvar.UNet2DConditionModel(**TINY_UNET).to("meta"))
    assert torch.equal(run(pipe, photo, output_type="latent").images, expected)
    pipe.vae = None
    assert torch.equal(run(pipe, photo, output_type="latent").images, expected)


class Proxy:
    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)


class Repeating(imvar.StableDiffusionImageVariationPipeline):
    def prepare_latents(self, batch_size, channels, height, width, dtype, device, generator, latents=None):
        latents = latents.repeat(batch_size, 1, 1, 1)
        return super().prepare_latents(batch_size, channels, height, width, dtype, device, generator, latents)


def test_custom_stages_and_schedulers(pipe, photo):
    noise = torch.randn(1, 4, 16, 16)
    expected = run(pipe, photo, latents=noise, seed=None).images
    own = Repeating(**pipe.components)
    assert np.abs(run(own, photo, latents=noise, seed=None, num_images_per_prompt=2).images - expected).max() < 2e-5
    pipe.scheduler = Proxy(pipe.scheduler)
    assert np.array_equal(run(pipe, photo, latents=noise, seed=None).images, expected)


def test_flags_without_images(pipe):
    """As in diffusers, `images` is returned in the type it has; flagged PIL images turn black as well."""
    pixels, checker = torch.zeros(1, 3, 32, 32), pipe.safety_checker
    red = Image.new("RGB", (4, 4), "red")
    for images in (None, [red]):
        assert checker(clip_input=pixels, images=images) == (images, [False])
    checker.concept_embeds_weights.data.fill_(-2)
    assert checker(pixels, None) == (None, [True])
    assert checker(pixels, [red])[0][0].getextrema() == ((0, 0),) * 3
    assert not checker(pixels, [np.full((2, 2, 3), np.inf)])[0][0].any()
    with pytest.raises(InputTypeError, match=r"images: expected .*, got int"):
        checker(pixels, [1])


def test_an_autoencoder_of_another_scale(pipe, photo):
    blocks = {name: kinds[:3] for name, kinds in TINY_VAE.items() if isinstance(kinds, tuple)}
    pipe.vae = another(imvar.AutoencoderKL, TINY_VAE, **blocks)
    with pytest.raises(InputError, match=r"vae: expected images of \(128, 128\), got \(64, 64\)"):
        run(pipe, photo)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((5, 40), "got 5, tile_sample_min_size=40, tile_overlap_factor=0.25"),
        (
            (4, 20),
            (
                "tile_latent_min_size: expected tile sizes with a ratio of 8 and an overlap of whole "
                "latents, got 4, tile_sample_min_size=20"
            ),
        ),
        (
            (1, 8),
            (
                "tile_latent_min_size: expected tile sizes with a ratio of 8 and an overlap of whole "
                "latents, got 1, tile_sample_min_size=8"
            ),
        ),
        ((0, 0), "tile_latent_min_size: expected an integer >= 1, got 0"),
        ((2.5, 20), "tile_latent_min_size: expected an integer >= 1, got 2.5"),
        ((4, "x"), "tile_sample_min_size: expected an integer >= 1, got 'x'"),
    ],
)
def test_tiles_that_do_not_fit(pipe, photo, sizes, words):
    pipe.enable_vae_tiling()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = sizes
    with pytest.raises(InputError) as caught:
        run(pipe, photo)
    assert words in str(caught.value)
    with pytest.raises(InputError, match=r"tile_.*_min_size[=:]"):
        pipe.vae.encode(torch.zeros(1, 3, 128, 128))
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 32
    for wrong in (2, "x", -0.5):
        pipe.vae.tile_overlap_factor = wrong
        with pytest.raises(InputError, match=r"tile_overlap_factor: expected .*, got"):
            run(pipe, photo)
    pipe.vae.tile_overlap_factor = 0.25
    assert run(pipe, photo, height=64, width=72).images.shape == (1, 64, 72, 3)


def checker_with(flags):
    return lambda images, clip_input: (images, flags)


@pytest.mark.parametrize(
    "flags",
    [
        [False, True],
        (False, True),
        np.array([False, True]),
        torch.tensor([False, True]),
        [0, 1],
        [np.False_, np.True_],
        [None, True],
        {"a": False, "b": True}.values(),
    ],
)
def test_a_checker_that_returns_the_images_unchanged(pipe, photo, flags):
    """Its flags count in any container, and images that it flags turn black."""
    pipe.safety_checker = None
    kept = run(pipe, photo, num_images_per_prompt=2).images
    pipe.safety_checker = checker_with(flags)
    output = run(pipe, photo, num_images_per_prompt=2)
    assert output.nsfw_content_detected == [False, True]
    assert np.array_equal(output.images[0], kept[0])
    assert not output.images[1].any()
    assert not np.asarray(run(pipe, photo, num_images_per_prompt=2, output_type="pil").images[1]).any()
    with pytest.raises(FlaggedError, match="1 of 2 images"):
        run(pipe, photo, num_images_per_prompt=2, on_flagged="raise")


@pytest.mark.parametrize("output_type", ["np", "pil"])
@pytest.mark.parametrize(
    "change", [lambda x: x.clamp(-1, 1), lambda x: x.half(), lambda x: x * 0.5, lambda x: x + 0.01, lambda x: -x]
)
def test_a_flagged_image_that_is_changed_and_not_replaced_turns_black(pipe, photo, change, output_type):
    pipe.safety_checker = lambda images, clip_input: (change(images), [False, True])
    images = run(pipe, photo, num_images_per_prompt=2, output_type=output_type).images
    assert np.asarray(images[0]).any()
    assert not np.asarray(images[1]).any()


@pytest.mark.parametrize("how", ["black", "blur", "keep"])
def test_a_checker_that_edits_images(pipe, photo, how):
    """A replacement of the flagged image is kept or not, by `on_flagged`; a mark on the other one always is."""

    def check(images, clip_input):
        images[0, :, :8, :8] = 0.5
        images[1] = torch.linspace(0, 1, images[1].numel()).view_as(images[1])
        return images, [False, True]

    pipe.safety_checker = None
    kept = run(pipe, photo, num_images_per_prompt=2).images
    pipe.safety_checker = check
    images = run(pipe, photo, num_images_per_prompt=2, on_flagged=how).images
    assert np.allclose(images[0, :8, :8], 0.75)  # 0.5 of [-1, 1]
    assert np.array_equal(images[0, 8:], kept[0, 8:])
    if how == "black":
        assert np.allclose(images[1].transpose(2, 0, 1).ravel(), np.linspace(0, 1, images[1].size), atol=1e-6)
    assert np.array_equal(images[1], kept[1]) == (how == "keep")


@pytest.mark.parametrize("how", ["black", "blur", "keep", "raise"])
@pytest.mark.parametrize(
    "output",
    [
        None,
        3,
        lambda x: x,
        lambda x: (x,),
        lambda x: (x, [True], 1),
        lambda x: (x, []),
        lambda x: (x, [True]),
        lambda x: (x, [True] * 3),
        lambda x: (x, True),
        lambda x: (x, [float("nan")] * 2),
        lambda x: (x, ["no", "no"]),
        lambda x: (x, {0: True}),
        lambda x: (None, [True] * 2),
        lambda x: (x[:1], [True] * 2),
        lambda x: (x, "no"),
        lambda x: (x[:, :1], [True] * 2),
        lambda x: (x[..., :8, :8], [True] * 2),
        lambda x: (x.to("meta"), [True] * 2),
    ],
)
def test_a_checker_with_another_output_is_refused(pipe, photo, output, how):
    pipe.safety_checker = lambda images, clip_input: output(images) if callable(output) else output
    with pytest.raises(InputTypeError, match=r"safety_checker: expected an output of images .* and 2 flags, got"):
        run(pipe, photo, num_images_per_prompt=2, on_flagged=how)


def test_a_checker_without_flags(pipe, photo):
    pipe.safety_checker = checker_with(None)
    assert run(pipe, photo).nsfw_content_detected is None


def test_another_dtype_from_within_a_callback(pipe, photo):
    """The change takes effect at the next step, and the next call has that dtype as well."""
    expected = run(pipe, photo, num_inference_steps=4).images
    close = run(pipe, photo, num_inference_steps=4, callback=lambda i, *_: i == 1 and pipe.to(torch.float64)).images
    assert np.abs(close - expected).max() < 1e-4
    assert pipe.dtype == torch.float64
    pipe.to(torch.float32)
    with pytest.raises(InputTypeError, match=r"unet: .* got None"):
        run(pipe, photo, callback=lambda *_: setattr(pipe, "unet", None))


@pytest.mark.parametrize("kind", [imvar.DDIMScheduler, imvar.PNDMScheduler, imvar.LMSDiscreteScheduler])
def test_a_narrower_dtype_from_within_a_callback(pipe, photo, kind):
    """The scheduler may hold outputs of earlier steps in the wider dtype."""
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    expected = run(pipe, photo, num_inference_steps=6, guidance_scale=3).images
    close = run(
        pipe,
        photo,
        num_inference_steps=6,
        guidance_scale=3,
        callback=lambda i, *_: i == 1 and pipe.unet.to(torch.bfloat16),
    ).images
    assert 0 < np.abs(close - expected).mean() < 0.05


class Broken(Proxy):
    """A scheduler with one thing wrong."""

    def __init__(self, scheduler, **wrong):
        super().__init__(scheduler)
        self.wrong = wrong

    @property
    def timesteps(self):
        return self.wrong.get("timesteps", self.inner.timesteps)

    def step(self, *args, **options):
        return self.wrong["step"](self.inner.step(*args, **options))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            {"step": lambda out: (out.prev_sample,)},
            "a tensor `prev_sample`, got tuple from Broken",
        ),
        (
            {"step": lambda out: out.prev_sample},
            "a tensor `prev_sample`, got Tensor from Broken",
        ),
        ({"timesteps": None}, "after set_timesteps, got timesteps=None of Broken"),
        ({"timesteps": torch.tensor([])}, "after set_timesteps, got timesteps=tensor([]) of Broken"),
    ],
)
def test_a_scheduler_at_fault_is_named(pipe, photo, wrong, words):
    pipe.scheduler = Broken(pipe.scheduler, **wrong)
    with pytest.raises(InputTypeError) as caught:
        run(pipe, photo)
    assert str(caught.value).startswith("scheduler: expected ")
    assert words in str(caught.value)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("change", [lambda x: None, lambda x: x[: len(x) // 2], lambda x: x[:, 0], lambda x: x[:0]])
def test_a_context_of_another_shape_is_named(pipe, photo, change, n):
    class Own(type(pipe)):
        def _encode_image(self, *args):
            return change(super()._encode_image(*args))

    with pytest.raises(InputTypeError, match=rf"image_encoder: expected a context \({2 * n}, 1, width\), got"):
        run(Own(**pipe.components), photo, num_images_per_prompt=n)


def test_a_decoder_that_returns_no_tensor_is_named(pipe, photo):
    kind = type("Own", (type(pipe),), {"decode": lambda *_: None})
    with pytest.raises(InputTypeError, match="decode: expected a tensor of images, got NoneType"):
        run(kind(**pipe.components), photo)


def test_errors_of_a_third_party_extractor_are_passed_on(pipe, photo):
    def refuse(*_, **__):
        raise InputError("cats only")

    pipe.feature_extractor = refuse
    with pytest.raises(InputError, match=r"^cats only$"):
        run(pipe, photo)
