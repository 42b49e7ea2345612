"""A UNet made ready for a run: what does not depend on the latents is worked out before the loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..kernels.packed_weights import PackedWeights
from ..models.stock import Precomputed, write_count

Runner = Callable[[Callable[..., Any], Any], Callable[..., Any]]
"""How a function of a model and of tensors is to be run: as `partial(function, model)`, or quicker."""


class PrecomputedUNet:
    """The UNet as a function of the latents (b, c, h, w) and the number of a step, to (k b, c, h, w).

    A table of the time's biases, a row per step, and the answers of cross-attention to a single token. `timesteps`:
    (n,), those of the run; `context`: (k b, m, c), k for each sample, in the samples' order, k times over. Several of
    one run may share what is `kept` of the weights.
    """

    def __init__(
        self, unet: Any, timesteps: Tensor, context: Tensor, runner: Runner = partial, kept: PackedWeights | None = None
    ):
        timesteps = torch.as_tensor(timesteps, device=context.device)
        self.times, self.context = unet.prepare_time(timesteps), fuse_qkv(unet, unet.prepare_context(context))
        self.whole, self.kept = runner(predict, unet), kept or PackedWeights(len(timesteps))

    def __call__(self, x: Tensor, step: int) -> Tensor:
        with self.kept.at_hand():
            return self.whole(x, at_step(self.times, step), self.context)


TRACKED = [attrgetter(name) for name in ("_modules", "_parameters", "_forward_pre_hooks", "_forward_hooks")]


class Fingerprint:
    """Tells whether anything was changed in a model that a prepared run depends on: weights, layers, hooks, kernels."""

    def __init__(self, model: Any):
        self.model, self.layers = model, list(model.modules())
        self.weights = [p for layer in self.layers for p in layer._parameters.values() if p is not None]
        self.seen = self.look()

    def changed(self, model: Any) -> bool:
        return model is not self.model or self.look() != self.seen

    def look(self) -> list[Any]:
        parts = [[part for layer in self.layers for part in map(id, held(layer).values())] for held in TRACKED]
        kernels = [vars(layer).get(name) for layer in self.layers for name in ("forward", "attend", "override")]
        return [*parts, kernels, [p.data_ptr() for p in self.weights], [write_count(p) for p in self.weights]]


def predict(unet: Any, x: Tensor, time: Precomputed, context: Precomputed) -> Tensor:
    return unet(x, time, context).sample.contiguous()


def fuse_qkv(unet: Any, context: Precomputed) -> Precomputed:
    """A context made ready, with the weights beside it that self-attention multiplies the same x by."""
    return Precomputed(
        [
            [
                Precomputed(
                    [
                        ready._replace(weights=block.self_attn.qkv())
                        for block, ready in zip(layer.blocks, told.value, strict=True)
                    ]
                )
                for layer, told in zip(level.transformers, of_level, strict=True)
            ]
            for level, of_level in zip(unet.levels, context.value, strict=True)
        ]
    )


def at_step(table: Any, step: int) -> Any:
    """Of what was made ready for the times (n,), what one of them needs."""
    if isinstance(table, Precomputed):
        return Precomputed(at_step(table.value, step))
    return table[step : step + 1] if isinstance(table, Tensor) else [at_step(part, step) for part in table]
