"""What is measured of the small model, each figure with its standard error: the judge's naming of what was made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imvar import DDIMScheduler
from train_emoji.diffusion import SCHEDULER, parts
from train_emoji.networks import Namer, ranks
from train_emoji.samples import GUIDANCE, STEPS, make


@dataclass(frozen=True)
class Share:
    """A share of n cases."""

    value: float
    n: int

    @property
    def error(self) -> float:
        """The standard error, of independent cases."""
        return math.sqrt(max(self.value * (1 - self.value), 1e-9) / self.n)

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ± {100 * self.error:.1f} %"


@dataclass(frozen=True)
class Identity:
    """How often the judge names what was asked for, first or among its first five."""

    top1: Share
    top5: Share


@torch.no_grad()
def identity(judge: Namer, made: Tensor, labels: list[str], among: list[str]) -> Identity:
    """Of pictures (n, 3, 64, 64) in [0, 1] that should show `labels`, where the judge chooses among all of `among`."""
    scores = torch.cat([judge(part, among) for part in made.split(256)])
    place = ranks(scores, torch.tensor([among.index(label) for label in labels]))
    return Identity(*(Share(float((place < k).float().mean()), len(made)) for k in (1, 5)))


def variations(
    pipe: Any,
    pictures: Tensor,
    labels: list[str],
    n: int,
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    first_seed: int = 0,
) -> tuple[Tensor, list[str], list[int]]:
    """n variations, going round the pictures as often as it takes, each by its own seed; their labels and pictures."""
    places = [i % len(pictures) for i in range(n)]
    made = make(pipe, pictures[places], list(range(first_seed, first_seed + n)), steps=steps, guidance=guidance)
    return made, [labels[i] for i in places], places


@torch.no_grad()
def spread(judge: Namer, made: Tensor, inputs: int) -> tuple[float, float, float]:
    """Of k variations of each input, k-th after k-th: how far apart, in the judge's features and in levels.

    Answers the mean distance between variations of one input, that between variations of different inputs, and the
    least mean absolute difference of two variations of one input.
    """
    features = torch.cat([judge.embedding(part) for part in made.split(256)]).unflatten(0, (-1, inputs)).transpose(0, 1)
    pictures = made.flatten(1).unflatten(0, (-1, inputs)).transpose(0, 1)
    within = torch.stack([F.pdist(one).mean() for one in features]).mean()
    between = torch.stack([F.pdist(features[:, k]).mean() for k in range(features.shape[1])]).mean()
    least = (
        torch.stack(
            [torch.cdist(one, one, p=1)[tuple(torch.triu_indices(len(one), len(one), 1))].min() for one in pictures]
        ).min()
        / pictures.shape[-1]
    )
    return float(within), float(between), float(least)


@torch.no_grad()
def nearest(made: Tensor, trained: Tensor) -> Tensor:
    """Of each picture the mean absolute difference to the training drawing that is most like it."""
    trained = trained.flatten(1)
    return torch.cat([torch.cdist(part.flatten(1), trained, p=1).amin(1) for part in made.split(64)]) / trained.shape[1]


@torch.no_grad()
def from_time(pipe: Any, drawings: Tensor, embeddings: Tensor, start: int, seed: int = 0, steps: int = 10) -> Tensor:
    """Denoise real latents from time `start` on, without guidance: what the model can do from there."""
    latents = pipe.vae.encode(drawings * 2 - 1).latent_dist.mean
    scheduler = DDIMScheduler(**SCHEDULER, prediction_type=pipe.scheduler.config.prediction_type)
    times = torch.linspace(start, 0, steps + 1).round().long()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    x = scheduler.add_noise(latents, noise, times[:1].expand(len(latents)))
    for now, then in pairwise(times):
        answer = pipe.unet(x, now, embeddings[:, None]).sample
        x0, eps = parts(scheduler, answer, x, int(now))
        alpha = scheduler.alphas_cumprod[then]
        x = alpha.sqrt() * x0 + (1 - alpha).sqrt() * eps
    return (pipe.vae.decode(x).sample / 2 + 0.5).clamp(0, 1)
