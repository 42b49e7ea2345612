"""Whatever holds a picture, read as RGB: PIL pictures of every mode, arrays and tensors."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image

from ..checks import check_has_data
from ..errors import InputError, InputTypeError

CHANNEL_COUNTS = (1, 3, 4)
ACCEPTED = "a PIL picture, or an array or tensor of shape (h, w, 3) or (3, h, w), or a list of these would do"


def iter_images(images: Any) -> Iterator[tuple[str, Any]]:
    """Every picture in what came, with the name that an error calls it by."""
    many = isinstance(images, (list, tuple))
    if many and not images:
        raise InputTypeError(f"images: an empty {type(images).__name__} came; {ACCEPTED}")
    for i, image in enumerate(images if many else [images]):
        name = f"images[{i}]" if many else "images"
        if isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 4:
            if not len(image):
                raise InputError(f"{name}: an empty batch of shape {tuple(image.shape)} came; {ACCEPTED}")
            yield from ((f"{name}[{j}]", item) for j, item in enumerate(image))
        elif isinstance(image, (Image.Image, np.ndarray, torch.Tensor)):
            yield name, image
        else:
            raise InputTypeError(f"{name}: {type(image).__name__} came; {ACCEPTED} (open files with PIL.Image.open)")


_decode_lock = threading.Lock()


def decode_pil(image: Image.Image, name: str) -> None:
    """Decode a picture that was only opened. Pillow's own way is for one thread at a time."""
    try:
        with _decode_lock:
            image.load()
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error and more
        raise InputError(
            f"{name}: a mode {image.mode} picture came that cannot be read ({type(error).__name__}: {error})"
        ) from error


def exif_orientation(image: Image.Image) -> int:
    """How EXIF, or XMP, says that a picture is to be turned: 1, where it is upright or nobody can tell."""
    if not {"exif", "xmp", "XML:com.adobe.xmp"} & set(image.info or ()):
        return 1
    with _decode_lock:
        try:
            return image.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # Pillow raises many kinds
            return 1


def _renew_lock_after_fork() -> None:
    """For a process that was forked while another thread was reading, which is not there to let go of the lock."""
    global _decode_lock
    _decode_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock_after_fork)


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """A picture of any mode as RGB: what is transparent on white, 16 bits scaled to 8.

    EXIF is not looked at, nor, as in the reference, that premultiplied RGBa and palettes of RGBA are transparent. Mode
    I counts as 8-bit up to 255 and as 16-bit up to 65535. Raises `InputError` for mode F, whose range nobody knows, for
    La, and for a picture that cannot be decoded.
    """
    if not image.width or not image.height:
        raise InputError(f"{name}: a picture of {image.width}x{image.height} pixels came; at least 1x1 would do")
    decode_pil(image, name)
    if image.mode == "F":
        raise InputError(f"{name}: mode F came, whose range of values is not known; convert it to L or RGB first")
    if image.mode == "La":
        raise InputError(f"{name}: a mode La picture came; convert it to LA first")
    if image.mode.startswith("I"):
        image = to_8_bit(image, name)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image if image.mode == "RGB" else image.convert("RGB")


def to_8_bit(image: Image.Image, name: str) -> Image.Image:
    """Modes I and I;16 to L: 65535 becomes 255."""
    levels = np.asarray(image)
    low, high = int(levels.min()), int(levels.max())
    if low < 0 or high > 65535:
        raise InputError(f"{name}: mode {image.mode} with values {low}..{high} came; 0..65535 would do")
    if image.mode != "I" or high > 255:
        levels = (levels.astype(np.uint32) + 128) // 257
    return Image.fromarray(levels.astype(np.uint8))


def to_pixels(image: np.ndarray | torch.Tensor, name: str, layout: str | None) -> np.ndarray:
    """An array or tensor as (h w c), uint8 if it holds whole numbers, else float32; c is 1, 3 or 4."""
    if isinstance(image, torch.Tensor):
        check_has_data(name, image)
        image = (image.float() if image.is_floating_point() else image).detach().resolve_conj().cpu().numpy()
    if image.ndim != 3 or not image.size:
        raise InputError(f"{name}: shape {image.shape} came; (h, w, 3) or (3, h, w) would do")
    x = np.moveaxis(image, 0, -1) if is_channels_first(image.shape, name, layout) else image
    if x.dtype.kind == "f":
        return check_finite_pixels(x.astype(np.float32, copy=False), name)
    if x.dtype.kind not in "iu":
        raise InputTypeError(f"{name}: values of type {x.dtype} came; uint8 or float32 would do")
    if x.dtype != np.uint8 and (x.min() < 0 or x.max() > 255):
        raise InputError(f"{name}: whole numbers {x.min()}..{x.max()} came; 0..255 would do")
    return x.astype(np.uint8, copy=False)


def is_channels_first(shape: tuple[int, ...], name: str, layout: str | None) -> bool:
    """Whether (c h w); an axis of 1, 3 or 4 holds the channels."""
    first, last = shape[0] in CHANNEL_COUNTS, shape[-1] in CHANNEL_COUNTS
    if layout is None and first and last:
        raise InputError(
            f"{name}: shape {shape} can be read two ways; say input_data_format='channels_first' or 'channels_last'"
        )
    wanted = first if layout is None else layout == "channels_first"
    if not (first if wanted else last):
        raise InputError(f"{name}: shape {shape} has no axis of 1, 3 or 4 channels; (h, w, 3) or (3, h, w) would do")
    return wanted


def check_finite_pixels(x: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(x).all():
        raise InputError(f"{name}: NaN or infinite values came; finite ones would do")
    return x
