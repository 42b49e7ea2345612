"""What becomes of pictures that the safety checker flagged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FlaggedError, InputTypeError, short_repr
from ..models.safety import Flags

PIXELATE_GRID = 8  # a side, that are left of a picture that is blurred
SAME_IMAGE_ATOL = 0.05  # of [-1, 1], by how much a picture may be off that shows the same


def apply_flag_policy(
    pixels: Tensor, checked: Tensor, flags: Sequence[bool], how: str, seeds: list[int] | None
) -> Tensor:
    """Pictures (b, 3, h, w) as the checker left them, and the flagged ones as `on_flagged` asks: black, or what the
    checker put in their place; blurred; kept; or a `FlaggedError`."""
    hit = [i for i, flag in enumerate(flags) if flag]
    if not hit:
        return checked
    if how == "raise":
        by = f" (seed{'s' * (len(hit) > 1)} {', '.join(str(seeds[i]) for i in hit)})" if seeds else ""
        raise FlaggedError(
            f"the safety checker flagged {len(hit)} of {len(flags)} pictures{by}; another seed, or "
            "on_flagged='black', 'blur' or 'keep', would do",
            flags,
            getattr(flags, "scores", None),
            seeds,
        )
    treat = {"black": keep_replacement_or_black, "blur": pixelate, "keep": lambda picture, _: picture}[how]
    left = checked.clone()
    for i in hit:
        left[i] = treat(pixels[i], checked[i])
    return left


def keep_replacement_or_black(picture: Tensor, made: Tensor) -> Tensor:
    """What a checker put in the place of a picture, (3, h, w) in [0, 1], if it did; black where that shows it still."""
    in_range = made.min() >= 0 and made.max() <= 1  # as black pictures and others in their place are; decoded, few are
    shows = torch.allclose(made.float(), picture.float(), atol=SAME_IMAGE_ATOL)
    return made if in_range and not shows else torch.zeros_like(made)


def parse_checker_output(answer: Any, pixels: Tensor) -> tuple[Tensor, list[bool] | None]:
    """What a safety checker, of whatever kind, said of pictures (b, 3, h, w): these, and a flag each.

    Raises `InputTypeError` for other than a pair of both, lest pictures go out that nobody judged.
    """
    would_do = f"pictures of shape {tuple(pixels.shape)} and {len(pixels)} flags would do"
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        raise InputTypeError(f"safety_checker: it returned {short_repr(answer)}; {would_do}", key="safety_checker")
    checked, flags = answer
    if not isinstance(checked, Tensor) or checked.shape != pixels.shape or checked.device != pixels.device:
        came = (
            f"a tensor {tuple(checked.shape)} on {checked.device}"
            if isinstance(checked, Tensor)
            else short_repr(checked)
        )
        raise InputTypeError(f"safety_checker: it returned {came}; {would_do}", key="safety_checker")
    if flags is None or isinstance(flags, Flags):
        return checked, flags
    flags = flags.tolist() if isinstance(flags, (Tensor, np.ndarray)) else flags
    flags = list(flags) if isinstance(flags, Iterable) and not isinstance(flags, (str, Mapping)) else flags
    if not isinstance(flags, list) or len(flags) != len(pixels) or any(flag not in (0, 1, None) for flag in flags):
        raise InputTypeError(
            f"safety_checker: it returned {short_repr(flags)} for flags; {would_do}", key="safety_checker"
        )
    return checked, [bool(flag) for flag in flags]


def pixelate(picture: Tensor, _: Tensor) -> Tensor:
    """(3, h, w) of which no more is left than the colours of 8 x 8 cells, faded into each other."""
    cells = F.adaptive_avg_pool2d(picture.float(), PIXELATE_GRID)
    return F.interpolate(cells[None], picture.shape[1:], mode="bilinear")[0].to(picture.dtype)
