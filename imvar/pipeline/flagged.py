"""What becomes of pictures that the safety checker flagged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FlaggedError, InputTypeError, shown
from ..models.safety import Flags

CELLS = 8  # a side, that are left of a picture that is blurred


def treated(pixels: Tensor, checked: Any, flags: Sequence[bool], how: str, seeds: list[int] | None) -> Any:
    """Pictures (b, 3, h, w) with the flagged ones as `on_flagged` asks: black, or what the checker made of them;
    blurred; kept; or a `FlaggedError`."""
    hit = [i for i, flag in enumerate(flags) if flag]
    if how == "black":
        left = [i for i in hit if torch.equal(checked[i], pixels[i])]  # by a checker that tells, and does no more
        return checked.index_fill(0, torch.tensor(left, device=checked.device), 0) if left else checked
    if not hit:
        return checked
    if how == "raise":
        by = f" (seed{'s' * (len(hit) > 1)} {', '.join(str(seeds[i]) for i in hit)})" if seeds else ""
        raise FlaggedError(f"the safety checker flagged {len(hit)} of {len(flags)} pictures{by}; another seed, or "
                           "on_flagged='black', 'blur' or 'keep', would do",
                           flags, getattr(flags, "scores", None), seeds)
    if how == "keep":
        return pixels
    pixels = pixels.clone()
    for i in hit:
        pixels[i:i + 1] = blurred(pixels[i:i + 1])
    return pixels


def verdict(answer: Any, pixels: Tensor) -> tuple[Tensor, list[bool] | None]:
    """What a safety checker, of whatever kind, said of pictures (b, 3, h, w): these, and a flag each.

    Raises `InputTypeError` for other than a pair of both, lest pictures go out that nobody judged.
    """
    would_do = f"pictures of shape {tuple(pixels.shape)} and {len(pixels)} flags would do"
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        raise InputTypeError(f"safety_checker: it returned {shown(answer)}; {would_do}", key="safety_checker")
    checked, flags = answer
    if not isinstance(checked, Tensor) or checked.ndim != 4 or len(checked) != len(pixels):
        came = f"a tensor {tuple(checked.shape)}" if isinstance(checked, Tensor) else type(checked).__name__
        raise InputTypeError(f"safety_checker: it returned {came}; {would_do}", key="safety_checker")
    if flags is None or isinstance(flags, Flags):
        return checked, flags
    flags = flags.tolist() if isinstance(flags, (Tensor, np.ndarray)) else flags
    flags = list(flags) if isinstance(flags, Iterable) and not isinstance(flags, (str, Mapping)) else flags
    if not isinstance(flags, list) or len(flags) != len(pixels) or any(flag not in (0, 1, None) for flag in flags):
        raise InputTypeError(f"safety_checker: it returned {shown(flags)} for flags; {would_do}", key="safety_checker")
    return checked, [bool(flag) for flag in flags]


def blurred(pixels: Tensor) -> Tensor:
    """(b, 3, h, w) of which no more is left than the colours of 8 x 8 cells, faded into each other."""
    cells = F.adaptive_avg_pool2d(pixels.float(), CELLS)
    return F.interpolate(cells, pixels.shape[2:], mode="bilinear").to(pixels.dtype)
