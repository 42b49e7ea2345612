"""Regions: contexts with a token for each region of an image, and what cross-attention to them returns.

Over a context of one token, the output of cross-attention is one vector for all positions (models/attention.py). With a
token for each region, the output at a position is the mean of their vectors, weighted by how much of the position each
region covers. The latents have no part in that, so it is computed before the first denoising step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, invalid, short_repr

Scale = float | Mapping[str, float]
"""The opacity of a region in each block of the UNet, in [0, 1]: one for all, or by name and 0 in the others."""


@dataclass(frozen=True, eq=False)
class RegionLayout:
    """How the tokens of a context (b, k + 1, c) share the latents: one token for each of k regions, then the rest's.

    `masks`: (k, rows, columns) in [0, 1], with 1 for the region, of any resolution. Later regions lie over earlier
    ones; the last token is for what no region covers. `size`: height and width of the latents.
    """

    masks: Tensor
    scales: Sequence[Scale]
    size: tuple[int, int]

    def by_block(self, context: Tensor, levels: Mapping[str, int]) -> dict[str, RegionalContext]:
        """Return the context of each block with attention, given how often the latents are halved for it."""
        check_scales(self.scales, levels)
        contexts = [context[:, i : i + 1].contiguous() for i in range(context.shape[1])]
        by_block = {}
        for block, level in levels.items():
            height, width = (-(-side // 2**level) for side in self.size)
            weights = self.weights(block, (height, width))
            used = [i for i, weight in enumerate(weights) if weight.any()]
            by_block[block] = RegionalContext([contexts[i] for i in used], weights[used])
        return by_block

    def weights(self, block: str, size: tuple[int, int]) -> Tensor:
        """Return the weights of all tokens at each position of a block's feature map: (k + 1, h w), with a sum of 1.

        (k + 1, 1) where they are the same at all positions.
        """
        scales = [scale.get(block, 0.0) if isinstance(scale, Mapping) else scale for scale in self.scales]
        opacities = torch.stack([mask * scale for mask, scale in zip(self.masks, scales, strict=True)])
        weights = composite(opacities)
        if torch.equal(weights, weights[:, :1, :1].expand_as(weights)):
            return weights[:, :1, 0]
        return F.adaptive_avg_pool2d(weights, size).flatten(1)


@dataclass(frozen=True, eq=False)
class RegionalContext:
    """The context of a block: contexts of one token (b, 1, c), and the weight of each at all positions, (k, n).

    n is h w, or 1 for the same weights at all positions.
    """

    contexts: list[Tensor]
    weights: Tensor

    def attend(self, single_token_output: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the output (b, n, dim) of a layer, given its output (b, 1, dim) for a context (b, 1, c).

        A token's output is computed as in a call without regions, for the same batch: so it has the same bits.
        """
        if self.weights.shape[1] == 1:
            return single_token_output(weighted_mean(self.contexts, self.weights))
        return weighted_mean(map(single_token_output, self.contexts), self.weights)


def check_scales(scales: Iterable[Scale], blocks: Collection[str]) -> None:
    """Check that all names in scales are among those of the `blocks` with attention."""
    for scale in scales:
        if isinstance(scale, Mapping) and (others := [name for name in scale if name not in blocks]):
            got = ", ".join(map(short_repr, others))
            raise invalid(InputError, "scale", f"blocks with attention: {', '.join(blocks)}", got)


def composite(opacities: Tensor) -> Tensor:
    """Return the visible share of each layer of an image, later ones over earlier ones, and of the ground below them.

    Opacities (k, h, w) to shares (k + 1, h, w): o_i * prod_{j > i} (1 - o_j), and prod_j (1 - o_j) for the ground (the
    operator "over" of Porter and Duff, "Compositing digital images", SIGGRAPH 1984).
    """
    ones = torch.ones_like(opacities[:1])
    through = torch.cat([ones, (1 - opacities).flip(0).cumprod(0)]).flip(0)  # from layer i on; of none, 1
    return torch.cat([opacities * through[1:], through[:1]])


def weighted_mean(values: Iterable[Tensor], weights: Tensor) -> Tensor:
    """Return the mean (b, n, d) of k tensors (b, 1, d) with weights (k, n), whose sums are 1.

    It is computed in float32 or wider from the differences to the first: equal values have exactly that value as mean.
    """
    first, *others = values
    wide = first.to(torch.promote_types(first.dtype, torch.float32))
    mean = wide
    for value, weight in zip(others, weights[1:].to(wide), strict=True):
        mean = mean + weight[:, None] * (value - wide)
    return mean.to(first.dtype)
