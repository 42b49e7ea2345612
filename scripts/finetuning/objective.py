"""The objective: the UNet predicts the noise of noisy latents, or their velocity, given the image's embedding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetuning.examples import Example
from imvar import DDPMScheduler


def diffusion_losses(
    unet: Any, example: Example, scheduler: DDPMScheduler, scaling_factor: float, snr_gamma: float | None = None
) -> Tensor:
    """Return the loss (b,) of each example: arXiv:2006.11239, equation 14, or by velocity, arXiv:2202.00512.

    `snr_gamma`: the gamma of Min-SNR weighting (arXiv:2303.09556, section 3.4), about 5; None: equal weights.
    """
    timesteps, noise = example["timestep"], example["noise"]
    latents = scaling_factor * (example["mean"] + example["std"] * example["posterior_noise"])
    noisy = scheduler.add_noise(latents, noise, timesteps)
    embedding = torch.where(example["is_dropped"][:, None], 0.0, example["embedding"])
    is_velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise
    output = unet(noisy, timesteps, embedding[:, None], return_dict=False)[0]
    losses = F.mse_loss(output.float(), target, reduction="none").flatten(1).mean(1)
    return losses if snr_gamma is None else losses * snr_weights(scheduler, timesteps, snr_gamma)


def snr_weights(scheduler: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """Return the weights (b,) of Min-SNR: min(SNR, gamma) / SNR for the noise, / (SNR + 1) for the velocity."""
    alpha = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alpha / (1 - alpha)
    return snr.clamp(max=gamma) / (snr + (scheduler.config.prediction_type == "v_prediction"))
