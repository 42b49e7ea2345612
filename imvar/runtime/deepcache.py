"""Approximate: the UNet's deep features, which change slowly from step to step, kept for a few (arXiv:2312.00858)."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from ..kernels.packed_weights import Kept
from ..models.layers import normed_silu
from ..models.stock import Ready, repeated
from .precompute import Prepared, Runner, row


class Cached(Prepared):
    """A prepared UNet that runs whole when that was `interval` steps ago, and in the others its last layer alone.

    The last layer meets what the whole UNet told it from below in an earlier step, and the skip of this one.
    """

    def __init__(
        self,
        unet: Any,
        timesteps: Tensor,
        context: Tensor,
        interval: int,
        runner: Runner = partial,
        kept: Kept | None = None,
    ):
        super().__init__(unet, timesteps, context, kept=kept)
        self.remembering, self.last_layer = runner(remembering, unet), runner(last_layer, unet)
        self.interval, self.whole_at = interval, -interval
        self.deep: Any = None

    def __call__(self, x: Tensor, step: int) -> Tensor:
        time = row(self.times, step)
        with self.kept.at_hand():
            if step - self.whole_at < self.interval:
                return self.last_layer(x, time, self.context, self.deep)
            sample, self.deep = self.remembering(x, time, self.context)
        self.whole_at = step
        return sample


def remembering(unet: Any, x: Tensor, time: Ready, context: Ready) -> tuple[Tensor, Tensor]:
    """The prediction, and what the last layer was told from below."""
    deep = x

    def merge(h: Tensor, skip: Tensor, level: int) -> Tensor:
        nonlocal deep
        deep = h.clone()  # as whoever merges may write over what it is given
        return unet.merge(h, skip, level)

    sample = unet(x, time, context, merge=merge).sample
    return sample.contiguous(), deep


def last_layer(unet: Any, x: Tensor, time: Ready, context: Ready, deep: Tensor) -> Tensor:
    """The prediction by the first convolution, whose result is the last skip, and the last layer."""
    skip, level = repeated(unet.conv_in(x), deep), unet.up[-1]
    h = unet.merge(deep.clone(), skip, len(unet.up) - 1)
    h = level.layer(len(level.resnets) - 1, h, time.value[-1], context.value[-1])
    return unet.conv_out(normed_silu(unet.norm_out, h)).contiguous()
