"""Arguments of a call of the pipeline: their checks, and the checked values."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from ..checks import FLOAT_DTYPES, MAX_FLOAT, as_number, check_finite, check_float, check_has_data, check_int
from ..embeddings import as_embeddings
from ..errors import InputError, InputTypeError, describe, invalid, short_repr, warn_user
from ..image.read import warn_about_orientation
from ..models.regions import RegionLayout
from ..noise import Generators, Seeds, check_generator, per_image_seeds, seed_generators
from ..runtime.guidance import NO_GUIDANCE, scale_by_step
from .callbacks import check_callback, check_function, check_tensor_inputs
from .regions import Region, as_regions, join_tokens, lay_out

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
ON_FLAGGED = ("black", "blur", "keep", "raise")
MAX_IMAGES_PER_PROMPT = 2**16
MAX_NORMALIZED_PIXEL = 16.0  # absolute value of a plausible normalized pixel; those of CLIP are below 2.2
MAX_SIDE = 2**16  # pixels


@dataclass(repr=False, eq=False)
class Call:
    """The arguments of one call: as given, until the checks convert them in place to the types of these fields."""

    image: Any
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float | Sequence[float]
    num_images_per_prompt: int
    eta: float
    generator: Generators | None
    latents: Tensor | None
    output_type: str
    return_dict: bool
    callback: Callable[[int, Any, Tensor], Any] | None
    callback_steps: int
    guidance_interval: tuple[float, float]
    cache_interval: int
    seed: Seeds | None
    on_flagged: str
    conditions: Any
    image_embeds: Any
    negative_image_embeds: Tensor | None
    guidance_rescale: float
    init_image: Any
    strength: float | None
    mask_image: Any
    paste: bool
    callback_on_step_end: Callable[[Any, int, Any, dict[str, Tensor]], Any] | None
    callback_on_step_end_tensor_inputs: Sequence[str]

    # Values that follow from the arguments and the components

    given: Mapping[str, Any] = field(init=False)  # the arguments as they are given

    seeds: list[int] | None = None
    regions: list[Region] | None = None
    shape: tuple[int, int, int, int] = field(init=False)  # of the latents
    device: torch.device = field(init=False)
    unmodified_unet: bool = field(init=False)  # no hook or override sits between the latents and the UNet
    is_guided: bool = field(init=False)  # whether the context has both halves of guidance
    skipped_steps: int = 0  # those of num_inference_steps before the start from an image

    def __post_init__(self) -> None:
        self.given = {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    @property
    def steps(self) -> int:
        """The number of steps that are run."""
        return self.num_inference_steps - self.skipped_steps

    @property
    def denoising(self) -> dict[str, Any]:
        """Arguments of the `Denoiser`."""
        return {
            "guidance_scale": self.guidance_scale if self.is_guided else None,
            "guidance_interval": self.guidance_interval,
            "guidance_rescale": self.guidance_rescale,
            "cache_interval": self.cache_interval,
            "refreshable": self.callback is not None or self.callback_on_step_end is not None,
            "regions": self.layout,
        }

    @property
    def layout(self) -> RegionLayout | None:
        """How the tokens of regions share the latents."""
        return None if self.regions is None else lay_out(self.regions, self.shape[2:])

    @property
    def images(self) -> int:
        """The number of images b, or of embeddings in their place."""
        images = self.image if self.image_embeds is None else self.image_embeds
        return len(images) if isinstance(images, (list, tuple, Tensor, np.ndarray)) else 1

    def check_embeddings(self, own_encoding: bool) -> None:
        """Convert embeddings to (b, 1, c), or those of k regions to (b, k + 1, c), the last one zeros.

        `own_encoding`: whether a subclass encodes images by its own method.
        """
        if self.image_embeds is not None:
            if self.image is not None:
                raise invalid(InputError, "image_embeds", "image or image_embeds", "both", "leave one of them out")
            if own_encoding:
                hint = "pass `image`, as this pipeline has its own _encode_image"
                raise invalid(InputError, "image_embeds", "none", describe(self.image_embeds), hint)
            if isinstance(self.image_embeds, (Region, list, tuple)):
                self.regions = as_regions(self.image_embeds)
                self.image_embeds = join_tokens(self.regions)
            else:
                self.image_embeds = as_embeddings("image_embeds", self.image_embeds)
        if self.negative_image_embeds is not None:
            self.negative_image_embeds = as_embeddings("negative_image_embeds", self.negative_image_embeds)
            if len(self.negative_image_embeds) not in (1, self.images):
                expected = f"one embedding, or one for each of {self.images} images"
                got = describe(self.negative_image_embeds)
                raise invalid(InputError, "negative_image_embeds", expected, got)

    def check_numbers(self) -> None:
        """Convert numbers to int and float. How many steps and how much noise are possible depends on the scheduler."""
        self.height, self.width, self.callback_steps = int(self.height), int(self.width), int(self.callback_steps)
        self.num_inference_steps = check_int("num_inference_steps", self.num_inference_steps)
        if callable(self.guidance_scale):
            expected = "a number, or a function of the fraction of steps done"
            check_function("guidance_scale", self.guidance_scale, (0.0,), expected)
        else:
            self.guidance_scale = check_scale("guidance_scale", self.guidance_scale)
        self.guidance_rescale = check_float("guidance_rescale", self.guidance_rescale)
        self.eta = check_finite("eta", self.eta)
        n = 1 if self.num_images_per_prompt is None else self.num_images_per_prompt
        self.num_images_per_prompt = check_int("num_images_per_prompt", n, high=MAX_IMAGES_PER_PROMPT)

    def plan_guidance(self, steps: int) -> None:
        """Evaluate a scale that is a function for each of the `steps`, and find out whether any of them is guided."""
        if callable(scale := self.guidance_scale):
            scales = ((f"guidance_scale in step {i} of {steps}", scale(i / steps)) for i in range(steps))
            self.guidance_scale = [check_scale(name, value) for name, value in scales]
        intervals = (0.0, 1.0), self.guidance_interval
        scales = [max(scale_by_step(self.guidance_scale, interval, steps)) for interval in intervals]
        self.is_guided, has_guided_steps = (scale > NO_GUIDANCE for scale in scales)
        needs_guidance = {
            "negative_image_embeds": self.negative_image_embeds is not None,
            "guidance_rescale": self.guidance_rescale > 0,
            "callback_on_step_end_tensor_inputs": "negative_image_embeds" in self.callback_on_step_end_tensor_inputs,
        }
        for name, is_given in needs_guidance.items():
            if is_given and not has_guided_steps:
                hint = "it has an effect only under guidance: pass a guidance_scale above 1"
                raise invalid(InputError, name, "a step with guidance, or no such argument", "no such step", hint)

    def check_options(self, check_shape: bool) -> None:
        """Check the other arguments except `image`. `check_shape`: whether `latents` must have the shape of `self`."""
        check_generator(self.generator, self.shape[0])
        if self.latents is not None and check_shape:
            check_latents(self.latents, self.shape)
        check_option("output_type", self.output_type, OUTPUT_TYPES)
        check_option("on_flagged", self.on_flagged, ON_FLAGGED)
        if not isinstance(self.return_dict, bool):
            raise invalid(InputTypeError, "return_dict", "True or False", short_repr(self.return_dict))
        if self.callback is not None:
            check_callback(self.callback)
            if self.callback_on_step_end is not None:
                hint = "leave one of them out"
                raise invalid(InputError, "callback", "callback or callback_on_step_end", "both", hint)
        names = self.callback_on_step_end_tensor_inputs
        if self.callback_on_step_end is not None:
            expected = "a function (pipe, step, timestep, callback_kwargs)"
            check_function("callback_on_step_end", self.callback_on_step_end, (None, 0, 0, {}), expected)
            names = getattr(self.callback_on_step_end, "tensor_inputs", names)  # of diffusers' PipelineCallback
        self.callback_on_step_end_tensor_inputs = check_tensor_inputs(names)
        if self.seed is not None:
            if self.generator is not None:
                raise invalid(InputError, "seed", "seed or generator", "both", "leave one of them out")
            self.seeds = per_image_seeds(self.seed, self.shape[0])
            self.generator = seed_generators(self.seeds)

    def check_intervals(self, cacheable: bool) -> None:
        """Check the approximations, of which DeepCache runs layers of an unmodified UNet one by one."""
        self.cache_interval = check_int("cache_interval", self.cache_interval)
        if self.cache_interval > 1 and not cacheable:
            hint = "above 1 it requires imvar's own UNet2DConditionModel without custom layers or hooks"
            hint += ", and a predictor that takes it"
            raise invalid(InputError, "cache_interval", "1", str(self.cache_interval), hint)
        pair = self.guidance_interval
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            expected = "two fractions of the steps such as (0.0, 0.8)"
            raise invalid(InputTypeError, "guidance_interval", expected, short_repr(pair))
        low, high = (check_float("guidance_interval", fraction) for fraction in pair)
        if low > high:
            raise invalid(InputError, "guidance_interval", "the lower fraction first", f"({low}, {high})")
        self.guidance_interval = low, high

    def check_seeds_are_used(self, step_options: Mapping[str, Any]) -> None:
        """Check that noise is drawn: for the first latents, or in the steps."""
        drawn_in_steps = "generator" in step_options and step_options.get("eta", 1)
        if self.seeds and self.latents is not None and not drawn_in_steps:
            hint = "leave one of them out, as no step draws noise"
            raise invalid(InputError, "seed", "seed or latents", "both", hint)


def check_images(image: Any) -> None:
    """Check the type of the images."""
    images = image if isinstance(image, (list, tuple)) else [image]
    if not images:
        raise invalid(InputTypeError, "image", "at least one image", "an empty list")
    for i, element in enumerate(images):
        name = "image" if element is image else f"image[{i}]"
        if not isinstance(element, (Image, Tensor)) and not (element is not image and hasattr(element, "__array__")):
            expected = "a PIL image, a list of them or a tensor (b, 3, h, w) of normalized pixels"
            hint = "pass image or image_embeds" if image is None else ""
            raise invalid(InputTypeError, name, expected, describe(element), hint, key="image")
        if isinstance(element, Image):
            warn_about_orientation(name, element)
        elif element is not image and getattr(element, "ndim", 3) > 3:
            raise invalid(InputError, name, "one image", f"a batch of shape {tuple(element.shape)}", key="image")
    if isinstance(image, Tensor):
        check_normalized(image)


def check_size_and_interval(height: int, width: int, callback_steps: int, factor: int) -> None:
    """Check the size in pixels, a multiple of `factor`, and the callback's interval."""
    for name, size in ("height", height), ("width", width):
        number = as_number(size, operator.index)
        if number is None or not factor <= number <= MAX_SIDE or number % factor:
            kind = InputTypeError if number is None else InputError
            expected, hint = f"a multiple of {factor} from {factor} to {MAX_SIDE}", f"pass one divisible by {factor}"
            raise invalid(kind, name, expected, short_repr(size), hint)
    check_int("callback_steps", callback_steps)


