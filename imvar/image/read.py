"""Read images as RGB pixels: PIL images of every mode, arrays and tensors."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image

from ..checks import check_has_data
from ..errors import InputError, InputTypeError, invalid, short_repr, warn_user

CHANNEL_COUNTS = (1, 3, 4)
ACCEPTED = "a PIL image, an array or tensor of shape (h, w, 3) or (3, h, w), or a list of these"


def iter_images(images: Any) -> Iterator[tuple[str, Any]]:
    """Yield each image of a single one, a list or a batch, with its name in errors."""
    is_list = isinstance(images, (list, tuple))
    if is_list and not images:
        raise invalid(InputTypeError, "images", ACCEPTED, f"an empty {type(images).__name__}")
    for i, image in enumerate(images if is_list else [images]):
        name = f"images[{i}]" if is_list else "images"
        if isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 4:
            if not len(image):
                raise invalid(InputError, name, ACCEPTED, f"an empty batch of shape {tuple(image.shape)}")
            yield from ((f"{name}[{j}]", entry) for j, entry in enumerate(image))
        elif isinstance(image, (Image.Image, np.ndarray, torch.Tensor)):
            yield name, image
        else:
            raise invalid(InputTypeError, name, ACCEPTED, type(image).__name__, "open files with PIL.Image.open")


_decode_lock = threading.Lock()


def decode_pil(image: Image.Image, name: str) -> None:
    """Decode an image that was only opened. Pillow's decoding is not thread-safe, so there is a lock around it."""
    if not isinstance(image.info, dict):
        raise invalid(InputTypeError, name, "an image whose info is a dictionary", f"info={short_repr(image.info)}")
    try:
        with _decode_lock:
            image.load()
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error and more
        got = f"a mode {image.mode} image that cannot be decoded ({type(error).__name__}: {error})"
        raise invalid(InputError, name, "a readable image", got) from error


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF or XMP orientation, 1 to 8; 1, upright, if it is missing or unreadable."""
    if not {"exif", "xmp", "XML:com.adobe.xmp"} & set(image.info or ()):
        return 1
    with _decode_lock:
        try:
            return image.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # Pillow raises many kinds
            return 1


def warn_about_orientation(name: str, image: Image.Image) -> None:
    """Warn that an image's EXIF orientation is ignored, as in diffusers."""
    if exif_orientation(image) in range(2, 9):
        hint = "apply it with imvar.load_image or PIL.ImageOps.exif_transpose"
        warn_user(f"{name}: its EXIF orientation is ignored; {hint}")


def _renew_lock_after_fork() -> None:
    """Replace the lock in a forked process, where the thread that may have held it does not exist."""
    global _decode_lock
    _decode_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock_after_fork)


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """Return an image of any mode as RGB, composited on white if transparent, 16 bits scaled to 8.

    EXIF is ignored, and so, as in transformers, is the transparency of premultiplied RGBa and of RGBA palettes. Mode I
    is taken as 8-bit if its values are up to 255, else as 16-bit up to 65535. Raises `InputError` for mode F, whose
    range is undefined, for La, and for an image that cannot be decoded.
    """
    if not image.width or not image.height:
        raise invalid(InputError, name, "an image of at least 1x1 pixels", f"{image.width}x{image.height}")
    decode_pil(image, name)
    if image.mode == "F":
        raise invalid(InputError, name, "8 or 16 bits", "mode F, whose range is undefined", "convert it to L or RGB")
    if image.mode == "La":
        raise invalid(InputError, name, "mode LA", "mode La", "convert it to LA")
    if image.mode.startswith("I"):
        image = to_8_bit(image, name)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, "white")
        try:
            canvas.alpha_composite(image.convert("RGBA"))
        except (TypeError, ValueError) as error:
            got = f"transparency={short_repr(image.info.get('transparency'))} ({error})"
            raise invalid(InputError, name, f"a transparency of mode {image.mode} in its info", got) from error
        image = canvas
    return image if image.mode == "RGB" else image.convert("RGB")


def to_8_bit(image: Image.Image, name: str) -> Image.Image:
    """Convert modes I and I;16 to L: 65535 becomes 255."""
    x = np.asarray(image)
    low, high = int(x.min()), int(x.max())
    if low < 0 or high > 65535:
        raise invalid(InputError, name, "values from 0 to 65535", f"mode {image.mode} with values from {low} to {high}")
    if image.mode != "I" or high > 255:
        x = (x.astype(np.uint32) + 128) // 257
    return Image.fromarray(x.astype(np.uint8))


def to_pixels(image: np.ndarray | torch.Tensor, name: str, layout: str | None) -> np.ndarray:
    """Return an array or tensor as (h w c), c being 1, 3 or 4: uint8 for integers, float32 for floats."""
    if isinstance(image, torch.Tensor):
        check_has_data(name, image)
        image = (image.float() if image.is_floating_point() else image).detach().resolve_conj().cpu().numpy()
    if image.ndim != 3 or not image.size:
        raise invalid(InputError, name, "shape (h, w, 3) or (3, h, w)", f"shape {image.shape}")
    x = np.moveaxis(image, 0, -1) if is_channels_first(image.shape, name, layout) else image
    if x.dtype.kind == "f":
        x = x.astype(np.float32, copy=False)
        if not np.isfinite(x).all():
            raise invalid(InputError, name, "finite values", "NaN or infinite values")
        return x
    if x.dtype.kind not in "iu":
        raise invalid(InputTypeError, name, "uint8 or float32 values", f"values of {x.dtype}")
    if x.dtype != np.uint8 and (x.min() < 0 or x.max() > 255):
        raise invalid(InputError, name, "integers from 0 to 255", f"{x.min()} to {x.max()}")
    return x.astype(np.uint8, copy=False)


def is_channels_first(shape: tuple[int, ...], name: str, layout: str | None) -> bool:
    """Return whether a shape is (c h w); the channel axis is the one of 1, 3 or 4."""
    first, last = shape[0] in CHANNEL_COUNTS, shape[-1] in CHANNEL_COUNTS
    if layout is None and first and last:
        hint = "pass input_data_format='channels_first' or 'channels_last'"
        raise invalid(InputError, name, "an unambiguous shape", f"shape {shape}", hint)
    is_first = first if layout is None else layout == "channels_first"
    if not (first if is_first else last):
        where = f"with input_data_format={layout!r}" if layout else "in the first or last axis"
        raise invalid(InputError, name, f"1, 3 or 4 channels {where}", f"shape {shape}")
    return is_first
