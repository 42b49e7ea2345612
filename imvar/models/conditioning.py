"""Conditioning: the timestep and context that layers receive, and the parts of their output that depend on only these.

The timestep is embedded and projected once per resnet block, the context attended to once per transformer block; with
a context of one token neither depends on the latents, so a denoising loop computes both before its first step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Precomputed(NamedTuple):
    """The part of a module's output that depends on the conditioning alone; passed instead of the conditioning.

    `value`: for a module with children a list, one entry per child. `qkv`: the fused weight, and bias if any, of the
    block's self-attention layer, which does not depend on the latents either.
    """

    value: Any
    qkv: tuple[Tensor, ...] = ()


def entry(conditioning: Any, i: int) -> Any:
    """Return child i's entry of precomputed conditioning; a plain timestep embedding or context is every child's."""
    return conditioning.value[i] if isinstance(conditioning, Precomputed) else conditioning


def repeat_to_batch(x: Tensor, like: Tensor) -> Tensor:
    """Repeat x (b, ...) to the batch of `like` (k b, ...): several contexts per sample share what precedes the first.

    Under classifier-free guidance, everything before the first cross-attention is thus computed once for both halves.
    """
    batch, n = x.shape[0], like.shape[0]  # not len(), which a trace would record as a constant
    return x if batch == n else torch.cat([x] * (n // batch))
