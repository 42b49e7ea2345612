"""Precomputation: what does not depend on the latents is computed once, before the first denoising step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..models.conditioning import Precomputed
from ..models.ops import PackedWeights, executing, write_count
from ..models.regions import RegionLayout
from ..models.stock import is_unmodified

Runner = Callable[[Callable[..., Any], Any], Callable[..., Any]]
"""How to run a function of a model and tensors: `partial(function, model)`, or compiled."""


class PrecomputedUNet:
    """The UNet as a function of latents (b, c, h, w) and the index of a step, to (k b, c, h, w).

    It holds the projected timestep embeddings, one row per step, the output of cross-attention to a single token, and
    the fused q/k/v weights of self-attention. `timesteps`: (n,), those of the loop; `context`: (k b, m, c), k contexts
    per sample: all samples with their first context, then all with their second. `regions` lays out the m tokens over
    the latents. Several of one loop may share `packed`.
    """

    def __init__(
        self,
        unet: Any,
        timesteps: Tensor,
        context: Tensor,
        runner: Runner = partial,
        packed: PackedWeights | None = None,
        regions: RegionLayout | None = None,
    ):
        timesteps = torch.as_tensor(timesteps, device=context.device)
        self.times, self.context = unet.precompute_time(timesteps), unet.precompute_context(context, regions)
        self.predict, self.packed = runner(predict, unet), packed or PackedWeights(len(timesteps))

    def __call__(self, x: Tensor, step: int, **more: Any) -> Tensor:
        with executing(packed=self.packed):
            return self.predict(x, at_step(self.times, step), self.context, more)


def predict(unet: Any, x: Tensor, time: Precomputed, context: Precomputed, more: Mapping[str, Any]) -> Tensor:
    return unet(x, time, context, **more).sample.contiguous()


def at_step(table: Any, step: int) -> Any:
    """Return what one step needs of what was precomputed for all timesteps (n,)."""
    if isinstance(table, Precomputed):
        return Precomputed(at_step(table.value, step))
    return table[step : step + 1] if isinstance(table, Tensor) else [at_step(entry, step) for entry in table]


TRACKED = [attrgetter(name) for name in ("_modules", "_parameters", "_forward_pre_hooks", "_forward_hooks")]
SLOTS = "forward", "attend", "backend", "slice_size", "merge", "freeu"


class Fingerprint:
    """Detects changes of anything that a precomputed UNet depends on: weights, layers, hooks or kernels."""

    def __init__(self, model: Any):
        self.model, self.layers = model, list(model.modules())
        self.weights = [p for layer in self.layers for p in layer._parameters.values() if p is not None]
        self.taken = self.take()

    def differs_from(self, model: Any) -> bool:
        return model is not self.model or self.take() != self.taken

    def take(self) -> list[Any]:
        parts = [[part for layer in self.layers for part in map(id, tracked(layer).values())] for tracked in TRACKED]
        kernels = [vars(layer).get(name) for layer in self.layers for name in SLOTS]
        weights = [(p.data_ptr(), write_count(p)) for p in self.weights]
        return [*parts, kernels, weights, is_unmodified(self.model)]
