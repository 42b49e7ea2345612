"""Masks: images, arrays and tensors that select a part of an image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checks import check_has_data
from ..errors import InputError, InputTypeError, describe, invalid
from .read import decode_pil, warn_about_orientation

MASK_MODES = "1", "L", "LA", "P", "RGB", "RGBA"  # of PIL, those that are converted to L without a loss of range
ACCEPTED_MASK = "a PIL image, an array (h, w) or a tensor (h, w) or (b, 1, h, w) with values in [0, 1]"


def read_mask(name: str, mask: Any, size: tuple[int, int] | None = None, accepted: str = ACCEPTED_MASK) -> Tensor:
    """Return a mask, or the k of an array or tensor (k, h, w) or (k, 1, h, w), as float32 (k, 1, h, w) in [0, 1].

    1 is where a PIL image is white. `size`: height and width to which a PIL image is resized, before it is converted to
    grey, as in diffusers. Raises `InputError` for other modes, for transparency, as programs disagree whether that
    selects or not, and for other values.
    """
    if isinstance(mask, Image.Image):
        mask = grey_of(name, mask, size)
    if isinstance(mask, np.ndarray) and mask.dtype.kind in "fiub":
        mask = torch.from_numpy(np.array(mask, np.float32))
        mask = mask.movedim(-1, -3) if mask.ndim in (3, 4) and mask.shape[-1] == 1 else mask  # h w 1 -> 1 h w
    elif not isinstance(mask, Tensor) or mask.is_complex():
        raise invalid(InputTypeError, name, accepted, describe(mask))
    check_has_data(name, mask)
    x = mask.detach().float()
    x = x[None, None] if x.ndim == 2 else x[:, None] if x.ndim == 3 else x  # as in diffusers, (k, h, w) are k masks
    if x.ndim != 4 or x.shape[1] != 1 or not x.numel():
        raise invalid(InputError, name, accepted, describe(mask))
    if not (x.min() >= 0 and x.max() <= 1):  # NaN is neither
        got = f"{float(x.min()):.4g} to {float(x.max()):.4g}"
        raise invalid(InputError, name, "values in [0, 1]", got, "1, or white, is what a mask selects")
    return x


def grey_of(name: str, mask: Image.Image, size: tuple[int, int] | None) -> np.ndarray:
    """Return a PIL image as an array (h, w) in [0, 1]."""
    warn_about_orientation(name, mask)
    decode_pil(mask, name)
    if mask.mode not in MASK_MODES:
        got = f"mode {mask.mode}"
        raise invalid(InputError, name, f"one of the modes {', '.join(MASK_MODES)}", got, "convert it to L")
    check_opaque(name, mask)
    if size is not None:
        mask = mask.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.asarray(mask.convert("L")) / np.float32(255)


def check_opaque(name: str, mask: Image.Image) -> None:
    """Raise `InputError` for a mask with transparent pixels."""
    if mask.has_transparency_data and mask.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        raise invalid(InputError, name, "black and white", "transparent pixels", "fill them with the one or the other")
