"""Augmented views of drawings: affine transforms, colour changes and backgrounds, batched, on any device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Range = tuple[float, float]


def uniform(n: int, bounds: Range, generator: torch.Generator) -> Tensor:
    low, high = bounds
    return torch.rand(n, generator=generator, device=generator.device) * (high - low) + low


def random_mask(n: int, share: float, generator: torch.Generator) -> Tensor:
    """Return a mask (n, 1, 1, 1) that is True with probability `share`."""
    return uniform(n, (0, 1), generator).view(n, 1, 1, 1) < share


def random_affine(
    rgba: Tensor, generator: torch.Generator, *, turn: float = 10, scale: Range = (0.8, 1.1), shift: float = 0.1
) -> Tensor:
    """Rotate images (b, c, h, w) by up to `turn` degrees, scale them, and shift them by up to `shift` of a side."""
    n = len(rgba)
    angle = uniform(n, (-turn, turn), generator) * (math.pi / 180)
    size = uniform(n, scale, generator)
    matrix = torch.stack(
        [
            angle.cos() / size,
            -angle.sin() / size,
            uniform(n, (-shift, shift), generator) * 2,
            angle.sin() / size,
            angle.cos() / size,
            uniform(n, (-shift, shift), generator) * 2,
        ],
        dim=1,
    )
    grid = F.affine_grid(matrix.view(n, 2, 3), list(rgba.shape), align_corners=False)
    return F.grid_sample(rgba, grid, padding_mode="zeros", align_corners=False)


def premultiply_alpha(rgba: Tensor) -> Tensor:
    """Multiply colour by alpha, so that it can be resampled; uint8, or values in [0, 1], to values in [0, 1]."""
    rgba = rgba.float() / 255 if rgba.dtype == torch.uint8 else rgba
    return torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)


def composite(rgba: Tensor, background: Tensor | float = 1.0) -> Tensor:
    """Composite drawings with premultiplied alpha on a background: RGB in [0, 1]."""
    return rgba[:, :3] + (1 - rgba[:, 3:]) * background


def color_jitter(rgb: Tensor, generator: torch.Generator, strength: float = 0.15) -> Tensor:
    """Change brightness, contrast and each channel by up to `strength`."""
    n = len(rgb)
    gain = (
        1
        + uniform(3 * n, (-strength, strength), generator).view(n, 3, 1, 1)
        + uniform(n, (-strength, strength), generator).view(n, 1, 1, 1)
    )
    middle = rgb.mean((1, 2, 3), keepdim=True)
    contrast = 1 + uniform(n, (-strength, strength), generator).view(n, 1, 1, 1)
    return (((rgb - middle) * contrast + middle) * gain).clamp(0, 1)


def mix_channels(rgb: Tensor, generator: torch.Generator, strength: float = 0.6) -> Tensor:
    """Change hues: each channel becomes a mixture of all three, with white unchanged."""
    n = len(rgb)
    mixture = torch.eye(3, device=rgb.device) + uniform(9 * n, (-strength, strength), generator).view(n, 3, 3)
    mixture = mixture / mixture.sum(2, keepdim=True).clamp(min=0.3)
    return (1 - torch.einsum("nij,njhw->nihw", mixture, 1 - rgb)).clamp(0, 1)


def add_outlines(rgb: Tensor) -> Tensor:
    """Draw black lines along colour edges, as in some vendors' style."""
    lightest, darkest = F.max_pool2d(rgb, 3, 1, 1), -F.max_pool2d(-rgb, 3, 1, 1)
    contrast = (lightest - darkest).amax(1, keepdim=True)
    return rgb * (1 - ((contrast - 0.1) * 4).clamp(0, 1))


def view(rgba: Tensor, generator: torch.Generator, *, strong: bool = True) -> Tensor:
    """Return a random view of drawings (b, 4, h, w) as RGB in [0, 1]; strong ones are half on coloured backgrounds."""
    n = len(rgba)
    if not strong:
        drawing = random_affine(premultiply_alpha(rgba), generator, turn=5, scale=(0.9, 1.02), shift=0.04)
        return color_jitter(composite(drawing), generator, 0.05)
    drawing = random_affine(premultiply_alpha(rgba), generator, turn=15, scale=(0.7, 1.1), shift=0.1)
    rgb = composite(
        drawing, torch.where(random_mask(n, 0.5, generator), 1.0, uniform(3 * n, (0, 1), generator).view(n, 3, 1, 1))
    )
    rgb = torch.where(random_mask(n, 0.3, generator), add_outlines(rgb), rgb)
    return torch.where(random_mask(n, 0.3, generator), mix_channels(rgb, generator), color_jitter(rgb, generator, 0.2))
