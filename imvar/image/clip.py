"""`CLIPImageProcessor`: images to the (b, 3, 224, 224) pixel values of CLIP's vision model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from ..checks import MAX_SIDE
from ..config import INVALID, Config, coerce_number, one_of
from ..errors import InputError, InputTypeError, describe, invalid, short_repr
from ..outputs import Output
from ..weights.configured import ConfiguredComponent
from .clip_tensor import preprocess_batch, supports
from .read import decode_pil, iter_images, to_pixels, to_rgb
from .resize import center_crop, resize, target_size

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
UNSUPPORTED = {"do_pad": False, "default_to_square": False}  # fields of transformers, at the one supported value


@dataclass(frozen=True, eq=False, repr=False)
class CLIPImageProcessorConfig(Config):
    """Fields of `preprocessor_config.json`.

    `size` is {"shortest_edge": n} or {"height": h, "width": w}, `crop_size` the latter; older files have n and (h, w).
    `resample` is a value of `PIL.Image.Resampling`; `image_mean` and `image_std` are one number or three.
    """

    do_resize: bool = one_of(True, False)
    size: Any = field(default_factory=lambda: {"shortest_edge": 224})
    resample: int = 3
    do_center_crop: bool = one_of(True, False)
    crop_size: Any = field(default_factory=lambda: {"height": 224, "width": 224})
    do_rescale: bool = one_of(True, False)
    rescale_factor: float = 1 / 255
    do_normalize: bool = one_of(True, False)
    image_mean: Any = CLIP_MEAN
    image_std: Any = CLIP_STD
    do_convert_rgb: bool = one_of(True, False)
    image_processor_type: str = one_of("CLIPImageProcessor", "CLIPImageProcessorPil", "CLIPImageProcessorFast")

    def record_fields(self, fields_set: Iterable[str], extra_fields: Mapping[str, Any]) -> Self:
        for name, supported in UNSUPPORTED.items():
            if extra_fields.get(name) not in (None, supported):
                raise invalid(InputError, name, str(supported), short_repr(extra_fields[name]))
        return super().record_fields(fields_set, extra_fields)

    def check(self) -> None:
        super().check()
        vars(self).update(
            size=self._size("size", [{"shortest_edge"}, {"height", "width"}]),
            crop_size=self._size("crop_size", [{"height", "width"}]),
            resample=int(self.resample),
            rescale_factor=self._numbers("rescale_factor", 1)[0],
            image_mean=self._numbers("image_mean", 3),
            image_std=self._numbers("image_std", 3),
        )
        if self.resample not in list(Image.Resampling):
            choices = ", ".join(f"{r.value} ({r.name.lower()})" for r in sorted(Image.Resampling))
            raise invalid(InputError, "resample", f"one of {choices}", short_repr(self.resample))
        if not all(map(np.float32, self.image_std)):
            raise invalid(InputError, "image_std", "numbers other than 0", short_repr(self.image_std))

    def _size(self, name: str, forms: list[set[str]]) -> dict[str, int]:
        """Return a size as a dictionary with the keys of one of `forms`, the first for a single number."""
        value = got = getattr(self, name)
        if isinstance(value, int) and not isinstance(value, bool):
            value = dict.fromkeys(forms[0], value)
        elif isinstance(value, (list, tuple)) and len(value) == 2:
            value = dict(zip(("height", "width"), value, strict=True))
        if isinstance(value, Mapping):
            value = {key: n for key, n in value.items() if n is not None}
        if not isinstance(value, Mapping) or set(value) not in forms:
            expected = " or ".join(str(dict.fromkeys(sorted(form), 224)) for form in forms)
            raise invalid(InputError, name, expected, short_repr(got))
        if not all(type(n) is int and 1 <= n <= MAX_SIDE for n in value.values()):
            raise invalid(InputError, name, f"integers from 1 to {MAX_SIDE}", short_repr(got))
        return dict(value)

    def _numbers(self, name: str, count: int) -> tuple[float, ...]:
        """Return `count` finite numbers, or one number `count` times."""
        value = getattr(self, name)
        values = tuple(value) if isinstance(value, Sequence) or np.ndim(value) else (value,) * count
        values = [coerce_number(entry, float) for entry in values]
        if len(values) != count or any(v is INVALID or abs(v) > 1e30 for v in values):  # stays finite in float32
            expected = "a finite number" if count == 1 else f"a finite number or {count}"
            raise invalid(InputError, name, expected, short_repr(value))
        return tuple(float(v) for v in values)


@dataclass(eq=False)
class BatchFeature(Output):
    """`pixel_values`: (b, 3, h, w), tensor or array, or a list of (3, h, w) arrays."""

    pixel_values: Any

    def to(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """Move or cast `pixel_values` in place, as `torch.Tensor.to`, and return self."""
        if not isinstance(self.pixel_values, torch.Tensor):
            hint = "pass return_tensors='pt' to the processor"
            raise invalid(InputTypeError, "pixel_values", "a tensor", describe(self.pixel_values), hint)
        self.pixel_values = self.pixel_values.to(*args, **kwargs)
        return self


class CLIPImageProcessor(
    ConfiguredComponent,
    part="feature_extractor",
    also=("CLIPFeatureExtractor", "CLIPImageProcessorPil", "CLIPImageProcessorFast"),
):
    """Resize the short edge, crop the center, rescale to [0, 1] and normalise with CLIP's mean and deviation.

    Bit-identical to transformers' processor of this name. Config fields are read and set as attributes.
    """

    config_class = CLIPImageProcessorConfig
    config_name = "preprocessor_config.json"

    def __call__(
        self, images: Any, *, return_tensors: str | None = None, input_data_format: str | None = None, **changes: Any
    ) -> BatchFeature:
        """Return images as `.pixel_values`: (b, 3, h, w) float32 for "pt" and "np", else a list of (3, h, w) arrays.

        `images` is a PIL image of any mode (composited on white if transparent; EXIF is ignored), an array or tensor of
        shape (h, w, c) or (c, h, w) or a batch of them, or a list of these. Values are in 0..255, floats with
        `do_rescale=False` in [0, 1]. `changes` are config fields for this call only.

        Raises `InputTypeError` for something that is not an image, `InputError` for an unsupported image or field.
        """
        if return_tensors not in ("pt", "np", None):
            raise invalid(InputError, "return_tensors", "'pt', 'np' or None", short_repr(return_tensors))
        if input_data_format not in ("channels_first", "channels_last", None):
            expected = "'channels_first', 'channels_last' or None"
            raise invalid(InputError, "input_data_format", expected, short_repr(input_data_format))
        config = self.config
        if changes:
            config = config.from_dict(config, **self.config_class.from_args(**changes).explicit())
        pixels = [preprocess_image(image, name, config, input_data_format) for name, image in iter_images(images)]
        if return_tensors is None:
            return BatchFeature(pixels)
        if len(sizes := {x.shape[1:] for x in pixels}) > 1:
            got = f"sizes {sorted(sizes)} (h, w)"
            raise invalid(InputError, "images", "one size after preprocessing", got, "pass do_center_crop=True")
        batch = np.stack(pixels)
        return BatchFeature(torch.from_numpy(batch) if return_tensors == "pt" else batch)

    preprocess = __call__

    def preprocess_uint8(self, images: torch.Tensor) -> torch.Tensor:
        """Return the `pixel_values` of uint8 images (b, 3, h, w), bit-identical to `preprocess`, on their device."""
        if images.device.type != "cpu" and supports(images, self.config):
            return preprocess_batch(images, self.config)
        batch = self(list(images), return_tensors="pt", input_data_format="channels_first")
        return batch.pixel_values.to(images.device)

    def __setattr__(self, name: str, value: Any) -> None:
        if any(name == f.name for f in fields(self.config_class)):
            self.register_to_config(**{name: value})
        else:
            super().__setattr__(name, value)

    def saved_config(self) -> Mapping[str, Any]:
        """Return the fields that transformers reads, with its class name and without diffusers' keys."""
        return self.config.to_dict() | {"image_processor_type": "CLIPImageProcessor"}


