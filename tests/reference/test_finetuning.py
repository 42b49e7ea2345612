"""The objective of a fine-tuning beside the noise and the targets of diffusers' training scripts."""

import diffusers
import pytest
import torch
from finetuning.objective import diffusion_losses

import imvar
from tests.support.random_checkpoint import PUBLISHED_SCHEDULER


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_noisy_latents_and_losses(kind, rescale):
    schedule = {name: PUBLISHED_SCHEDULER[name] for name in ("beta_start", "beta_end", "beta_schedule")}
    schedule |= {"prediction_type": kind, "rescale_betas_zero_snr": rescale}
    theirs = diffusers.DDPMScheduler(**schedule)
    draw = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 8, 4, 8, 8, generator=draw)
    t = torch.tensor([0, 1, 100, 400, 600, 900, 998, 999])
    inputs = []

    def unet(noisy, timesteps, embedding, return_dict):
        inputs.append(noisy)
        return (0.5 * noisy,)

    example = {
        "mean": latents,
        "std": torch.zeros_like(latents),
        "posterior_noise": noise,
        "noise": noise,
        "timestep": t,
        "embedding": torch.zeros(8, 24),
        "is_dropped": torch.zeros(8, dtype=torch.bool),
    }
    losses = diffusion_losses(unet, example, imvar.DDPMScheduler(**schedule), 0.18215)
    scaled = 0.18215 * latents
    noisy = theirs.add_noise(scaled, noise, t)
    assert torch.equal(inputs[0], noisy)
    target = {"epsilon": noise, "sample": scaled, "v_prediction": theirs.get_velocity(scaled, noise, t)}[kind]
    expected = torch.nn.functional.mse_loss(0.5 * noisy, target, reduction="none").mean((1, 2, 3))
    assert torch.equal(losses, expected)
