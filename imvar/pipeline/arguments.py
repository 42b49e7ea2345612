"""What a call of the pipeline may ask for: the one place that checks its arguments."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import Module

from ..checks import FLOAT_DTYPES, check_finite, check_float, check_has_data, check_int
from ..errors import ImvarError, InputError, InputTypeError, short_repr
from ..image.read import exif_orientation
from ..noise import check_generator, per_image_seeds

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
ON_FLAGGED = ("black", "blur", "keep", "raise")
MAX_NORMALIZED_PIXEL = 16.0  # from 0 that a normalised pixel can be thought to lie; CLIP's lie within 2.2
MAX_SIDE = 2**16  # pixels on a side
CALLER = 6  # frames up from a check of `check_inputs`: who called the pipeline


def check_inputs(image: Any, height: int, width: int, callback_steps: int, factor: int) -> None:
    """The picture's type, a size the autoencoder can make, and how often to call back."""
    pictures = image if isinstance(image, (list, tuple)) else [image]
    if not pictures:
        raise InputTypeError("image: an empty list came; at least one picture would do")
    for i, one in enumerate(pictures):
        if not isinstance(one, (Image, Tensor)) and not (one is not image and hasattr(one, "__array__")):
            name = "image" if one is image else f"image[{i}]"
            raise InputTypeError(
                f"{name}: {type(one).__name__} came; a PIL picture, a list of them, or a tensor "
                "(b, 3, h, w) of preprocessed pixels would do"
            )
        if isinstance(one, Image):
            warn_exif_rotation(one, "image" if one is image else f"image[{i}]")
        elif one is not image and getattr(one, "ndim", 3) > 3:
            raise InputError(f"image[{i}]: a batch of shape {tuple(one.shape)} came; each in the list is one picture")
    if isinstance(image, Tensor):
        check_pixels(image)
    for name, size in ("height", height), ("width", width):
        if check_int(name, size, low=factor, high=MAX_SIDE) % factor:
            raise InputError(f"{name}={size}: a multiple of {factor} from {factor} to {MAX_SIDE} pixels would do")
    check_int("callback_steps", callback_steps)


@contextmanager
def rename_argument(theirs: str, ours: str) -> Iterator[None]:
    """In an error about an argument, its name as who called the pipeline knows it."""
    try:
        yield
    except InputError as error:
        if not str(error).startswith(theirs):
            raise
        raise type(error)(ours + str(error)[len(theirs) :], key=error.key) from error


def warn_exif_rotation(picture: Image, name: str) -> None:
    """Warn of a picture whose EXIF says to turn it: like the reference, the pipeline takes it as it is stored."""
    if exif_orientation(picture) in range(2, 9):
        warnings.warn(
            f"{name}: its EXIF says that it is to be turned, and it is taken as it is stored; "
            "imvar.load_image, or PIL.ImageOps.exif_transpose, turns it",
            stacklevel=CALLER,
        )


def check_pixels(image: Tensor) -> None:
    """A tensor goes to the image encoder as it is, so it has to look like what CLIPImageProcessor makes."""
    check_has_data("image", image)
    if image.ndim != 4 or image.shape[1] != 3 or not image.numel():
        raise InputError(f"image: a tensor of shape {tuple(image.shape)} came; (b, 3, h, w) or (3, h, w) would do")
    if image.dtype not in FLOAT_DTYPES:
        raise InputTypeError(f"image: a tensor of {image.dtype} came; floats as CLIPImageProcessor makes them would do")
    if not image.isfinite().all():
        raise InputError("image: the tensor holds NaN or infinite values")
    if (most := float(image.abs().max())) > MAX_NORMALIZED_PIXEL:
        warnings.warn(
            f"image: the tensor holds values up to {most:.4g}, where normalised pixels lie within 3 of 0; "
            "CLIPImageProcessor makes them of 0..255",
            stacklevel=CALLER,
        )