def preprocess_image(image: Any, name: str, config: Config, layout: str | None) -> np.ndarray:
    """Return one image as (3 h w). Rescaling rounds float64 to float32 once; normalising stays in float32."""
    x = read_rgb(image, name, config, layout)
    if config.do_resize:
        x = resize_8bit(x, name, config)
    x = np.asarray(x)  # h w 3
    if config.do_center_crop:
        x = center_crop(x, config.crop_size["height"], config.crop_size["width"])
    if config.do_rescale:
        x = np.multiply(x, config.rescale_factor, dtype=np.float64).astype(np.float32)
    if config.do_normalize:
        x = (x.astype(np.float32, copy=False) - np.float32(config.image_mean)) / np.float32(config.image_std)
    return np.array(x.transpose(2, 0, 1), order="C")  # a copy, never a view of the argument


def read_rgb(image: Any, name: str, config: Config, layout: str | None) -> Image.Image | np.ndarray:
    """Return an image as RGB: a PIL image, or for floats an array (h w 3) float32."""
    if isinstance(image, Image.Image):
        if config.do_convert_rgb:
            return to_rgb(image, name)
        decode_pil(image, name)
        if len(image.getbands()) != 3:
            raise invalid(InputError, name, "mode RGB", f"mode {image.mode}", "pass do_convert_rgb=True")
        return Image.fromarray(np.asarray(image))
    x = to_pixels(image, name, layout)
    channels = x.shape[-1]
    if channels != 3 and not config.do_convert_rgb:
        raise invalid(InputError, name, "3 channels", str(channels), "pass do_convert_rgb=True")
    if channels == 4:
        if x.dtype != np.uint8:
            raise invalid(InputTypeError, name, "4 channels of uint8, or 3 channels", f"4 channels of {x.dtype}")
        return to_rgb(Image.fromarray(np.ascontiguousarray(x)), name)
    x = np.broadcast_to(x, (*x.shape[:2], 3))
    if x.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(x))
    check_clip_range(x, name, config)
    return x


