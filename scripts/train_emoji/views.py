"""Views of a drawing: moved, turned, tinted, on some background. All of a batch at once, on any device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Range = tuple[float, float]


def uniform(n: int, between: Range, generator: torch.Generator) -> Tensor:
    low, high = between
    return torch.rand(n, generator=generator, device=generator.device) * (high - low) + low


def some(n: int, share: float, generator: torch.Generator) -> Tensor:
    """Whether each of n is chosen; b 1 1 1."""
    return uniform(n, (0, 1), generator).view(n, 1, 1, 1) < share


def moved(
    rgba: Tensor, generator: torch.Generator, *, turn: float = 10, scale: Range = (0.8, 1.1), shift: float = 0.1
) -> Tensor:
    """Each turned by up to `turn` degrees, scaled, and shifted by up to a part of its side; b c h w."""
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


def premultiplied(rgba: Tensor) -> Tensor:
    """uint8 levels, or values in [0, 1], with colour weighed by alpha, so that it may be resampled."""
    rgba = rgba.float() / 255 if rgba.dtype == torch.uint8 else rgba
    return torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)


def over(rgba: Tensor, background: Tensor | float = 1.0) -> Tensor:
    """A premultiplied drawing laid over a background: RGB in [0, 1]."""
    return rgba[:, :3] + (1 - rgba[:, 3:]) * background


def tinted(rgb: Tensor, generator: torch.Generator, strength: float = 0.15) -> Tensor:
    """Brightness, contrast and the three channels each changed by up to `strength`."""
    n = len(rgb)
    gain = (
        1
        + uniform(3 * n, (-strength, strength), generator).view(n, 3, 1, 1)
        + uniform(n, (-strength, strength), generator).view(n, 1, 1, 1)
    )
    middle = rgb.mean((1, 2, 3), keepdim=True)
    contrast = 1 + uniform(n, (-strength, strength), generator).view(n, 1, 1, 1)
    return (((rgb - middle) * contrast + middle) * gain).clamp(0, 1)


def dyed(rgb: Tensor, generator: torch.Generator, strength: float = 0.6) -> Tensor:
    """Other colours: each channel a mixture of all three, which keeps white white."""
    n = len(rgb)
    mixture = torch.eye(3, device=rgb.device) + uniform(9 * n, (-strength, strength), generator).view(n, 3, 3)
    mixture = mixture / mixture.sum(2, keepdim=True).clamp(min=0.3)
    return (1 - torch.einsum("nij,njhw->nihw", mixture, 1 - rgb)).clamp(0, 1)


def outlined(rgb: Tensor) -> Tensor:
    """Black lines wherever colours meet, as some vendors draw."""
    lightest, darkest = F.max_pool2d(rgb, 3, 1, 1), -F.max_pool2d(-rgb, 3, 1, 1)
    contrast = (lightest - darkest).amax(1, keepdim=True)
    return rgb * (1 - ((contrast - 0.1) * 4).clamp(0, 1))


def view(rgba: Tensor, generator: torch.Generator, *, strong: bool = True) -> Tensor:
    """What an encoder is shown of drawings, b 4 h w: RGB in [0, 1], strongly or mildly changed, half not on white."""
    n = len(rgba)
    if not strong:
        drawing = moved(premultiplied(rgba), generator, turn=5, scale=(0.9, 1.02), shift=0.04)
        return tinted(over(drawing), generator, 0.05)
    drawing = moved(premultiplied(rgba), generator, turn=15, scale=(0.7, 1.1), shift=0.1)
    rgb = over(drawing, torch.where(some(n, 0.5, generator), 1.0, uniform(3 * n, (0, 1), generator).view(n, 3, 1, 1)))
    rgb = torch.where(some(n, 0.3, generator), outlined(rgb), rgb)
    return torch.where(some(n, 0.3, generator), dyed(rgb, generator), tinted(rgb, generator, 0.2))
