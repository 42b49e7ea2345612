"""The objective: the UNet predicts the noise in noisy latents, or another target, given the image's embedding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetuning.examples import Example
from imvar import DDPMScheduler


def diffusion_losses(
    unet: Any, example: Example, scheduler: DDPMScheduler, scaling_factor: float, min_snr: float | None = None
) -> Tensor:
    """Return the loss (b,) of each example: equation 14 of arXiv:2006.11239, for the target of the prediction type.

    `min_snr`: the gamma of Min-SNR weighting (arXiv:2303.09556, section 3.4), about 5; None: equal weights.
    """
    timesteps, noise = example["timestep"], example["noise"]
    latents = scaling_factor * (example["mean"] + example["std"] * example["posterior_noise"])
    noisy = scheduler.add_noise(latents, noise, timesteps)
    embedding = torch.where(example["is_dropped"][:, None], 0.0, example["embedding"])
    output = unet(noisy, timesteps, embedding[:, None], return_dict=False)[0]
    target = target_of(scheduler, latents, noise, timesteps)
    losses = F.mse_loss(output.float(), target, reduction="none").flatten(1).mean(1)
    return losses if min_snr is None else losses * snr_weights(scheduler, timesteps, min_snr)


def target_of(scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return the target (b, c, h, w) of the UNet: the noise, the latents or the velocity (arXiv:2202.00512)."""
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    return latents if scheduler.config.prediction_type == "sample" else noise


def snr_weights(scheduler: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """Return the weights (b,) of Min-SNR: min(SNR, gamma) for the latents, / SNR for the noise, / (SNR + 1) for v."""
    alpha = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alpha / (1 - alpha)  # infinite without noise
    if scheduler.config.prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)  # also where the SNR is 0
    return snr.clamp(max=gamma) / (snr + 1 if scheduler.config.prediction_type == "v_prediction" else 1)
