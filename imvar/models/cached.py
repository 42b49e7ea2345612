"""Approximate: the UNet's deep features, which change slowly from step to step, kept for a few (arXiv:2312.00858)."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from .kept import Kept
from .layers import normed_silu
from .prepared import Prepared, Runner, row
from .told import Ready, repeated


class Cached(Prepared):
    """A prepared UNet that runs whole in every `interval`th call, and in the others its last layer alone.

    The last layer meets what the whole UNet told it from below in an earlier call, and the skip of this one.
    """

    def __init__(self, unet: Any, timesteps: Tensor, context: Tensor, interval: int, runner: Runner = partial,
                 kept: Kept | None = None):
        super().__init__(unet, timesteps, context, kept=kept)
        self.remembering, self.last_layer = runner(remembering, unet), runner(last_layer, unet)
        self.interval, self.calls = interval, 0
        self.deep: Any = None

    def __call__(self, x: Tensor, step: int) -> Tensor:
        time, self.calls = row(self.times, step), self.calls + 1
        with self.kept.at_hand():
            if (self.calls - 1) % self.interval:
                return self.last_layer(x, time, self.context, self.deep)
            sample, self.deep = self.remembering(x, time, self.context)
        return sample


def remembering(unet: Any, x: Tensor, time: Ready, context: Ready) -> tuple[Tensor, Tensor]:
    """The prediction, and what the last layer was told from below."""
    deep = x

    def merge(h: Tensor, skip: Tensor, level: int) -> Tensor:
        nonlocal deep
        deep = h
        return unet.merge(h, skip, level)

    sample = unet(x, time, context, merge=merge).sample
    return sample.contiguous(), deep


def last_layer(unet: Any, x: Tensor, time: Ready, context: Ready, deep: Tensor) -> Tensor:
    """The prediction by the first convolution, whose result is the last skip, and the last layer."""
    skip, level = repeated(unet.conv_in(x), deep), unet.up[-1]
    h = unet.merge(deep, skip, len(unet.up) - 1)
    h = level.layer(len(level.resnets) - 1, h, time.value[-1], context.value[-1])
    return unet.conv_out(normed_silu(unet.norm_out, h)).contiguous()
