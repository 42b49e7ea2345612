"""Image grids."""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor


def grid(rgb: Tensor, columns: int) -> Image.Image:
    """Arrange images (b, 3, h, w) in [0, 1] in rows of `columns`; the last row is padded with white."""
    missing = -len(rgb) % columns
    rgb = torch.cat([rgb.cpu(), torch.ones(missing, *rgb.shape[1:])])
    pixels = (rgb.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(rearrange(pixels, "(y x) c h w -> (y h) (x w) c", x=columns).numpy())


def save_grid(path: Path, rgb: Tensor, columns: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(rgb, columns).save(path)