def check_clip_range(x: np.ndarray, name: str, config: Config) -> None:
    """Check that floats are in the range that the config implies."""
    low, high = x.min(), x.max()
    got, top = f"floats from {low} to {high}", 255 if config.do_rescale else 1
    if config.do_rescale and 0 < high <= 1:
        raise invalid(InputError, name, "values from 0 to 255", got, "pass do_rescale=False for values in [0, 1]")
    if (config.do_rescale or config.do_resize) and (low < 0 or high > top):
        raise invalid(InputError, name, f"values from 0 to {top} with do_rescale={config.do_rescale}", got)


def resize_8bit(x: Image.Image | np.ndarray, name: str, config: Config) -> np.ndarray:
    """Resize to (h w 3) as the config says. Floats are resized in 8 bits, too, as in transformers."""
    crop = (config.crop_size["height"], config.crop_size["width"]) if config.do_center_crop else None
    if isinstance(x, Image.Image):
        return resize(x, *target_size(config.size, x.height, x.width), config.resample, crop)
    if config.do_rescale and not np.array_equal(x, np.trunc(x)):
        expected = "uint8, floats with integer values, or floats in [0, 1] with do_rescale=False"
        raise invalid(InputError, name, expected, "floats between integers")
    x = x if config.do_rescale else x * 255
    x = resize_8bit(Image.fromarray(x.astype(np.uint8)), name, config)
    return x if config.do_rescale else (x * (1 / 255)).astype(np.float32)
