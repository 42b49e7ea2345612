"""Approximate: the UNet's deep features, which change slowly from step to step, kept for a few (arXiv:2312.00858)."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from ..kernels.packed_weights import PackedWeights
from ..models.layers import norm_silu
from ..models.stock import Precomputed, repeat_to_batch
from .precompute import PrecomputedUNet, Runner, at_step


class DeepCacheUNet(PrecomputedUNet):
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
        kept: PackedWeights | None = None,
    ):
        super().__init__(unet, timesteps, context, kept=kept)
        self.remembering, self.last_layer = runner(predict_and_cache, unet), runner(predict_from_cache, unet)
        self.interval, self.whole_at = interval, -interval
        self.deep: Any = None

    def __call__(self, x: Tensor, step: int) -> Tensor:
        time = at_step(self.times, step)
        with self.kept.at_hand():
            if step - self.whole_at < self.interval:
                return self.last_layer(x, time, self.context, self.deep)
            sample, self.deep = self.remembering(x, time, self.context)
        self.whole_at = step
        return sample


def predict_and_cache(unet: Any, x: Tensor, time: Precomputed, context: Precomputed) -> tuple[Tensor, Tensor]:
    """The prediction, and what the last layer was told from below."""
    deep = x

    def merge(h: Tensor, skip: Tensor, level: int) -> Tensor:
        nonlocal deep
        deep = h.clone()  # as whoever merges may write over what it is given
        return unet.merge(h, skip, level)

    sample = unet(x, time, context, merge=merge).sample
    return sample.contiguous(), deep


def predict_from_cache(unet: Any, x: Tensor, time: Precomputed, context: Precomputed, deep: Tensor) -> Tensor:
    """The prediction by the first convolution, whose result is the last skip, and the last layer."""
    skip, level = repeat_to_batch(unet.conv_in(x), deep), unet.up[-1]
    h = unet.merge(deep.clone(), skip, len(unet.up) - 1)
    h = level.layer(len(level.resnets) - 1, h, time.value[-1], context.value[-1])
    return unet.conv_out(norm_silu(unet.norm_out, h)).contiguous()
