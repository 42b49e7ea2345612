"""`init_image`, `strength`, `mask_image` and `paste`: where the denoising starts, and what it keeps."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import imvar
from imvar import InputError, InputTypeError, StableDiffusionImageVariationPipeline
from imvar.runtime.deepcache import DeepCacheUNet
from tests.support.offloading import offload_to_meta
from tests.support.random_checkpoint import PUBLISHED_SCHEDULER

SCHEDULERS = [
    "PNDMScheduler",
    "DDIMScheduler",
    "LMSDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
]


def run(pipe, image, **options):
    defaults = {"num_inference_steps": 5, "guidance_scale": 3, "output_type": "latent", "seed": 1}
    return pipe(image, **(defaults | options)).images


def set_scheduler(pipe, name):
    library = imvar if hasattr(imvar, name) else diffusers
    pipe.scheduler = getattr(library, name).from_config({"clip_sample": False} | PUBLISHED_SCHEDULER)


def encoded(pipe, image, height=128, width=128):
    with torch.no_grad():
        pixels = pipe.image_processor.preprocess(image, height, width)
        return pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor


@pytest.fixture(scope="module")
def other(photo):
    return photo.rotate(180).resize((90, 70))


@pytest.fixture(scope="module")
def half():
    """Repaints the upper half."""
    mask = torch.zeros(16, 16)
    mask[:8] = 1
    return mask


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("n", [1, 2])
def test_strength_1_and_a_mask_of_ones_are_the_plain_call(pipe, photo, other, name, n):
    set_scheduler(pipe, name)
    photos = [photo, other] if n == 2 else photo
    expected = run(pipe, photos, num_images_per_prompt=n)
    for options in ({"strength": 1}, {"mask_image": torch.ones(3, 5)}, {"mask_image": Image.new("L", (9, 9), "white")}):
        assert torch.equal(run(pipe, photos, num_images_per_prompt=n, init_image=other, **options), expected)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_kept_latents_are_those_of_the_image(pipe, photo, other, half, name, strength):
    set_scheduler(pipe, name)
    x0, expected = encoded(pipe, other), run(pipe, photo)
    out = run(pipe, photo, init_image=other, mask_image=half, strength=strength)
    assert torch.equal(out[..., 8:, :], x0[..., 8:, :])
    assert (out[..., :8, :] - x0[..., :8, :]).abs().mean() > 0.1
    assert not torch.allclose(out, expected, atol=0.1)
    nothing = run(pipe, photo, init_image=other, mask_image=torch.zeros(1, 1), strength=strength)
    assert torch.equal(nothing, x0)


@pytest.mark.parametrize("height", [64, 72])
def test_the_image_is_resized_and_encoded_by_the_mode_of_the_posterior(pipe, photo, other, height):
    x0, size = encoded(pipe, other, height, 40), {"height": height, "width": 40}
    expected = run(pipe, photo, init_image=x0, strength=0.6, **size)
    pixels = np.asarray(other.resize((40, height), Image.Resampling.LANCZOS)).astype(np.float32) / 255
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    for image in (other, [other], pixels, tensor, tensor[None], [tensor], list(x0)):
        assert torch.equal(run(pipe, photo, init_image=image, strength=0.6, **size), expected)
    with pytest.warns(UserWarning, match=r"init_image: .* below 0 .* normalised"):
        centred = run(pipe, photo, init_image=2 * tensor - 1, strength=0.6, **size)
    assert torch.allclose(centred, expected, atol=1e-4)


def test_images_of_every_mode_are_read_as_the_image_of_a_call_is(pipe, photo, other):
    clear = other.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(other.size))
    white = Image.new("RGBA", other.size, "white")
    white.alpha_composite(clear)
    for image, same in ((clear, white.convert("RGB")), (other.convert("L"), other.convert("L").convert("RGB"))):
        assert torch.equal(run(pipe, photo, init_image=image), run(pipe, photo, init_image=same))


def test_strength_is_by_default_that_of_image_to_image_and_of_inpainting(pipe, photo, other, half):
    start, mask = {"init_image": other}, {"init_image": other, "mask_image": half}
    assert torch.equal(run(pipe, photo, **start), run(pipe, photo, strength=0.8, **start))
    assert torch.equal(run(pipe, photo, **mask), run(pipe, photo, strength=1.0, **mask))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_is_that_of_a_plain_call(pipe, photo, other, half, name):
    """From a seed, or as `latents`; and a call changes nothing of the next."""
    set_scheduler(pipe, name)
    plain = run(pipe, photo)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    for options in ({"strength": 0.5}, {"mask_image": half}, {"mask_image": half, "strength": 0.5}):
        expected = run(pipe, photo, init_image=other, **options)
        if not name.startswith("Euler"):  # draws more in its steps
            assert torch.equal(run(pipe, photo, init_image=other, seed=None, latents=noise, **options), expected)
        assert torch.equal(run(pipe, photo, init_image=other, **options), expected)
        assert torch.equal(run(pipe, photo), plain)


def test_an_image_for_all_for_each_image_or_for_each_variation(pipe, photo, other, half):
    """A variation of a seed is the same alone and in a batch, up to rounding."""
    starts = torch.stack([encoded(pipe, photo)[0], encoded(pipe, other)[0]])
    masks = torch.stack([half, half.flip(0)])[:, None]
    options = {"strength": 0.5, "num_images_per_prompt": 2}

    def alone(image, seed, start, mask):
        return run(pipe, image, seed=seed, strength=0.5, init_image=start[None], mask_image=mask[0])

    images = [photo, photo, other, other]
    for init_image, mask, order in (
        (starts[:1], masks[:1], (0, 0, 0, 0)),
        (starts, masks, (0, 0, 1, 1)),
        (starts[[0, 1, 1, 0]], masks[[0, 1, 1, 0]], (0, 1, 1, 0)),
    ):
        out = run(pipe, [photo, other], init_image=init_image, mask_image=mask, **options)
        for k, i in enumerate(order):
            expected = alone(images[k], 1 + k, starts[i], masks[i])
            assert (out[k] - expected[0]).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paste_puts_kept_pixels_back_exactly(pipe, photo, other, half, output_type, dtype):
    pipe.to(dtype)
    options = {"init_image": other, "mask_image": half, "output_type": output_type}
    out, unpasted = (run(pipe, photo, paste=paste, **options) for paste in (True, False))
    pixels = np.asarray(other.resize((128, 128), Image.Resampling.LANCZOS))
    pixels = pixels if output_type == "pil" else pixels.astype(np.float32) / 255
    out, unpasted = (
        np.asarray(x[0].permute(1, 2, 0).float() if output_type == "pt" else x[0]) for x in (out, unpasted)
    )
    assert np.array_equal(out[64:], pixels[64:])
    assert not np.array_equal(unpasted[64:], pixels[64:])
    assert np.array_equal(out[:64], unpasted[:64])


def test_the_safety_checker_judges_pasted_images_and_replaces_them_whole(pipe, photo, other, half):
    options = {"init_image": other, "mask_image": half, "paste": True, "output_type": "np"}
    expected, seen = run(pipe, photo, **options), []
    checker = pipe.safety_checker

    class Flagging(nn.Module):
        def forward(self, images, clip_input):
            seen.append(images.clone())
            return torch.zeros_like(images), [True] * len(images)

    pipe.safety_checker = Flagging()
    assert np.array_equal(run(pipe, photo, on_flagged="keep", **options), expected)
    assert np.abs(seen[0].permute(0, 2, 3, 1).numpy() / 2 + 0.5 - expected)[:, 64:].max() < 1e-6
    assert not run(pipe, photo, **options).any()
    blurred = run(pipe, photo, on_flagged="blur", **options)
    assert np.abs(blurred - expected)[:, 64:].mean() > 0.01
    pipe.safety_checker = checker
    assert np.array_equal(run(pipe, photo, **options), expected)


@pytest.mark.parametrize("name", ["DDIMScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler"])
def test_everything_that_counts_steps_counts_those_that_are_run(pipe, photo, other, name, monkeypatch):
    """Half of 8 steps with options by step equal the sampling of those 4 timesteps by hand."""
    set_scheduler(pipe, name)
    order, rows, totals, calls = pipe.scheduler.order, [], [], []
    forward = pipe.unet.conv_in.forward
    monkeypatch.setattr(pipe.unet.conv_in, "forward", lambda x: rows.append(len(x)) or forward(x))
    bar = pipe.progress_bar
    monkeypatch.setattr(pipe, "progress_bar", lambda total: totals.append(total) or bar(total=total))
    options = {"num_inference_steps": 8, "init_image": other, "strength": 0.5, "guidance_interval": (0.5, 1)}
    run(pipe, photo, callback=lambda i, t, latents: calls.append((i, float(t))), **options)
    pipe.scheduler.set_timesteps(8)
    timesteps = pipe.scheduler.timesteps[4 * order :].tolist()
    assert totals == [4]
    assert rows == [1 + (i >= round(0.5 * len(timesteps))) for i in range(len(timesteps))]
    assert [i for i, _ in calls] == [0, 1, 2, 3]
    assert [t for _, t in calls] == [*timesteps[order - 1 :: order], timesteps[-1]][:4]


@pytest.mark.parametrize(("strength", "steps"), [(0.5, 4), (0.4, 3), (1, 8)])
def test_deep_features_are_cached_from_the_first_step_that_is_run(
    pipe, photo, other, half, monkeypatch, strength, steps
):
    set_scheduler(pipe, "DDIMScheduler")
    calls, plain = [], DeepCacheUNet.__call__

    def call(self, x, step, **more):
        calls.append((step, step - self.last_full_step >= self.interval))
        return plain(self, x, step, **more)

    monkeypatch.setattr(DeepCacheUNet, "__call__", call)
    options = {"num_inference_steps": 8, "init_image": other, "mask_image": half, "strength": strength}
    out = run(pipe, photo, cache_interval=2, **options)
    assert calls == [(i, i % 2 == 0) for i in range(steps)]
    assert torch.equal(out[..., 8:, :], encoded(pipe, other)[..., 8:, :])
    assert not torch.equal(out, run(pipe, photo, **options))


def test_regions_of_embeddings_and_a_mask_of_latents_go_together(pipe, photo, other, half):
    a, b = pipe.encode_image([photo, other]).split(1)
    options = {"init_image": other, "mask_image": half, "strength": 0.6}
    whole = run(pipe, None, image_embeds=imvar.Region(a), **options)
    assert torch.equal(whole, run(pipe, None, image_embeds=a, **options))
    out = run(pipe, None, image_embeds=[imvar.Region(b), imvar.Region(a, mask=half)], **options)
    assert torch.equal(out[..., 8:, :], whole[..., 8:, :])
    assert not torch.equal(out, whole)


def test_guidance_as_a_function_is_evaluated_for_the_steps_that_are_run(pipe, photo, other):
    fractions = []
    run(pipe, photo, init_image=other, strength=0.6, guidance_scale=lambda f: fractions.append(f) or 3.0, seed=4)
    assert len(fractions) in (3, 4)  # PNDM visits one timestep twice
    assert fractions[0] == 0


def test_a_callback_that_writes_into_latents_is_taken_over(pipe, photo, other, half):
    def negate(i, t, latents):
        latents.neg_()

    x0 = encoded(pipe, other)
    out = run(pipe, photo, init_image=other, mask_image=half, callback=negate, callback_steps=1)
    assert torch.equal(out[..., 8:, :], -x0[..., 8:, :])  # after the last step nothing is replaced


def test_offloaded_components_run_only_after_they_moved(pipe, photo, other, half, monkeypatch):
    """Until then they are on the meta device."""
    options = {"init_image": other, "mask_image": half, "strength": 0.6}
    expected = run(pipe, photo, **options)
    offload_to_meta(pipe, monkeypatch)
    for _ in range(2):
        assert torch.equal(run(pipe, photo, **options), expected)


def test_half_precision_keeps_the_dtype(pipe, photo, other, half):
    pipe.to(torch.bfloat16)
    out = run(pipe, photo, init_image=other, mask_image=half, strength=0.6)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[..., 8:, :], run(pipe, photo, init_image=other, mask_image=torch.zeros(2, 2))[..., 8:, :])


class Louder(StableDiffusionImageVariationPipeline):
    """Scales its noise, and judges images as code did before there was `paste`."""

    def prepare_latents(self, *args, **kwargs):
        return super().prepare_latents(*args, **kwargs) * 2

    def decode_and_judge(self, latents, output_type, device, dtype, on_flagged="black", seeds=None):
        return super().decode_and_judge(latents, output_type, device, dtype, on_flagged, seeds)


def louder(pipe):
    own = Louder(**pipe.components)
    own.set_progress_bar_config(disable=True)
    return own


@pytest.mark.parametrize("name", SCHEDULERS[:3])
def test_the_noise_of_a_subclass_is_used(pipe, photo, other, half, name):
    set_scheduler(pipe, name)
    noise = 2 * torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    for options in ({"strength": 0.6}, {"mask_image": half}):
        expected = run(pipe, photo, init_image=other, latents=noise, seed=None, **options)
        out = run(louder(pipe), photo, init_image=other, **options)
        assert (out - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_an_image_as_latents_needs_no_autoencoder(pipe, photo, other):
    x0, expected = encoded(pipe, other), run(pipe, photo, init_image=other, strength=0.6)
    pipe.vae = None
    assert torch.equal(run(pipe, photo, init_image=x0, strength=0.6), expected)
    with pytest.raises(InputTypeError, match="vae: expected an AutoencoderKL, got None"):
        run(pipe, photo, init_image=other, strength=0.6)


def test_an_autoencoder_without_a_posterior_encodes_too(pipe, photo, other):
    pipe.vae = diffusers.AutoencoderTiny(latent_channels=4).eval()
    with torch.no_grad():
        x0 = pipe.vae.encode(pipe.image_processor.preprocess(other, 128, 128)).latents
    expected = run(pipe, photo, init_image=x0, strength=0.6)
    assert torch.equal(run(pipe, photo, init_image=other, strength=0.6), expected)


def test_an_ignored_orientation_is_warned_about(pipe, photo, other, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    other.save(tmp_path / "turned.png", exif=exif)
    turned = Image.open(tmp_path / "turned.png")
    with pytest.warns(UserWarning, match="init_image: its EXIF orientation is ignored"):
        run(pipe, photo, init_image=turned)
    with pytest.warns(UserWarning, match="mask_image: its EXIF orientation is ignored"):
        run(pipe, photo, init_image=other, mask_image=turned)


START = torch.zeros(1, 4, 16, 16)
PIXELS = torch.zeros(3, 8, 8)
MASK = torch.ones(4, 4)
CLEAR = Image.new("RGBA", (4, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.5}, "strength: expected an init_image with it, got none"),
        ({"mask_image": MASK}, "mask_image: expected an init_image with it, got none"),
        ({"paste": True}, "paste: expected False, got True without a mask_image"),
        ({"init_image": PIXELS, "paste": True}, "paste: expected False, got True without a mask_image"),
        ({"init_image": PIXELS, "mask_image": MASK, "paste": "yes"}, "paste: expected True or False, got 'yes'"),
        ({"init_image": PIXELS, "mask_image": MASK, "paste": True}, "paste: .* got True with latents as output_type"),
        ({"init_image": START, "mask_image": MASK, "paste": True}, "paste: .* got True with latents as init_image"),
        ({"init_image": START, "strength": 0}, "strength: expected at least one of 5 steps, got 0, which is 0 steps"),
        ({"init_image": START, "strength": 0.19}, "strength: expected at least one of 5 steps, got 0.19, .* 0.95"),
        ({"init_image": START, "strength": 1.01}, "strength: expected a number from 0 to 1, got 1.01"),
        ({"init_image": START, "strength": -0.1}, "strength: expected a number from 0 to 1"),
        ({"init_image": START, "strength": float("nan")}, "strength: expected a number from 0 to 1"),
        ({"init_image": START, "strength": "half"}, "strength: expected a number from 0 to 1"),
        ({"init_image": START, "strength": True}, "strength: expected a number from 0 to 1"),
        ({"init_image": "fox.png"}, "init_image: expected a PIL image, .* got str"),
        ({"init_image": []}, "init_image: expected .* got an empty list"),
        ({"init_image": [None]}, "init_image: expected .* got NoneType"),
        ({"init_image": [Image.new("L", (8, 8)), PIXELS]}, "init_image: expected"),
        ({"init_image": Image.new("F", (8, 8))}, "init_image: expected 8 or 16 bits, got mode F"),
        ({"init_image": torch.zeros(8, 8)}, "init_image: expected 3 axes for one image"),
        ({"init_image": torch.zeros(2, 8, 8)}, "init_image: expected 3 channels, or a tensor of 4 as latents"),
        ({"init_image": np.zeros((8, 8, 4), np.float32)}, "init_image: expected 3 channels"),
        ({"init_image": torch.zeros(3, 8, 8, dtype=torch.uint8)}, "init_image: expected floating-point values"),
        ({"init_image": PIXELS + 2}, r"init_image: expected values in \[0, 1\], got 2 to 2"),
        ({"init_image": PIXELS - 2}, r"init_image: expected values in \[0, 1\], got -2 to -2"),
        ({"init_image": PIXELS / 0}, r"init_image: expected values in \[0, 1\], got nan"),
        ({"init_image": PIXELS.to("meta")}, "init_image: expected a tensor with values"),
        ({"init_image": PIXELS[:, :0]}, "init_image: expected 3 axes"),
        ({"init_image": START[..., :8]}, r"init_image: expected a tensor of shape \(1, 4, 16, 16\)"),
        ({"init_image": START / 0}, "init_image: expected finite floats"),
        ({"init_image": START.long()}, "init_image: expected finite floats"),
        ({"init_image": START.expand(3, -1, -1, -1)}, "init_image: expected one, or one for each of 1 images or of 2"),
        ({"init_image": START, "mask_image": "white"}, "mask_image: expected a PIL image, .* got str"),
        ({"init_image": START, "mask_image": []}, "mask_image: expected .* got an empty list"),
        ({"init_image": START, "mask_image": [MASK, None]}, r"mask_image\[1\]: expected .* got NoneType"),
        ({"init_image": START, "mask_image": MASK * 255}, r"mask_image: expected values in \[0, 1\], got 255 to 255"),
        ({"init_image": START, "mask_image": MASK * float("nan")}, r"mask_image: expected values in \[0, 1\], got nan"),
        ({"init_image": START, "mask_image": torch.ones(1, 3, 4, 4)}, "mask_image: expected a PIL image"),
        ({"init_image": START, "mask_image": torch.ones(4)}, "mask_image: expected a PIL image"),
        ({"init_image": START, "mask_image": torch.ones(0, 4)}, "mask_image: expected a PIL image"),
        ({"init_image": START, "mask_image": MASK.to("meta")}, "mask_image: expected a tensor with values"),
        ({"init_image": START, "mask_image": MASK + 0j}, "mask_image: expected a PIL image"),
        ({"init_image": START, "mask_image": np.array(["a"])}, "mask_image: expected a PIL image"),
        ({"init_image": START, "mask_image": torch.ones(3, 1, 4, 4)}, "mask_image: expected one, or one for each of 1"),
        ({"init_image": START, "mask_image": Image.new("I;16", (8, 8))}, "mask_image: expected one of the modes"),
        ({"init_image": START, "mask_image": CLEAR}, "mask_image: expected black and white, got transparent pixels"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_by_name(pipe, photo, options, message):
    with pytest.raises(InputError, match=f"^{message}") as caught:
        run(pipe, photo, num_images_per_prompt=2, **options)
    assert caught.value.key.partition("[")[0] in options


def test_components_that_cannot_be_used_are_refused_by_name(pipe, photo, other, half):
    with pytest.raises(InputError, match=r"paste: .* a decode_and_judge that has no parameter `kept`"):
        run(louder(pipe), photo, init_image=other, mask_image=half, paste=True, output_type="np")
    scheduler = pipe.scheduler

    class WithoutNoise:
        config, order = scheduler.config, 1

        def __getattr__(self, name):
            if name == "add_noise":
                raise AttributeError(name)
            return getattr(scheduler, name)

    pipe.scheduler = WithoutNoise()
    with pytest.raises(
        InputTypeError, match="scheduler: expected one with add_noise, for init_image, got WithoutNoise"
    ):
        run(pipe, photo, init_image=other)
    pipe.scheduler, pipe.vae = scheduler, DecoderOnly(pipe.vae)
    with pytest.raises(InputTypeError, match="vae: expected a component with encode, for init_image, got DecoderOnly"):
        run(pipe, photo, init_image=other)


class DecoderOnly(nn.Module):
    def __init__(self, vae):
        super().__init__()
        self.config, self.decode = vae.config, vae.decode
