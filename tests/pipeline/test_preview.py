"""`preview`: approximate images of latents by a linear decoder."""

import copy
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

from imvar import AutoencoderKL, InputError, InputTypeError, StableDiffusionImageVariationPipeline

DRAWINGS = Path(__file__).parents[1] / "emoji" / "held-out.png"
NAN = float("nan")


@pytest.fixture(scope="module")
def emoji():
    pipe = StableDiffusionImageVariationPipeline.from_pretrained("imvar-emoji")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def colours(images):
    return np.stack([np.asarray(image) for image in images]) / 127.5 - 1


def r_squared(previews, images):
    """Of previews (b, h, w, 3) and images (b, 3, k h, k w), both in [-1, 1]."""
    pooled = F.adaptive_avg_pool2d(images, previews.shape[1:3]).movedim(1, -1).numpy()
    return 1 - ((previews - pooled) ** 2).sum() / ((pooled - pooled.mean((0, 1, 2))) ** 2).sum()


@torch.no_grad()
def test_previews_of_drawings_explain_their_images(emoji):
    sheet = torch.from_numpy(np.array(Image.open(DRAWINGS).convert("RGB"))) / 127.5 - 1
    drawings = rearrange(sheet, "(y h) (x w) c -> (y x) c h w", h=64, w=64)
    latents = emoji.vae.encode(drawings).latent_dist.mode() * emoji.vae.config.scaling_factor
    previews = emoji.preview(latents)
    assert [image.size for image in previews] == [(16, 16)] * len(drawings)
    assert r_squared(colours(previews), emoji.decode(latents)) >= 0.85
    assert r_squared(colours(previews), emoji.decode(latents.flip(0))) < 0


def test_the_image_is_there_early_in_the_predicted_x0_and_not_in_the_noisy_latents(emoji, photo):
    shown = []

    def callback(pipe, i, t, tensors):
        shown.append([colours(pipe.preview(tensors[name])) for name in ("pred_original_sample", "latents")])

    options = {"callback_on_step_end_tensor_inputs": ["latents", "pred_original_sample"], "num_inference_steps": 10}
    out = emoji(photo, guidance_scale=3, seed=0, output_type="latent", callback_on_step_end=callback, **options)
    final = colours(emoji.preview(out.images))
    error = [[np.abs(preview - final).mean() for preview in step] for step in shown]
    assert error[3][0] < error[3][1] / 2


@torch.no_grad()
def test_a_preview_takes_a_five_hundredth_of_the_time_of_the_vae(emoji):
    x0 = torch.randn(1, 4, 128, 128, generator=torch.Generator().manual_seed(0))  # of 512 x 512
    emoji.preview(x0)
    times = []
    for function, repeats in (emoji.preview, 20), (emoji.decode, 1):
        each = []
        for _ in range(repeats):
            started = time.perf_counter()
            function(x0)
            each.append(time.perf_counter() - started)
        times.append(min(each))
    assert times[1] / times[0] > 500


def test_one_sample_any_dtype_and_batches(pipe):
    x0 = torch.randn(3, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    images = pipe.preview(x0)
    assert [image.size for image in images] == [(6, 8)] * 3
    assert np.array_equal(images[1], pipe.preview(x0[1])[0])
    assert np.array_equal(images[1], pipe.preview(x0[1:2].double())[0])
    pipe.to(torch.bfloat16)
    assert np.abs(np.int16(images[0]) - np.int16(pipe.preview(x0[:1].bfloat16())[0])).max() < 16


def test_a_vae_is_fitted_once_until_it_changes(pipe, monkeypatch):
    decoded, x0 = [], torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    decode = AutoencoderKL.decode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda *args, **more: decoded.append(1) or decode(*args, **more))
    first = pipe.preview(x0)[0]
    assert np.array_equal(pipe.preview(x0)[0], first)
    assert len(decoded) == 1
    pipe.vae.load_state_dict({name: -weight for name, weight in pipe.vae.state_dict().items()})
    second = pipe.preview(x0)[0]
    assert len(decoded) == 2
    assert not np.array_equal(first, second)
    for same in copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe)):
        assert np.array_equal(same.preview(x0)[0], second)
    pipe.vae = AutoencoderKL(**pipe.vae.config)
    assert not np.array_equal(pipe.preview(x0)[0], second)


def test_a_vae_that_moves_is_not_fitted_again(pipe, monkeypatch):
    decoded, x0 = [], torch.randn(1, 4, 8, 8)
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.preview(x0)
    monkeypatch.setattr(pipe, "decode_on_cpu", lambda *_: decoded.append(1))
    pipe.vae.to("cpu", memory_format=torch.channels_last)
    pipe.preview(x0)
    assert decoded == []


def test_a_preview_within_a_call_changes_nothing(pipe, photo):
    options = {"num_inference_steps": 3, "output_type": "latent", "seed": 1}
    expected = pipe(photo, **options).images
    made = pipe(photo, **options, callback_on_step_end=lambda pipe, i, t, x: pipe.preview(x["latents"]) and {})
    assert torch.equal(made.images, expected)


def test_other_autoencoders(pipe):
    class Averaging:
        """An autoencoder that is no module: its first three channels are the image."""

        class config:  # noqa: N801
            scaling_factor, block_out_channels = 2.0, (8, 16, 16, 16)

        def decode(self, z, return_dict=True):
            return (F.interpolate(z[:, :3], scale_factor=8),)

    pipe.vae = Averaging()
    x0 = torch.rand(1, 5, 8, 8) - 0.5
    expected = (x0[0, :3] / 4 + 0.5).movedim(0, -1).numpy() * 255
    assert np.abs(np.asarray(pipe.preview(x0)[0]) - expected).max() < 1.1


@pytest.mark.parametrize(
    ("latents", "kind", "message"),
    [
        (None, InputTypeError, r"latents: expected a tensor \(b, 4, h, w\)"),
        (torch.zeros(1, 3, 8, 8), InputError, r"latents: expected a tensor \(b, 4, h, w\)"),
        (torch.zeros(1, 4, 8), InputError, r"latents: expected a tensor \(b, 4, h, w\)"),
        (torch.zeros(1, 4, 8, 8).long(), InputTypeError, "latents: expected floating-point"),
        (torch.full((1, 4, 8, 8), NAN), InputError, "latents: expected finite floats"),
        (torch.zeros(1, 4, 8, 8, device="meta"), InputError, "latents: .*meta device"),
    ],
)
def test_what_has_no_preview_is_refused(pipe, latents, kind, message):
    with pytest.raises(kind, match=message):
        pipe.preview(latents)
    pipe.vae = None
    with pytest.raises(InputError, match="vae"):
        pipe.preview(torch.zeros(1, 4, 8, 8))
