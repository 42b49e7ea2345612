"""What becomes of pictures that the safety checker flagged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..errors import FlaggedError

CELLS = 8  # a side, that are left of a picture that is blurred


def treated(pixels: Tensor, checked: Any, flags: Sequence[bool], how: str, seeds: list[int] | None) -> Any:
    """Pictures (b, 3, h, w) with the flagged ones as `on_flagged` asks: black, as the checker returned them; blurred;
    kept; or a `FlaggedError`."""
    if how == "black" or not any(flags):
        return checked
    if how == "raise":
        hit = [i for i, flag in enumerate(flags) if flag]
        by = f" (seed{'s' * (len(hit) > 1)} {', '.join(str(seeds[i]) for i in hit)})" if seeds else ""
        raise FlaggedError(f"the safety checker flagged {len(hit)} of {len(flags)} pictures{by}; another seed, or "
                           "on_flagged='black', 'blur' or 'keep', would do",
                           flags, getattr(flags, "scores", None), seeds)
    if how == "keep":
        return pixels
    pixels = pixels.clone()
    for i, flag in enumerate(flags):
        if flag:
            pixels[i:i + 1] = blurred(pixels[i:i + 1])
    return pixels


def blurred(pixels: Tensor) -> Tensor:
    """(b, 3, h, w) of which no more is left than the colours of 8 x 8 cells, faded into each other."""
    cells = F.adaptive_avg_pool2d(pixels.float(), CELLS)
    return F.interpolate(cells, pixels.shape[2:], mode="bilinear").to(pixels.dtype)
