"""Regions of an image, each with its own embedding: what `image_embeds` of a call may consist of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_float
from ..embeddings import as_embeddings
from ..errors import InputError, InputTypeError, describe, invalid, short_repr
from ..image.mask import read_mask
from ..models.regions import RegionLayout, Scale

ACCEPTED_MASK = "a PIL image, or an array or tensor (h, w) with values in [0, 1]"


@dataclass(frozen=True, eq=False)
class Region:
    """An image embedding for a part of an image and for some blocks of the UNet.

        pipe(image_embeds=[Region(panda), Region(fox, mask=left)])
        pipe(image_embeds=[Region(fox, scale={"down_blocks.1": 1, "mid_block": 1, "up_blocks.1": 1}),
                           Region(panda, scale={"down_blocks.0": 1, "up_blocks.2": 1})])

    Later regions lie over earlier ones. What they leave uncovered gets the negative embedding of the call, by default
    zeros. Where regions meet, self-attention and convolutions blend them.

    Args:
        image_embeds: (b, 1, c) or (b, c), one embedding per image of the call, or one for all.
        mask: where the region is, stretched over the image: a PIL image, of which white is the region, or a tensor or
            array (h, w) in [0, 1], of which 1 is. None for everywhere. It is averaged over each position of a feature
            map; masks of several sizes are first resized to the largest height and width, nearest neighbour.
        scale: opacity in [0, 1]: a number for the whole UNet, or numbers by name for blocks with attention, such as
            {"mid_block": 1, "up_blocks.1": 0.5}, and 0 in the others.

    Raises `InputError` for other values; a block without attention is an error of the call, which lists those with it.
    """

    image_embeds: Tensor
    mask: Any = None
    scale: Scale = 1.0

    def __post_init__(self) -> None:
        values = {
            "image_embeds": as_embeddings("image_embeds", self.image_embeds),
            "mask": None if self.mask is None else as_mask("mask", self.mask),
            "scale": as_scale(self.scale),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the class is frozen


def as_scale(scale: Any) -> Scale:
    """Return a checked scale."""
    if not isinstance(scale, Mapping):
        return check_float("scale", scale)
    return {name: check_float(f"scale[{short_repr(name)}]", value) for name, value in scale.items()}


def as_mask(name: str, mask: Any) -> Tensor:
    """Return a copy of a mask as float32 (h, w) on the CPU: 1 where a PIL image is white."""
    masks = read_mask(name, mask, accepted=ACCEPTED_MASK)
    if len(masks) != 1:
        raise invalid(InputError, name, ACCEPTED_MASK, describe(mask))
    return masks[0, 0].to("cpu", copy=True)


def as_regions(value: Any) -> list[Region]:
    """Return the regions that `image_embeds` of a call consists of, a `Region` or a sequence, as a list."""
    regions = [value] if isinstance(value, Region) else list(value)
    if not regions or not all(isinstance(region, Region) for region in regions):
        got = next((describe(region) for region in regions if not isinstance(region, Region)), "an empty list")
        raise invalid(InputTypeError, "image_embeds", "a tensor (b, 1, c), a Region or a list of them", got)
    images = {len(region.image_embeds) for region in regions}
    widths = {region.image_embeds.shape[2] for region in regions}
    if len(images - {1}) > 1 or len(widths) > 1:
        got = ", ".join(describe(region.image_embeds) for region in regions)
        raise invalid(InputError, "image_embeds", "embeddings of as many images and of one width", got)
    return regions


def join_tokens(regions: Sequence[Region]) -> Tensor:
    """Return the embeddings of k regions and zeros for the rest as tokens, (b, k + 1, c)."""
    embeds = [region.image_embeds.to(regions[0].image_embeds.device) for region in regions]
    images = max(map(len, embeds))
    tokens = [token.expand(images, -1, -1) for token in (*embeds, torch.zeros_like(embeds[0]))]
    return torch.cat(tokens, dim=1)


def lay_out(regions: Sequence[Region], size: tuple[int, int]) -> RegionLayout:
    """Return the layout of regions over latents (h, w)."""
    masks = [torch.ones(1, 1, device="cpu") if region.mask is None else region.mask for region in regions]
    finest = [max(sides) for sides in zip(*(mask.shape for mask in masks), strict=True)]
    resized = [F.interpolate(mask[None, None], finest, mode="nearest-exact")[0, 0] for mask in masks]
    return RegionLayout(torch.stack(resized), [region.scale for region in regions], size)
