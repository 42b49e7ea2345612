"""`CLIPImageProcessor`: pictures to the (b, 3, 224, 224) that CLIP's vision tower takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from ..checks import MAX_SIDE
from ..config import INVALID, Config, coerce_number, one_of
from ..errors import InputError, InputTypeError, short_repr
from ..outputs import Output
from ..weights.configured import ConfiguredComponent
from .clip_tensor import preprocess_batch, supports
from .read import decode_pil, iter_images, to_pixels, to_rgb
from .resize import center_crop, resize, target_size

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
UNSUPPORTED = {"do_pad": False, "default_to_square": False}  # settings of transformers, at the only value supported


@dataclass(frozen=True, eq=False, repr=False)
class CLIPImageProcessorConfig(Config):
    """The settings of `preprocessor_config.json`.

    `size` is {"shortest_edge": n} or {"height": h, "width": w}, `crop_size` the latter; older files say
    n and (h, w). `resample` is a number of `PIL.Image.Resampling`; `image_mean` and `image_std` are one
    number or three.
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
        for name, fine in UNSUPPORTED.items():
            if extra_fields.get(name) not in (None, fine):
                raise InputError(
                    f"{type(self).__name__}: {name}={short_repr(extra_fields[name])} is not supported; it can be {fine}",
                    key=name,
                )
        return super().record_fields(fields_set, extra_fields)

    def check(self) -> None:
        super().check()
        self.__dict__.update(
            size=self._size("size", [{"shortest_edge"}, {"height", "width"}]),
            crop_size=self._size("crop_size", [{"height", "width"}]),
            resample=self._resample(),
            rescale_factor=self._numbers("rescale_factor", 1)[0],
            image_mean=self._numbers("image_mean", 3),
            image_std=self._numbers("image_std", 3),
        )
        if not all(map(np.float32, self.image_std)):
            raise self._refused("image_std", "numbers other than 0")

    def _size(self, name: str, forms: list[set[str]]) -> dict[str, int]:
        value = getattr(self, name)
        if isinstance(value, int) and not isinstance(value, bool):
            value = dict.fromkeys(forms[0], value)
        elif isinstance(value, (list, tuple)) and len(value) == 2:
            value = dict(zip(("height", "width"), value, strict=True))
        if isinstance(value, Mapping):
            value = {key: n for key, n in value.items() if n is not None}
        if not isinstance(value, Mapping) or set(value) not in forms:
            raise self._refused(name, " or ".join(str(dict.fromkeys(sorted(form), 224)) for form in forms))
        if not all(type(n) is int and 1 <= n <= MAX_SIDE for n in value.values()):
            raise self._refused(name, f"whole numbers in 1..{MAX_SIDE}")
        return dict(value)

    def _resample(self) -> int:
        if self.resample not in list(Image.Resampling):
            choices = ", ".join(f"{r.value} ({r.name.lower()})" for r in sorted(Image.Resampling))
            raise self._refused("resample", choices)
        return int(self.resample)

    def _numbers(self, name: str, count: int) -> tuple[float, ...]:
        value = getattr(self, name)
        several = isinstance(value, Sequence) or np.ndim(value)
        values = tuple(value) if several else (value,) * count
        values = [coerce_number(entry, float) for entry in values]
        if len(values) != count or any(v is INVALID or abs(v) > 1e30 for v in values):  # float32 holds no more
            raise self._refused(name, "one number" if count == 1 else f"one finite number or {count}")
        return tuple(float(v) for v in values)

    def _refused(self, name: str, would_do: str) -> InputError:
        came = f"{name}={short_repr(getattr(self, name))}"
        return InputError(f"{type(self).__name__}: {came} is not supported; it can be {would_do}", key=name)


