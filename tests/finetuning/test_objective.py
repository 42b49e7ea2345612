"""The objective of a fine-tuning against formulas in float64, and on the bundled model."""

import numpy as np
import pytest
import torch
from einops import rearrange
from finetuning.encoding import Encoder
from finetuning.objective import diffusion_losses, snr_weights
from PIL import Image

from imvar import DDPMScheduler, StableDiffusionImageVariationPipeline
from tests.conftest import PHOTOS

TYPES = ("epsilon", "sample", "v_prediction")
SCHEDULES = ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, {"beta_schedule": "linear"})
GAMMA = 5.0


class Recorder:
    """A UNet whose output is zero, so that the loss is the mean square of the target, and which records its inputs."""

    def __call__(self, noisy, timesteps, embedding, return_dict):
        self.noisy, self.timesteps, self.embedding = noisy, timesteps, embedding
        return (torch.zeros_like(noisy),)


def alphas(scheduler):
    """Return the share of signal variance at each timestep, (n,) float64, by the definition of the schedule."""
    config = scheduler.config
    power = 2 if config.beta_schedule == "scaled_linear" else 1
    betas = np.linspace(config.beta_start ** (1 / power), config.beta_end ** (1 / power), 1000) ** power
    return torch.from_numpy(np.cumprod(1 - betas))


def random_example(batch=6):
    draw = torch.Generator().manual_seed(0)
    latents = {name: torch.randn(batch, 4, 8, 8, generator=draw) for name in ("mean", "noise", "posterior_noise")}
    return latents | {
        "std": torch.rand(batch, 4, 8, 8, generator=draw),
        "embedding": torch.randn(batch, 24, generator=draw),
        "timestep": torch.tensor([0, 1, 250, 500, 750, 999])[:batch],
        "is_dropped": torch.arange(batch) % 3 == 1,
    }


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule["beta_schedule"])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("gamma", [None, GAMMA])
def test_losses_are_those_of_the_formulas(schedule, kind, gamma):
    scheduler = DDPMScheduler(**schedule, prediction_type=kind)
    example, unet = random_example(), Recorder()
    losses = diffusion_losses(unet, example, scheduler, 0.18215, gamma)

    alpha = alphas(scheduler)[example["timestep"]].view(-1, 1, 1, 1)
    noise = example["noise"].double()
    z = 0.18215 * (example["mean"].double() + example["std"].double() * example["posterior_noise"].double())
    torch.testing.assert_close(unet.noisy.double(), alpha.sqrt() * z + (1 - alpha).sqrt() * noise, rtol=0, atol=1e-5)
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * z
    target = {"epsilon": noise, "sample": z, "v_prediction": velocity}[kind]
    expected = target.square().mean((1, 2, 3))
    if gamma is not None:
        snr = (alpha / (1 - alpha)).flatten()
        divisor = {"epsilon": snr, "sample": 1, "v_prediction": snr + 1}[kind]
        expected = expected * snr.clamp(max=gamma) / divisor
    torch.testing.assert_close(losses.double(), expected, rtol=2e-4, atol=0)  # 1 - alpha of timestep 0 in float32


def test_min_snr_weighs_the_same_error_of_latents_equally():
    t = torch.arange(1000)
    snr = alphas(DDPMScheduler(**SCHEDULES[0])) / (1 - alphas(DDPMScheduler(**SCHEDULES[0])))
    in_latents = {"epsilon": snr, "sample": torch.ones(1000), "v_prediction": snr + 1}  # by what errors are larger
    for kind in TYPES:
        weights = snr_weights(DDPMScheduler(**SCHEDULES[0], prediction_type=kind), t, GAMMA).double()
        torch.testing.assert_close(weights * in_latents[kind], snr.clamp(max=GAMMA), rtol=2e-4, atol=1e-9)


@pytest.mark.parametrize("kind", TYPES)
def test_weights_are_finite_where_the_snr_is_zero_or_infinite(kind):
    rescaled = DDPMScheduler(prediction_type=kind, rescale_betas_zero_snr=True)
    assert rescaled.alphas_cumprod[-1] == 0
    weights = snr_weights(rescaled, torch.arange(1000), GAMMA)
    assert weights.isfinite().all()
    assert weights[-1] == (1 if kind == "epsilon" else 0)
    clean = DDPMScheduler(prediction_type=kind, num_train_timesteps=2, trained_betas=[0.0, 0.5])
    weight = snr_weights(clean, torch.tensor([0]), GAMMA)
    assert weight == (GAMMA if kind == "sample" else 0)


def test_dropped_examples_have_no_embedding():
    example, unet = random_example(), Recorder()
    diffusion_losses(unet, example, DDPMScheduler(), 1.0)
    assert unet.embedding.shape == (6, 1, 24)
    assert (unet.embedding[[1, 4]] == 0).all()
    assert torch.equal(unet.embedding[[0, 2, 3, 5], 0], example["embedding"][[0, 2, 3, 5]])


def test_gradients_reach_the_unet_alone(pipe):
    draw = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 64, 64, generator=draw)
    encoded = Encoder(pipe).encode({"pixels": pixels, "pixel_values": pixels[..., :32, :32]})
    shape = encoded["mean"].shape
    example = encoded | {
        "noise": torch.randn(shape, generator=draw),
        "posterior_noise": torch.randn(shape, generator=draw),
        "timestep": torch.tensor([10, 700]),
        "is_dropped": torch.tensor([False, True]),
    }
    assert shape == (2, 4, 8, 8)
    diffusion_losses(pipe.unet, example, DDPMScheduler(), 0.18215).mean().backward()
    assert all(parameter.grad is not None for parameter in pipe.unet.parameters())
    assert any(parameter.grad.abs().max() > 0 for parameter in pipe.unet.parameters())
    for model in (pipe.vae, pipe.image_encoder):
        assert all(parameter.grad is None for parameter in model.parameters())


@torch.no_grad()
def test_the_bundled_model_has_learned_this_objective():
    pipe = StableDiffusionImageVariationPipeline.from_pretrained("imvar-emoji")
    sheet = torch.from_numpy(np.array(Image.open(PHOTOS.parent / "emoji" / "held-out.png")))
    drawings = rearrange(sheet, "(y h) (x w) c -> (y x) h w c", h=64, w=64)[:32]
    pixels = drawings.permute(0, 3, 1, 2) / 127.5 - 1
    embedding = pipe.encode_image([Image.fromarray(drawing.numpy()) for drawing in drawings])[:, 0]
    example = {"pixels": pixels, "pixel_values": torch.zeros(32, 3, 64, 64)}
    example = Encoder(pipe).encode(example) | {"embedding": embedding}
    draw = torch.Generator().manual_seed(0)
    example |= {
        "noise": torch.randn(example["mean"].shape, generator=draw),
        "posterior_noise": torch.randn(example["mean"].shape, generator=draw),
        "timestep": torch.randint(1000, (32,), generator=draw),
        "is_dropped": torch.zeros(32, dtype=torch.bool),
    }
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)

    def loss(**changes):
        return float(diffusion_losses(pipe.unet, example | changes, scheduler, 1.0).mean())

    own, other, none = loss(), loss(embedding=embedding.roll(1, 0)), loss(is_dropped=torch.ones(32, dtype=torch.bool))
    assert own == pytest.approx(0.3194, abs=0.001)
    assert none == pytest.approx(0.3501, abs=0.001)
    assert other == pytest.approx(0.4473, abs=0.001)
