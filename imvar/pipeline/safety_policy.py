"""Policy for images that the safety checker flags: black, blurred, kept, or an error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FlaggedError, InputTypeError, describe, invalid, short_repr
from ..models.safety import Flags

PIXELATE_GRID = 8  # cells on each side of a blurred image
SAME_IMAGE_ATOL = 0.05  # difference, of values in [-1, 1], up to which two images show the same


def judge(
    pixels: Tensor, checker_output: Any, on_flagged: str, seeds: list[int] | None
) -> tuple[Tensor, list[bool] | None, list[bool]]:
    """Apply the decision of a safety checker to images (b, 3, h, w), by the policy `on_flagged`.

    "black": black, or the checker's replacement; "blur"; "keep"; or "raise" a `FlaggedError`.
    Returns the images, the flags, and for each image whether its values are around [-1, 1]: those of an image that a
    checker made black or replaced are in [0, 1].
    """
    checked, flags = parse_checker_output(checker_output, pixels)
    flagged = [i for i, flag in enumerate(flags or []) if flag]
    if flagged and on_flagged == "raise":
        by_seed = f" (seed{'s' * (len(flagged) > 1)} {', '.join(str(seeds[i]) for i in flagged)})" if seeds else ""
        got = f"{len(flagged)} of {len(pixels)} images flagged{by_seed}"
        hint = "use another seed, or on_flagged='black', 'blur' or 'keep'"
        details = {"flags": flags, "scores": getattr(flags, "scores", None), "seeds": seeds}
        raise invalid(FlaggedError, "safety_checker", "no flagged image", got, hint, **details)
    is_centred = [True] * len(pixels)
    images = checked.clone() if flagged else checked
    for i in flagged:
        if on_flagged == "black":
            images[i], is_centred[i] = keep_replacement_or_black(pixels[i], checked[i]), False
        else:
            images[i] = pixelate(pixels[i]) if on_flagged == "blur" else pixels[i]
    return images, flags, is_centred


def keep_replacement_or_black(image: Tensor, checked: Tensor) -> Tensor:
    """Return the checker's replacement (3, h, w) in [0, 1] of a flagged image, or black if it still shows the image."""
    in_range = checked.min() >= 0 and checked.max() <= 1  # true of replacements; of decoded images rarely
    is_same = torch.allclose(checked.float(), image.float(), atol=SAME_IMAGE_ATOL)
    return checked if in_range and not is_same else torch.zeros_like(checked)


def parse_checker_output(output: Any, pixels: Tensor) -> tuple[Tensor, list[bool] | None]:
    """Return the images and flags in the output of a safety checker, imvar's or third-party, for images (b, 3, h, w).

    Raises `InputTypeError` for any other output, so that no unchecked image is returned.
    """
    expected = f"an output of images {tuple(pixels.shape)} and {len(pixels)} flags"
    if not isinstance(output, (tuple, list)) or len(output) != 2:
        got = describe(output) if isinstance(output, Tensor) else short_repr(output)
        raise invalid(InputTypeError, "safety_checker", expected, got)
    checked, flags = output
    if not isinstance(checked, Tensor) or checked.shape != pixels.shape or checked.device != pixels.device:
        got = f"{describe(checked)} on {checked.device}" if isinstance(checked, Tensor) else short_repr(checked)
        raise invalid(InputTypeError, "safety_checker", expected, got)
    if flags is None or isinstance(flags, Flags):
        return checked, flags
    flags = flags.tolist() if isinstance(flags, (Tensor, np.ndarray)) else flags
    flags = list(flags) if isinstance(flags, Iterable) and not isinstance(flags, (str, Mapping)) else flags
    if not isinstance(flags, list) or len(flags) != len(pixels) or any(flag not in (0, 1, None) for flag in flags):
        raise invalid(InputTypeError, "safety_checker", expected, f"{short_repr(flags)} as flags")
    return checked, [bool(flag) for flag in flags]


def pixelate(image: Tensor) -> Tensor:
    """Blur an image (3, h, w) to the mean colours of 8 x 8 cells, interpolated bilinearly."""
    cells = F.adaptive_avg_pool2d(image.float(), PIXELATE_GRID)
    return F.interpolate(cells[None], image.shape[1:], mode="bilinear")[0].to(image.dtype)
