"""The loss and the judge's top-5 of a model on drawings, comparable between models drawing by drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from finetuning.objective import diffusion_losses
from torch import Tensor
from train_emoji.encoder import pixels
from train_emoji.measures import variations
from train_emoji.networks import Classifier, ranks

from imvar import DDPMScheduler

TIMESTEPS = (80, 240, 400, 560, 720, 880)
BATCH = 32


@dataclass(frozen=True)
class Estimate:
    """A mean over drawings, with its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """Return the mean of values (n,)."""
        return cls(float(values.mean()), float(values.std() / len(values) ** 0.5))


@torch.no_grad()
def fixed_losses(pipe: Any, rgb: Tensor, timesteps: Sequence[int] = TIMESTEPS, seed: int = 0) -> Tensor:
    """Return the loss (n,) of each drawing (n, 3, 64, 64) in [0, 1], its mean over the timesteps.

    The noise depends on the seed, the drawing's place and the timestep alone, so two models have the same.
    """
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for images in rgb.split(BATCH):
        posterior, count = pipe.vae.encode(images * 2 - 1).latent_dist, len(images)
        example = {
            "mean": posterior.mean,
            "std": posterior.std,
            "embedding": pipe.image_encoder(pixels(images)).image_embeds,
            "is_dropped": torch.zeros(count, dtype=torch.bool),
        }
        at_timesteps = []
        for timestep in timesteps:
            noise = torch.randn(2, *posterior.mean.shape, generator=generator)
            example |= {"noise": noise[0], "posterior_noise": noise[1], "timestep": torch.full((count,), timestep)}
            at_timesteps.append(diffusion_losses(pipe.unet, example, scheduler, pipe.vae.config.scaling_factor))
        losses.append(torch.stack(at_timesteps).mean(0))
    return torch.cat(losses)


@torch.no_grad()
def top5_shares(
    pipe: Any, judge: Classifier, rgb: Tensor, labels: list[str], classes: list[str], seeds: int
) -> tuple[Tensor, Tensor]:
    """Return each drawing's share (n,) of variations whose label is in the judge's top-5, and the first of each."""
    images, repeated, _ = variations(pipe, rgb, labels, seeds * len(rgb))
    return hits(judge, images, repeated, classes).unflatten(0, (seeds, -1)).mean(0), images[: len(rgb)]


@torch.no_grad()
def hits(judge: Classifier, images: Tensor, labels: list[str], classes: list[str]) -> Tensor:
    """Return 1 for each image (n, 3, 64, 64) whose label is in the judge's top-5, else 0."""
    wanted = torch.tensor([classes.index(label) for label in labels])
    return (ranks(judge(images, classes), wanted) < 5).float()