def check_arguments(
    generator: Any,
    seed: Any,
    latents: Any,
    output_type: str,
    return_dict: Any,
    callback: Callable[..., Any] | None,
    on_flagged: Any,
    shape: tuple[int, int, int, int],
) -> list[int] | None:
    """The arguments that are no numbers and that `check_inputs` does not see; the seed of each picture."""
    check_generator(generator, shape[0])
    if latents is not None:
        check_latents(latents, shape)
    one_of("output_type", output_type, OUTPUT_TYPES)
    one_of("on_flagged", on_flagged, ON_FLAGGED)
    if not isinstance(return_dict, bool):
        raise InputTypeError(f"return_dict={short_repr(return_dict)}: True or False would do")
    if callback is not None:
        check_callback(callback)
    if seed is None:
        return None
    if generator is not None:
        raise InputError("seed and generator both came; one of them would do")
    return per_image_seeds(seed, shape[0])


def check_numbers(num_inference_steps: Any, guidance_scale: Any, eta: Any) -> tuple[int, float, float]:
    """The numbers as Python's own; how many steps there can be, and how much noise, is the scheduler's to judge."""
    return (
        check_int("num_inference_steps", num_inference_steps),
        check_finite("guidance_scale", guidance_scale),
        check_finite("eta", eta),
    )


def check_callback(callback: Any) -> None:
    """A function that can be called with a step, a timestep and latents, and is done when it returns."""
    try:
        fits = callable(callback) and not inspect.iscoroutinefunction(callback)
        if fits:
            inspect.signature(callback, follow_wrapped=False).bind(0, 0, None)
    except TypeError:
        fits = False
    except ValueError:  # of some that are written in C nobody can tell
        return
    if not fits:
        raise InputTypeError(f"callback={short_repr(callback)}: a function of (step, timestep, latents) would do")


def check_seeds(seeds: list[int] | None, latents: Any, options: Mapping[str, Any]) -> None:
    """A seed has to be of use: where latents come, only a step that draws noise uses it."""
    if seeds and latents is not None and not ("generator" in options and options.get("eta", 1)):
        raise InputError("seed: latents came as well, and no step draws noise; one of them would do")


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        kind = InputError if isinstance(value, str) else InputTypeError
        raise kind(f"{name}={short_repr(value)}: {', '.join(map(repr, choices))} would do")


def check_approximate(guidance_interval: Any, cache_interval: Any, preparable: bool) -> tuple[tuple[float, float], int]:
    """What trades a little of the pictures for speed, as Python's own numbers."""
    cache_interval = check_int("cache_interval", cache_interval)
    if cache_interval > 1 and not preparable:
        raise InputError(
            f"cache_interval={cache_interval}: needs a UNet2DConditionModel of imvar with no hooks or "
            "layers of others; 1 would do"
        )
    if not isinstance(guidance_interval, (tuple, list)) or len(guidance_interval) != 2:
        raise InputTypeError(
            f"guidance_interval={short_repr(guidance_interval)}: two shares of the steps would do, such as (0.0, 0.8)"
        )
    low, high = (check_float("guidance_interval", share) for share in guidance_interval)
    if low > high:
        raise InputError(f"guidance_interval=({low}, {high}): the lower share first would do")
    return (low, high), cache_interval


def check_all_finite(what: str, x: Tensor, model: Any, *causes: str) -> None:
    """Raise `ImvarError` for values of which no picture can be made, with the likely cause."""
    if x.isfinite().all():
        return
    weights = model.state_dict() if isinstance(model, Module) else {}
    bad = next((name for name, weight in weights.items() if not weight.isfinite().all()), None)
    if bad:
        raise ImvarError(
            f"{what} are not finite: {type(model).__name__} holds NaN or infinite values in {bad}; load "
            "its weights again"
        )
    causes += (f"{x.dtype} that overflowed",) if x.dtype != torch.float32 else ()
    raise ImvarError(
        f"{what} are not finite: {', '.join(causes)} or weights that are too large may be why; "
        "torch.float32 and a guidance_scale near 3 would tell"
    )


def check_latents(latents: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(latents, Tensor):
        raise InputTypeError(f"latents: {type(latents).__name__} came; a tensor of shape {shape} would do")
    check_has_data("latents", latents)
    if tuple(latents.shape) != shape:
        raise InputError(f"latents: shape {tuple(latents.shape)} came; {shape} would do")
    if latents.dtype not in FLOAT_DTYPES or not latents.isfinite().all():
        raise InputError("latents: finite floats would do; integers, NaN or infinite values came")
