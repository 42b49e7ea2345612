"""Guidance: what the UNet says of latents, more so for the picture that it is told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ..kernels.packed_weights import PackedWeights
from ..models import UNet2DConditionModel
from ..models.stock import is_unmodified, repeat_to_batch
from .deepcache import DeepCacheUNet
from .precompute import PrecomputedUNet, Runner

Predict = Callable[[Tensor, int], Tensor]
"""Scaled latents (b, 4, h, w) and the number of a step to a prediction for each context, (k b, 4, h, w)."""


def make_predictor(
    unet: Any,
    timesteps: Any,
    context: Tensor,
    cache_interval: int = 1,
    runner: Runner = partial,
    kept: PackedWeights | None = None,
) -> Predict:
    """Prepared, if it can be; else the UNet is called with all that it is told, each time."""
    if can_precompute(unet):
        if cache_interval > 1:
            return DeepCacheUNet(unet, timesteps, context, cache_interval, runner, kept)
        return PrecomputedUNet(unet, timesteps, context, runner, kept)
    return lambda x, i: unet(repeat_to_batch(x, context), timesteps[i], encoder_hidden_states=context).sample


def can_precompute(unet: Any) -> bool:
    """Whether a UNet is imvar's and nobody watches its layers."""
    return isinstance(unet, UNet2DConditionModel) and is_unmodified(unet)


class ClassifierFreeGuidance:
    """Classifier-free guidance (arXiv:2207.12598, equation 6): `scale` times from no picture to the picture told.

    In the steps from the share `interval[0]` of all of them up to `interval[1]` (arXiv:2404.07724); in the others
    the picture alone is told. `context`: (2 b, m, c), no picture first; `make` makes a predictor of a context.
    """

    def __init__(
        self,
        make: Callable[[Tensor], Predict],
        context: Tensor,
        scale: float,
        interval: tuple[float, float],
        steps: int,
    ):
        self.scale = scale
        self.guided = range(*(round(share * steps) for share in interval))
        self.both = make(context) if self.guided else None
        self.alone = make(context.chunk(2)[1]) if len(self.guided) < steps else None

    def __call__(self, x: Tensor, step: int) -> Tensor:
        if self.both is None or step not in self.guided:
            return self.alone(x, step)  # type: ignore[misc]  # made, as some step is not guided
        uncond, cond = self.both(x, step).chunk(2)
        return uncond + self.scale * (cond - uncond)
