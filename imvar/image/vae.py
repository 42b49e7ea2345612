"""`VaeImageProcessor`: between pictures and the autoencoder's (b, 3, h, w) in [-1, 1]."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..checks import MAX_SIDE, check_floating, check_has_data, check_int
from ..config import Config, Configured, fixed, one_of
from ..errors import InputError, InputTypeError, short_repr
from .read import ACCEPTED, decode_pil

FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}


@dataclass(frozen=True, eq=False, repr=False)
class VaeImageProcessorConfig(Config):
    """`vae_scale_factor`: pixels per latent, of which `preprocess` makes height and width a multiple."""

    do_resize: bool = one_of(True, False)
    vae_scale_factor: int = 8
    vae_latent_channels: int = 4
    resample: str = one_of(*FILTERS)
    reducing_gap: int | None = fixed(None)
    do_normalize: bool = one_of(True, False)
    do_binarize: bool = fixed(False)
    do_convert_rgb: bool = one_of(False, True)
    do_convert_grayscale: bool = fixed(False)

    def check(self) -> None:
        super().check()
        for name in ("vae_scale_factor", "vae_latent_channels"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise InputError(f"{type(self).__name__}: {name}={value!r} is not supported; it can be 1, 2, 3, ...")


class VaeImageProcessor(Configured):
    """Pictures to the autoencoder and back, as the class of this name in diffusers does it."""

    config_class = VaeImageProcessorConfig

    def preprocess(self, image: Any, height: int | None = None, width: int | None = None) -> Tensor:
        """Pictures to (b, 3, height, width) in [-1, 1]; sizes are cut to a multiple of `vae_scale_factor`.

        `image` is a PIL picture, an array (h, w, c) or (b, h, w, c), a tensor (c, h, w) or (b, c, h, w), both
        in [0, 1], or a list of one kind. The first sets height and width where they are not given. Pictures
        are resized with `resample`, arrays and tensors by nearest neighbour. A tensor with as many channels
        as latents have comes back as it is; values below 0 count as normalised already.
        """
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        if images and all(isinstance(item, Image.Image) for item in images):
            x = self._from_pictures(images, height, width)
        elif images and all(isinstance(item, (np.ndarray, Tensor)) for item in images):
            batches = [_as_batch(item) for item in images]
            if len(shapes := {tuple(x.shape[1:]) for x in batches}) > 1:
                raise InputError(f"image: shapes {sorted(shapes)} (c, h, w) came; one shape would do")
            x = torch.cat(batches)
            if x.shape[1] == self.config.vae_latent_channels and isinstance(images[0], Tensor):
                return x
            _check_range(x)
            if self.config.do_resize:
                x = F.interpolate(x, size=self.get_default_height_width(x, height, width))
        else:
            kinds = sorted({type(item).__name__ for item in images}) or [f"an empty {type(image).__name__}"]
            raise InputTypeError(f"image: {', '.join(kinds)} came; {ACCEPTED}")
        if not self.config.do_normalize:
            return x
        if x.min() < 0:
            warnings.warn(
                "image: values below 0 came, so they are taken as normalised to [-1, 1]; values in [0, 1] are expected",
                stacklevel=2,
            )
            return x
        return self.normalize(x)

    def _from_pictures(self, images: list[Image.Image], height: int | None, width: int | None) -> Tensor:
        for i, item in enumerate(images):
            decode_pil(item, f"image[{i}]")
        if self.config.do_convert_rgb:
            images = [item.convert("RGB") for item in images]
        for i, item in enumerate(images):
            if item.mode not in ("RGB", "L"):
                raise InputError(f"image[{i}]: mode {item.mode} came; RGB or L would do, or do_convert_rgb=True")
        if self.config.do_resize:
            height, width = self.get_default_height_width(images[0], height, width)
            images = [item.resize((width, height), FILTERS[self.config.resample]) for item in images]
        return self.numpy_to_pt(self.pil_to_numpy(images))

    def get_default_height_width(
        self, image: Image.Image | np.ndarray | Tensor, height: int | None = None, width: int | None = None
    ) -> tuple[int, int]:
        """The height and width asked for, or the picture's own, cut to a multiple of `vae_scale_factor`."""
        if isinstance(image, Image.Image):
            own = image.height, image.width
        else:
            own = tuple(image.shape[1:3] if isinstance(image, np.ndarray) else image.shape[2:4])
        factor, sizes = self.config.vae_scale_factor, []
        for name, value, default in zip(("height", "width"), (height, width), own, strict=True):
            size = check_int(name, default if value is None else value, low=factor, high=MAX_SIDE)
            sizes.append(size - size % factor)
        return sizes[0], sizes[1]

    def postprocess(self, image: Tensor, output_type: str = "pil", do_denormalize: Sequence[bool] | None = None) -> Any:
        """(b, c, h, w) in [-1, 1] to what `output_type` names.

        "pil": a list of pictures; "np": (b, h, w, c) float32 in [0, 1]; "pt": a tensor in [0, 1]; "latent":
        the tensor as it came. `do_denormalize` says for each picture whether its values are in [-1, 1]; those
        that are not are handed on unchanged. Raises `InputError` for values that make no picture.
        """
        if not isinstance(output_type, str) or output_type not in ("pil", "np", "pt", "latent"):
            raise InputError(f"output_type={output_type!r} is not supported; it can be 'pil', 'np', 'pt' or 'latent'")
        if not isinstance(image, Tensor):
            raise InputTypeError(f"image: {type(image).__name__} came; a tensor (b, c, h, w) would do")
        check_has_data("image", image)
        if output_type == "latent":
            return image
        if image.ndim != 4:
            raise InputError(f"image: shape {tuple(image.shape)} came; (b, c, h, w) would do")
        check_floating("image", image)
        if not image.isfinite().all():
            raise InputError("image: NaN or infinite values came, of which no picture can be made")
        flags = [self.config.do_normalize] * len(image) if do_denormalize is None else do_denormalize
        flags = flags.tolist() if isinstance(flags, (np.ndarray, Tensor)) else flags
        if not isinstance(flags, (list, tuple)) or len(flags) != len(image):
            raise InputError(
                f"do_denormalize={short_repr(do_denormalize)} came for {len(image)} pictures; a list of a flag each would do"
            )
        if all(flags):
            image = self.denormalize(image)
        elif any(flags):
            image = torch.stack([self.denormalize(x) if flag else x for x, flag in zip(image, flags, strict=True)])
        if output_type == "pt":
            return image
        return self.pt_to_numpy(image) if output_type == "np" else uint8_to_pil(to_uint8(image))

    @staticmethod
    def normalize(images: Any) -> Any:
        """[0, 1] to [-1, 1]."""
        return 2.0 * images - 1.0

    @staticmethod
    def denormalize(images: Tensor) -> Tensor:
        """[-1, 1] to [0, 1]; what lies outside is clipped."""
        return (images * 0.5 + 0.5).clamp(0, 1)

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
        """The function `numpy_to_pil`."""
        return numpy_to_pil(images)

    @staticmethod
    def pil_to_numpy(images: Image.Image | Sequence[Image.Image]) -> np.ndarray:
        """Pictures of one size to (b, h, w, 3), or (b, h, w) for grey ones: float32 in [0, 1]."""
        pictures = [images] if isinstance(images, Image.Image) else images
        if not isinstance(pictures, (list, tuple)) or not all(isinstance(one, Image.Image) for one in pictures):
            raise InputTypeError(f"images: {type(images).__name__} came; a PIL picture, or a list of them, would do")
        if len(sizes := {picture.size for picture in pictures}) != 1:
            raise InputError(f"images: sizes {sorted(sizes)} (w, h) came; one size would do")
        return np.stack([np.asarray(picture).astype(np.float32) / 255 for picture in pictures])

    @staticmethod
    def numpy_to_pt(images: np.ndarray) -> Tensor:
        """(b, h, w, c) or (b, h, w) to (b, c, h, w)."""
        if not isinstance(images, np.ndarray) or images.ndim not in (3, 4):
            raise InputTypeError(f"images: {came(images)} came; an array (b, h, w, c) would do")
        images = (images[..., None] if images.ndim == 3 else images).transpose(0, 3, 1, 2)
        return torch.from_numpy(np.ascontiguousarray(images, dtype=images.dtype.newbyteorder("=")))

    @staticmethod
    def pt_to_numpy(images: Tensor) -> np.ndarray:
        """(b, c, h, w) to (b, h, w, c), float32 in main memory."""
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise InputTypeError(f"images: {came(images)} came; a tensor (b, c, h, w) would do")
        return images.detach().cpu().permute(0, 2, 3, 1).float().numpy()


