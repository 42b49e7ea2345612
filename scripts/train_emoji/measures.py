"""Metrics of the trained model with their standard errors, mainly the judge's accuracy on generated images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imvar import DDIMScheduler
from train_emoji.diffusion import SCHEDULER, to_x0_and_eps
from train_emoji.networks import Classifier, ranks
from train_emoji.samples import GUIDANCE, STEPS, generate


@dataclass(frozen=True)
class Share:
    """A proportion of n cases."""

    value: float
    n: int

    @property
    def error(self) -> float:
        """Standard error for independent cases."""
        return math.sqrt(max(self.value * (1 - self.value), 1e-9) / self.n)

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ± {100 * self.error:.1f} %"


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 accuracy of the judge."""

    top1: Share
    top5: Share


@torch.no_grad()
def accuracy(judge: Classifier, images: Tensor, labels: list[str], classes: list[str]) -> Accuracy:
    """Return the judge's accuracy on images (n, 3, 64, 64) in [0, 1] of the classes `labels`, out of `classes`."""
    scores = torch.cat([judge(chunk, classes) for chunk in images.split(256)])
    rank = ranks(scores, torch.tensor([classes.index(label) for label in labels]))
    return Accuracy(*(Share(float((rank < k).float().mean()), len(images)) for k in (1, 5)))


def variations(
    pipe: Any,
    images: Tensor,
    labels: list[str],
    n: int,
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    first_seed: int = 0,
) -> tuple[Tensor, list[str], list[int]]:
    """Generate n variations, one seed each, of the images in turn; return them, their labels and input indices."""
    indices = [i % len(images) for i in range(n)]
    seeds = list(range(first_seed, first_seed + n))
    output = generate(pipe, images[indices], seeds, steps=steps, guidance=guidance)
    return output, [labels[i] for i in indices], indices


@torch.no_grad()
def spread(judge: Classifier, images: Tensor, inputs: int) -> tuple[float, float, float]:
    """Measure the diversity of k variations of each input, ordered (k inputs), by the judge's features and by pixels.

    Returns the mean feature distance between variations of one input, that between variations of different inputs, and
    the smallest mean absolute pixel difference of two variations of one input.
    """
    features = (
        torch.cat([judge.embedding(chunk) for chunk in images.split(256)]).unflatten(0, (-1, inputs)).transpose(0, 1)
    )
    pixels = images.flatten(1).unflatten(0, (-1, inputs)).transpose(0, 1)
    within = torch.stack([F.pdist(group).mean() for group in features]).mean()
    between = torch.stack([F.pdist(features[:, k]).mean() for k in range(features.shape[1])]).mean()
    least = (
        torch.stack(
            [
                torch.cdist(group, group, p=1)[tuple(torch.triu_indices(len(group), len(group), 1))].min()
                for group in pixels
            ]
        ).min()
        / pixels.shape[-1]
    )
    return float(within), float(between), float(least)


@torch.no_grad()
def nearest(images: Tensor, trained: Tensor) -> Tensor:
    """Return the mean absolute difference of each image to its nearest training drawing."""
    trained = trained.flatten(1)
    return torch.cat([torch.cdist(i.flatten(1), trained, p=1).amin(1) for i in images.split(64)]) / trained.shape[1]


@torch.no_grad()
def denoise_from(pipe: Any, drawings: Tensor, embeddings: Tensor, start: int, seed: int = 0, steps: int = 10) -> Tensor:
    """Denoise real latents from timestep `start` on, without guidance."""
    latents = pipe.vae.encode(drawings * 2 - 1).latent_dist.mean
    scheduler = DDIMScheduler(**SCHEDULER, prediction_type=pipe.scheduler.config.prediction_type)
    timesteps = torch.linspace(start, 0, steps + 1).round().long()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    x = scheduler.add_noise(latents, noise, timesteps[:1].expand(len(latents)))
    for t, t_prev in pairwise(timesteps):
        output = pipe.unet(x, t, embeddings[:, None]).sample
        x0, eps = to_x0_and_eps(scheduler, output, x, int(t))
        alpha = scheduler.alphas_cumprod[t_prev]
        x = alpha.sqrt() * x0 + (1 - alpha).sqrt() * eps
    return (pipe.vae.decode(x).sample / 2 + 0.5).clamp(0, 1)