def check_normalized(image: Tensor) -> None:
    """Check a tensor (b, 3, h, w) that goes to the image encoder unchanged: pixels normalized by CLIPImageProcessor."""
    check_has_data("image", image)
    if image.ndim != 4 or image.shape[1] != 3 or not image.numel():
        raise invalid(InputError, "image", "a tensor (b, 3, h, w) or (3, h, w)", describe(image))
    if image.dtype not in FLOAT_DTYPES:
        raise invalid(InputTypeError, "image", "floats, as CLIPImageProcessor returns", str(image.dtype))
    if not image.isfinite().all():
        raise invalid(InputError, "image", "finite values", "NaN or infinite values")
    if (peak := float(image.abs().max())) > MAX_NORMALIZED_PIXEL:
        warn_user(
            f"image: the tensor has values up to {peak:.4g}, and normalized pixels are within 3 of 0; "
            "CLIPImageProcessor normalizes 0..255"
        )


def check_latents(latents: Any, shape: tuple[int, ...]) -> None:
    """Check that latents are finite floats of this shape."""
    if not isinstance(latents, Tensor):
        raise invalid(InputTypeError, "latents", f"a tensor of shape {shape}", describe(latents))
    check_has_data("latents", latents)
    if tuple(latents.shape) != shape:
        raise invalid(InputError, "latents", f"a tensor of shape {shape}", describe(latents))
    if latents.dtype not in FLOAT_DTYPES:
        raise invalid(InputError, "latents", "finite floats", str(latents.dtype))
    if not latents.isfinite().all():
        raise invalid(InputError, "latents", "finite floats", "NaN or infinite values")


def check_scale(name: str, value: Any) -> float:
    """Return a guidance scale as a float."""
    scale = as_number(value)
    if scale is None or not 0 <= scale <= MAX_FLOAT:
        kind, hint = InputTypeError if scale is None else InputError, "pass 1 for no guidance"
        raise invalid(kind, name, "a finite number from 0", short_repr(value), hint, key="guidance_scale")
    return scale


def check_option(name: str, value: Any, options: Sequence[str]) -> None:
    """Check that a string is one of `options`."""
    if not isinstance(value, str) or value not in options:
        kind = InputError if isinstance(value, str) else InputTypeError
        raise invalid(kind, name, f"one of {', '.join(map(repr, options))}", short_repr(value))


@contextmanager
def rename_argument(inner: str, outer: str) -> Iterator[None]:
    """Name an argument in errors as the caller of the pipeline knows it."""
    try:
        yield
    except InputError as error:
        message = str(error)
        if message.startswith(inner):
            error.args = (outer + message[len(inner) :],)
            if error.key and error.key.startswith(inner):
                error.key = outer + error.key[len(inner) :]
        raise