def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
    """(b, h, w, c) or (h, w, c) in [0, 1] to pictures: RGB, or L where c is 1.

    Raises `InputError` for values outside [0, 1] and NaN, which have no colour.
    """
    if not isinstance(images, np.ndarray):
        raise InputTypeError(f"images: {type(images).__name__} came; an array (b, h, w, 3) would do")
    images = images[None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
        raise InputError(f"images: shape {images.shape} came; (b, h, w, 3) or (b, h, w, 1) would do")
    if images.dtype.kind != "f":
        raise InputTypeError(f"images: values of type {images.dtype} came; floats in [0, 1] would do")
    levels = (images * 255).round()
    check_uint8_range(float(levels.min()), float(levels.max()), images)
    return [array_to_pil(picture) for picture in levels.astype(np.uint8)]


def to_uint8(image: Tensor) -> Tensor:
    """(b, c, h, w) in [0, 1] to uint8, 0 to 255, where they lie. Raises `InputError` as `numpy_to_pil` does."""
    if image.shape[1] not in (1, 3) or not image.numel():
        raise InputError(f"images: shape {tuple(image.shape)} came; (b, 3, h, w) or (b, 1, h, w) would do")
    levels = (image.detach().float() * 255).round_()
    low, high = torch.stack(levels.aminmax()).tolist()
    check_uint8_range(low, high, image)
    return levels.to(torch.uint8)


def uint8_to_pil(levels: Tensor) -> list[Image.Image]:
    """(b, c, h, w) uint8 to pictures."""
    return [array_to_pil(picture) for picture in levels.permute(0, 2, 3, 1).cpu().contiguous().numpy()]


def check_uint8_range(low: float, high: float, images: np.ndarray | Tensor) -> None:
    if not (low >= 0 and high <= 255):  # nor is NaN
        raise InputError(f"images: values {images.min()}..{images.max()} came; [0, 1] would do")


def came(value: Any) -> str:
    """What came, in few words."""
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, (np.ndarray, Tensor)) else ""
    return type(value).__name__ + shape


def array_to_pil(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def _as_batch(image: np.ndarray | Tensor) -> Tensor:
    """An array (h w c), (b h w c), or a tensor (c h w), (b c h w), to a tensor b c h w."""
    if image.ndim not in (3, 4):
        raise InputError(f"image: shape {tuple(image.shape)} came; one picture has 3 axes, a batch 4")
    if isinstance(image, Tensor):
        check_has_data("image", image)
    if isinstance(image, np.ndarray) and image.dtype.kind not in "fiu":
        raise InputTypeError(f"image: values of type {image.dtype} came; floats in [0, 1] would do")
    image = image[None] if image.ndim == 3 else image
    return VaeImageProcessor.numpy_to_pt(image) if isinstance(image, np.ndarray) else image


def _check_range(x: Tensor) -> None:
    check_floating("image", x)
    if not x.isfinite().all() or x.max() > 1:
        raise InputError(f"image: values {x.min():.4g}..{x.max():.4g} came; [0, 1] would do")
