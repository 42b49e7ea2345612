"""Previews: a linear decoder from latents to one pixel each, fitted to an autoencoder without any data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.ops import write_count
from ..noise import randn

FIT_IMAGES, FIT_SIDE = 8, 16  # images and latents on a side that a decoder is fitted on
SMOOTHNESS = 4  # latents from one independent value to the next


def mean_colours(images: Tensor, latents: Tensor) -> Tensor:
    """Return the mean colours (b, 3, h, w) of images (b, 3, k h, k w) over the k x k pixels of each latent."""
    height, width = latents.shape[2:]
    return F.adaptive_avg_pool2d(images, (height, width))


def fit_linear_decoder(latents: Tensor, images: Tensor) -> Tensor:
    """Return the linear decoder (c + 1, 3), whose last row is the offset, for latents (b, c, h, w) and their images.

    The least squares fit to the images' mean colours.
    """
    inputs = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1)
    rows = (x.movedim(1, -1).flatten(0, -2) for x in (inputs, mean_colours(images, latents)))  # b c h w -> (b h w) c
    return torch.linalg.lstsq(*rows).solution


def linear_decode(latents: Tensor, decoder: Tensor) -> Tensor:
    """Decode latents (b, c, h, w) to (b, 3, h, w) around [-1, 1] by a decoder (c + 1, 3)."""
    return torch.einsum("bchw,cd->bdhw", latents, decoder[:-1]) + decoder[-1, :, None, None]


def fit_to_random_latents(decode: Callable[[Tensor], Tensor], channels: int) -> Tensor:
    """Return a linear decoder (c + 1, 3), fitted to what `decode` makes of random latents (b, c, h, w) on the CPU.

    These are smooth noise of unit variance, as latents of images are more alike between neighbours than white noise.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    shape = FIT_IMAGES, channels, FIT_SIDE // SMOOTHNESS, FIT_SIDE // SMOOTHNESS
    noise = randn(shape, generator, dtype=torch.float32, device="cpu")
    latents = F.interpolate(noise, scale_factor=SMOOTHNESS, mode="bicubic")
    latents /= latents.std()
    return fit_linear_decoder(latents, decode(latents))


def state_of_weights(model: Any) -> list[Any]:
    """Return what changes when a model or its weights do, but not when it moves to another device."""
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return [id(model), *((id(p), write_count(p)) for p in parameters)]
