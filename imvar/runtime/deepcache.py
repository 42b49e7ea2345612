"""DeepCache (arXiv:2312.00858): run the full UNet every few steps, and only its last layer on cached features between.

Approximate: it relies on deep features changing slowly from step to step.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ..models.conditioning import Precomputed, repeat_to_batch
from ..models.layers import refuse_unsupported
from ..models.ops import PackedWeights, executing, norm_act
from ..models.regions import RegionLayout
from ..models.validation import RESIDUALS
from .precompute import PrecomputedUNet, Runner, at_step


class DeepCacheUNet(PrecomputedUNet):
    """A precomputed UNet that runs fully every `interval` steps.

    In between, its last layer merges the cached deep features of the last full step with the skip connection of the
    current latents.
    """

    def __init__(
        self,
        unet: Any,
        timesteps: Tensor,
        context: Tensor,
        interval: int,
        runner: Runner = partial,
        packed: PackedWeights | None = None,
        regions: RegionLayout | None = None,
    ):
        super().__init__(unet, timesteps, context, packed=packed, regions=regions)
        self.predict_and_cache = runner(predict_and_cache, unet)
        self.predict_from_cache = runner(predict_from_cache, unet)
        self.interval, self.last_full_step = interval, -interval
        self.deep_features: Any = None

    def __call__(self, x: Tensor, step: int, **more: Any) -> Tensor:
        residuals = {name: more.pop(name) for name in RESIDUALS if more.get(name) is not None}
        refuse_unsupported("DeepCache", **more)
        time = at_step(self.times, step)
        with executing(packed=self.packed):
            if step - self.last_full_step < self.interval:
                return self.predict_from_cache(x, time, self.context, residuals, self.deep_features)
            sample, self.deep_features = self.predict_and_cache(x, time, self.context, residuals)
        self.last_full_step = step
        return sample


def predict_and_cache(
    unet: Any, x: Tensor, time: Precomputed, context: Precomputed, residuals: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return the prediction, and the features that enter the last layer."""
    deep_features = x

    def merge(h: Tensor, skip: Tensor, block: int) -> Tensor:
        nonlocal deep_features
        deep_features = h.clone()  # a merge may write over what it is given
        return unet.merge_skip(h, skip, block)

    sample = unet(x, time, context, merge=merge, **residuals).sample
    return sample.contiguous(), deep_features


def predict_from_cache(
    unet: Any,
    x: Tensor,
    time: Precomputed,
    context: Precomputed,
    residuals: Mapping[str, Any],
    deep_features: Tensor,
) -> Tensor:
    """Return the prediction by the first convolution, whose output is the last skip connection, and the last layer."""
    skip, block = repeat_to_batch(unet.conv_in(x), deep_features), unet.up_blocks[-1]
    if residuals:
        skip = skip + repeat_to_batch(residuals[RESIDUALS[0]][0], deep_features)
    h = unet.merge_skip(deep_features.clone(), skip, len(unet.up_blocks) - 1)
    h = block.layer(len(block.resnets) - 1, h, time.value[-1], context.value[-1])
    return unet.conv_out(norm_act(unet.conv_norm_out, unet.conv_act, h)).contiguous()
