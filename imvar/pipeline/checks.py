"""What a call of the pipeline may ask for: the one place that checks its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL.Image import Image
from torch import Tensor

from ..checks import count, finite, real
from ..errors import InputError, InputTypeError, shown
from ..noise import check_generator

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
LARGEST = 2**16  # pixels on a side


def check_inputs(image: Any, height: int, width: int, callback_steps: int, factor: int) -> None:
    """The picture's type, a size the autoencoder can make, and how often to call back."""
    pictures = image if isinstance(image, (list, tuple)) else [image]
    if not pictures:
        raise InputTypeError("image: an empty list came; at least one picture would do")
    for i, one in enumerate(pictures):
        if not isinstance(one, (Image, Tensor)) and not (one is not image and hasattr(one, "__array__")):
            name = "image" if one is image else f"image[{i}]"
            raise InputTypeError(f"{name}: {type(one).__name__} came; a PIL picture, a list of them, or a tensor "
                                 "(b, 3, h, w) of preprocessed pixels would do")
    if isinstance(image, Tensor):
        check_pixels(image)
    for name, size in ("height", height), ("width", width):
        if count(name, size, low=factor, high=LARGEST) % factor:
            raise InputError(f"{name}={size}: a multiple of {factor} from {factor} to {LARGEST} pixels would do")
    count("callback_steps", callback_steps)


def check_pixels(image: Tensor) -> None:
    """A tensor goes to the image encoder as it is, so it has to look like what CLIPImageProcessor makes."""
    if image.ndim != 4 or image.shape[1] != 3 or not len(image):
        raise InputError(f"image: a tensor of shape {tuple(image.shape)} came; (b, 3, h, w) or (3, h, w) would do")
    if not image.is_floating_point():
        raise InputTypeError(f"image: a tensor of {image.dtype} came; floats as CLIPImageProcessor makes them would do")
    if not image.isfinite().all():
        raise InputError("image: the tensor holds NaN or infinite values")


def check_call(guidance_scale: float, num_images_per_prompt: int | None, eta: float, generator: Any, latents: Any,
               output_type: str, callback: Callable[..., Any] | None, shape: tuple[int, int, int, int]) -> None:
    """The arguments that `check_inputs` does not see. Numbers of steps are the scheduler's to judge."""
    finite("guidance_scale", guidance_scale)
    finite("eta", eta)
    if num_images_per_prompt is not None:
        count("num_images_per_prompt", num_images_per_prompt)
    check_generator(generator, shape[0])
    if latents is not None:
        check_latents(latents, shape)
    if output_type not in OUTPUT_TYPES:
        raise InputError(f"output_type={output_type!r}: {', '.join(map(repr, OUTPUT_TYPES))} would do")
    if callback is not None and not callable(callback):
        raise InputTypeError(f"callback={callback!r}: a function of (step, timestep, latents) would do")


def check_approximate(guidance_interval: Any, cache_interval: Any, preparable: bool) -> tuple[float, float]:
    """What trades a little of the pictures for speed; the interval as numbers."""
    if count("cache_interval", cache_interval) > 1 and not preparable:
        raise InputError(f"cache_interval={cache_interval}: needs a UNet2DConditionModel of imvar with no hooks or "
                         "layers of others; 1 would do")
    if not isinstance(guidance_interval, (tuple, list)) or len(guidance_interval) != 2:
        raise InputTypeError(f"guidance_interval={shown(guidance_interval)}: two shares of the steps would do, such as "
                             "(0.0, 0.8)")
    low, high = (real("guidance_interval", share) for share in guidance_interval)
    if low > high:
        raise InputError(f"guidance_interval=({low}, {high}): the lower share first would do")
    return low, high


def check_latents(latents: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(latents, Tensor):
        raise InputTypeError(f"latents: {type(latents).__name__} came; a tensor of shape {shape} would do")
    if tuple(latents.shape) != shape:
        raise InputError(f"latents: shape {tuple(latents.shape)} came; {shape} would do")
    if not latents.is_floating_point() or not latents.isfinite().all():
        raise InputError("latents: finite floats would do; integers, NaN or infinite values came")