@dataclass(eq=False)
class BatchFeature(Output):
    """`pixel_values`: (b, 3, h, w), tensor or array, or a list of (3, h, w) arrays."""

    pixel_values: Any

    def to(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """Move or cast the pixels, as `torch.Tensor.to` does; returns this very object."""
        if not isinstance(self.pixel_values, torch.Tensor):
            raise InputTypeError("to: the pixels are no tensor; ask the processor for return_tensors='pt'")
        self.pixel_values = self.pixel_values.to(*args, **kwargs)
        return self


class CLIPImageProcessor(
    ConfiguredComponent,
    part="feature_extractor",
    also=("CLIPFeatureExtractor", "CLIPImageProcessorPil", "CLIPImageProcessorFast"),
):
    """Resize the short edge, crop the middle, scale to [0, 1], subtract CLIP's mean, divide by its deviation.

    Equal to transformers' processor of this name, pixel for pixel. Settings are read and set as attributes.
    """

    config_class = CLIPImageProcessorConfig
    config_name = "preprocessor_config.json"

    def __call__(
        self, images: Any, *, return_tensors: str | None = None, input_data_format: str | None = None, **changes: Any
    ) -> BatchFeature:
        """Pictures to `.pixel_values`: (b, 3, h, w) float32 for "pt" and "np", else a list of (3, h, w) arrays.

        `images` is a PIL picture of any mode (transparent parts turn white, EXIF is ignored), or an array or
        tensor of shape (h, w, c), (c, h, w) or a batch of them, or a list of these. uint8 is 0..255; floats
        are 0..255 too, or [0, 1] under `do_rescale=False`. `changes` are settings for this call alone.

        Raises `InputTypeError` for what is no picture, `InputError` for a picture or setting that cannot be
        used; both name it.
        """
        if return_tensors not in ("pt", "np", None):
            raise InputError(f"return_tensors={return_tensors!r} is not supported; it can be 'pt', 'np' or None")
        if input_data_format not in ("channels_first", "channels_last", None):
            raise InputError(
                f"input_data_format={input_data_format!r} is not supported; it can be 'channels_first', "
                "'channels_last' or None"
            )
        settings = self.settings(changes)
        pixels = [preprocess_image(image, name, settings, input_data_format) for name, image in iter_images(images)]
        if return_tensors is None:
            return BatchFeature(pixels)
        if len(sizes := {x.shape[1:] for x in pixels}) > 1:
            raise InputError(f"images: sizes {sorted(sizes)} (h, w) make no batch; do_center_crop=True would do")
        batch = np.stack(pixels)
        return BatchFeature(torch.from_numpy(batch) if return_tensors == "pt" else batch)

    preprocess = __call__

    def preprocess_uint8(self, levels: torch.Tensor) -> torch.Tensor:
        """The `pixel_values` of pictures that come as uint8 (b, 3, h, w), equal to the bit, and where these lie."""
        if levels.device.type != "cpu" and supports(levels, self.config):
            return preprocess_batch(levels, self.config)
        batch = self(list(levels), return_tensors="pt", input_data_format="channels_first")
        return batch.pixel_values.to(levels.device)

    def settings(self, changes: Mapping[str, Any]) -> Config:
        """This processor's settings with these changes."""
        return (
            self.config.from_dict(self.config, **self.config_class.from_args(**changes).explicit())
            if changes
            else self.config
        )

    def __getattr__(self, name: str) -> Any:
        config = self.__dict__.get("config", {})
        if name in config:
            return config[name]
        raise AttributeError(f"{type(self).__name__} has no attribute or setting {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if any(name == f.name for f in fields(self.config_class)):
            self.register_to_config(**{name: value})
        else:
            super().__setattr__(name, value)

    def saved_config(self) -> Mapping[str, Any]:
        """What transformers reads: the settings and the class, no diffusers marks."""
        return self.config.to_dict() | {"image_processor_type": "CLIPImageProcessor"}


def preprocess_image(image: Any, name: str, settings: Config, layout: str | None) -> np.ndarray:
    """One picture as (3 h w). Rescaling rounds to float32 once, from double; normalising stays in float32."""
    s = settings
    x = read_rgb(image, name, s, layout)
    if s.do_resize:
        x = resize_8bit(x, name, s)
    x = np.asarray(x)  # h w 3
    if s.do_center_crop:
        x = center_crop(x, s.crop_size["height"], s.crop_size["width"])
    if s.do_rescale:
        x = np.multiply(x, s.rescale_factor, dtype=np.float64).astype(np.float32)
    if s.do_normalize:
        x = (x.astype(np.float32, copy=False) - np.float32(s.image_mean)) / np.float32(s.image_std)
    return np.array(x.transpose(2, 0, 1), order="C")  # a copy, never a view of what was handed in


def read_rgb(image: Any, name: str, settings: Config, layout: str | None) -> Image.Image | np.ndarray:
    """RGB: a PIL picture, or (h w 3) float32 where floats came."""
    if isinstance(image, Image.Image):
        if settings.do_convert_rgb:
            return to_rgb(image, name)
        decode_pil(image, name)
        if len(image.getbands()) != 3:
            raise InputError(f"{name}: mode {image.mode} came; RGB would do, or do_convert_rgb=True")
        return Image.fromarray(np.asarray(image))
    x = to_pixels(image, name, layout)
    channels = x.shape[-1]
    if channels != 3 and not settings.do_convert_rgb:
        raise InputError(f"{name}: {channels} channels came; 3 would do, or do_convert_rgb=True")
    if channels == 4:
        if x.dtype != np.uint8:
            raise InputTypeError(f"{name}: 4 channels of {x.dtype} came; uint8 would do, or 3 channels")
        return to_rgb(Image.fromarray(np.ascontiguousarray(x)), name)
    x = np.broadcast_to(x, (*x.shape[:2], 3))
    if x.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(x))
    check_clip_range(x, name, settings)
    return x


def check_clip_range(x: np.ndarray, name: str, settings: Config) -> None:
    """Floats must have the range that the settings take them to have."""
    low, high = x.min(), x.max()
    if settings.do_rescale and 0 < high <= 1:
        raise InputError(f"{name}: floats {low}..{high} came; with values in [0, 1] pass do_rescale=False")
    top = 255 if settings.do_rescale else 1
    if (settings.do_rescale or settings.do_resize) and (low < 0 or high > top):
        raise InputError(f"{name}: floats {low}..{high} came; 0..{top} would do under do_rescale={settings.do_rescale}")


def resize_8bit(x: Image.Image | np.ndarray, name: str, settings: Config) -> np.ndarray:
    """(h w 3) at the size the settings ask for. Resizing happens in 8 bits; floats pass through them and back."""
    s = settings
    crop = (s.crop_size["height"], s.crop_size["width"]) if s.do_center_crop else None
    if isinstance(x, Image.Image):
        return resize(x, *target_size(s.size, x.height, x.width), s.resample, crop)
    if s.do_rescale and not np.array_equal(x, np.trunc(x)):
        raise InputError(f"{name}: floats between whole numbers came; uint8 would do, or [0, 1] with do_rescale=False")
    levels = x if s.do_rescale else x * 255
    small = resize_8bit(Image.fromarray(levels.astype(np.uint8)), name, s)
    return small if s.do_rescale else (small * (1 / 255)).astype(np.float32)
