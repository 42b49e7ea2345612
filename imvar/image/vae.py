"""`VaeImageProcessor`: between images and the VAE's (b, 3, h, w) in [-1, 1]."""

from __future__ import annotations

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
from ..errors import InputError, InputTypeError, describe, invalid, short_repr, warn_user
from .read import ACCEPTED, decode_pil

RESAMPLING = {name: Image.Resampling[name.upper()] for name in ("lanczos", "bicubic", "bilinear", "nearest")}


@dataclass(frozen=True, eq=False, repr=False)
class VaeImageProcessorConfig(Config):
    """`vae_scale_factor`: pixels per latent; `preprocess` rounds height and width down to a multiple of it."""

    do_resize: bool = one_of(True, False)
    vae_scale_factor: int = 8
    vae_latent_channels: int = 4
    resample: str = one_of(*RESAMPLING)
    reducing_gap: int | None = fixed(None)
    do_normalize: bool = one_of(True, False)
    do_binarize: bool = fixed(False)
    do_convert_rgb: bool = one_of(False, True)
    do_convert_grayscale: bool = fixed(False)

    def check(self) -> None:
        super().check()
        for name in ("vae_scale_factor", "vae_latent_channels"):
            check_int(name, getattr(self, name))


class VaeImageProcessor(Configured):
    """Images to VAE inputs and VAE outputs to images, equal to diffusers' class of this name."""

    config_class = VaeImageProcessorConfig

    def preprocess(self, image: Any, height: int | None = None, width: int | None = None) -> Tensor:
        """Return images as (b, 3, height, width) in [-1, 1], sizes rounded down to a multiple of `vae_scale_factor`.

        `image` is a PIL image, an array (h, w, c) or (b, h, w, c), a tensor (c, h, w) or (b, c, h, w), both in [0, 1],
        or a list of one kind. Height and width default to those of the first. PIL images are resized with `resample`,
        arrays and tensors by nearest neighbour. A tensor with as many channels as latents is returned unchanged;
        values below 0 are taken as already normalised.
        """
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        if images and all(isinstance(item, Image.Image) for item in images):
            x = self._preprocess_pil(images, height, width)
        elif images and all(isinstance(item, (np.ndarray, Tensor)) for item in images):
            batches = [_as_batch(item) for item in images]
            if len(shapes := {tuple(x.shape[1:]) for x in batches}) > 1:
                raise invalid(InputError, "image", "one shape (c, h, w)", f"shapes {sorted(shapes)}")
            x = torch.cat(batches)
            if x.shape[1] == self.config.vae_latent_channels and isinstance(images[0], Tensor):
                return x
            check_floating("image", x, ACCEPTED)
            if not x.isfinite().all() or x.max() > 1:
                raise invalid(InputError, "image", "values in [0, 1]", f"{x.min():.4g} to {x.max():.4g}")
            if self.config.do_resize:
                x = F.interpolate(x, size=self.get_default_height_width(x, height, width))
        else:
            kinds = sorted({type(item).__name__ for item in images}) or [f"an empty {type(image).__name__}"]
            raise invalid(InputTypeError, "image", ACCEPTED, ", ".join(kinds))
        if not self.config.do_normalize or x.min() >= 0:
            return self.normalize(x) if self.config.do_normalize else x
        warn_user("image: expected values in [0, 1], got values below 0, which are taken as normalised to [-1, 1]")
        return x

    def _preprocess_pil(self, images: list[Image.Image], height: int | None, width: int | None) -> Tensor:
        for i, item in enumerate(images):
            decode_pil(item, f"image[{i}]")
            if item.mode not in ("RGB", "L") and not self.config.do_convert_rgb:
                hint = "pass do_convert_rgb=True"
                raise invalid(InputError, f"image[{i}]", "mode RGB or L", f"mode {item.mode}", hint)
        if self.config.do_convert_rgb:
            images = [item.convert("RGB") for item in images]
        if self.config.do_resize:
            height, width = self.get_default_height_width(images[0], height, width)
            images = [item.resize((width, height), RESAMPLING[self.config.resample]) for item in images]
        return self.numpy_to_pt(self.pil_to_numpy(images))

    def get_default_height_width(
        self, image: Image.Image | np.ndarray | Tensor, height: int | None = None, width: int | None = None
    ) -> tuple[int, int]:
        """Return height and width, by default the image's, rounded down to a multiple of `vae_scale_factor`."""
        if isinstance(image, Image.Image):
            defaults = image.height, image.width
        else:
            defaults = tuple(image.shape[1:3] if isinstance(image, np.ndarray) else image.shape[2:4])
        factor, sizes = self.config.vae_scale_factor, []
        for name, value, default in zip(("height", "width"), (height, width), defaults, strict=True):
            size = check_int(name, default if value is None else value, low=factor, high=MAX_SIDE)
            sizes.append(size - size % factor)
        return sizes[0], sizes[1]

    def postprocess(self, image: Tensor, output_type: str = "pil", do_denormalize: Sequence[bool] | None = None) -> Any:
        """Convert (b, c, h, w) in [-1, 1] to `output_type`.

        "pil": a list of PIL images; "np": (b, h, w, c) float32 in [0, 1]; "pt": a tensor in [0, 1]; "latent": the
        tensor unchanged. `do_denormalize`: one flag per image, False if its values are already in [0, 1]. Raises
        `InputError` for values that are not finite or out of range.
        """
        if not isinstance(output_type, str) or output_type not in ("pil", "np", "pt", "latent"):
            raise invalid(InputError, "output_type", "'pil', 'np', 'pt' or 'latent'", short_repr(output_type))
        if not isinstance(image, Tensor):
            raise invalid(InputTypeError, "image", "a tensor (b, c, h, w)", describe(image))
        check_has_data("image", image)
        if output_type == "latent":
            return image
        if image.ndim != 4:
            raise invalid(InputError, "image", "a tensor (b, c, h, w)", describe(image))
        check_floating("image", image, "a tensor (b, c, h, w)")
        if not image.isfinite().all():
            raise invalid(InputError, "image", "finite values", "NaN or infinite values")
        flags = [self.config.do_normalize] * len(image) if do_denormalize is None else do_denormalize
        flags = flags.tolist() if isinstance(flags, (np.ndarray, Tensor)) else flags
        if not isinstance(flags, (list, tuple)) or len(flags) != len(image):
            expected = f"a list of {len(image)} flags, one per image"
            raise invalid(InputError, "do_denormalize", expected, short_repr(do_denormalize))
        if all(flags):
            image = self.denormalize(image)
        elif any(flags):
            image = torch.stack([self.denormalize(x) if flag else x for x, flag in zip(image, flags, strict=True)])
        if output_type == "pt":
            return image
        if output_type == "np":
            return self.pt_to_numpy(image)
        return uint8_to_pil(to_uint8(image).permute(0, 2, 3, 1).cpu().contiguous().numpy())

    @staticmethod
    def normalize(images: Any) -> Any:
        """Map [0, 1] to [-1, 1]."""
        return 2.0 * images - 1.0

    @staticmethod
    def denormalize(images: Tensor) -> Tensor:
        """Map [-1, 1] to [0, 1] and clamp."""
        return (images * 0.5 + 0.5).clamp(0, 1)

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
        """Convert (b, h, w, c) or (h, w, c) in [0, 1] to PIL images, RGB for 3 channels, L for 1.

        Raises `InputError` for values outside [0, 1] and NaN.
        """
        if not isinstance(images, np.ndarray):
            raise invalid(InputTypeError, "images", "an array (b, h, w, 3)", describe(images))
        images = images[None] if images.ndim == 3 else images
        if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
            raise invalid(InputError, "images", "an array (b, h, w, 3) or (b, h, w, 1)", describe(images))
        if images.dtype.kind != "f":
            raise invalid(InputTypeError, "images", "floats in [0, 1]", f"values of {images.dtype}")
        x = (images * 255).round()
        check_uint8_range(float(x.min()), float(x.max()), images)
        return uint8_to_pil(x.astype(np.uint8))

    @staticmethod
    def pil_to_numpy(images: Image.Image | Sequence[Image.Image]) -> np.ndarray:
        """Convert images of one size to (b, h, w, 3), grey ones to (b, h, w): float32 in [0, 1]."""
        batch = [images] if isinstance(images, Image.Image) else images
        if not isinstance(batch, (list, tuple)) or not all(isinstance(image, Image.Image) for image in batch):
            raise invalid(InputTypeError, "images", "a PIL image or a list of them", describe(images))
        if len(sizes := {image.size for image in batch}) != 1:
            raise invalid(InputError, "images", "images of one size", f"sizes {sorted(sizes)} (w, h)")
        return np.stack([np.asarray(image).astype(np.float32) / 255 for image in batch])

    @staticmethod
    def numpy_to_pt(images: np.ndarray) -> Tensor:
        """Convert (b, h, w, c) or (b, h, w) to (b, c, h, w)."""
        if not isinstance(images, np.ndarray) or images.ndim not in (3, 4):
            raise invalid(InputTypeError, "images", "an array (b, h, w, c)", describe(images))
        images = (images[..., None] if images.ndim == 3 else images).transpose(0, 3, 1, 2)
        return torch.from_numpy(np.ascontiguousarray(images, dtype=images.dtype.newbyteorder("=")))

    @staticmethod
    def pt_to_numpy(images: Tensor) -> np.ndarray:
        """Convert (b, c, h, w) to (b, h, w, c), float32 on the CPU."""
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise invalid(InputTypeError, "images", "a tensor (b, c, h, w)", describe(images))
        return images.detach().cpu().permute(0, 2, 3, 1).float().numpy()


numpy_to_pil = VaeImageProcessor.numpy_to_pil


def to_uint8(image: Tensor) -> Tensor:
    """Convert (b, c, h, w) in [0, 1] to uint8 on the same device. Raises `InputError` as `numpy_to_pil` does."""
    if image.shape[1] not in (1, 3) or not image.numel():
        raise invalid(InputError, "images", "a tensor (b, 3, h, w) or (b, 1, h, w)", describe(image))
    x = (image.detach().float() * 255).round_()
    low, high = torch.stack(x.aminmax()).tolist()
    check_uint8_range(low, high, image)
    return x.to(torch.uint8)


def uint8_to_pil(images: np.ndarray) -> list[Image.Image]:
    """Convert (b, h, w, 3) or (b, h, w, 1) uint8 to PIL images."""
    return [Image.fromarray(pixels) for pixels in (images.squeeze(-1) if images.shape[-1] == 1 else images)]


def check_uint8_range(low: float, high: float, images: np.ndarray | Tensor) -> None:
    """Check that the extremes of `images`, times 255 and rounded, are in 0..255; NaN is not."""
    if not (low >= 0 and high <= 255):
        raise invalid(InputError, "images", "values in [0, 1]", f"{images.min()} to {images.max()}")


def _as_batch(image: np.ndarray | Tensor) -> Tensor:
    """Convert an array (h w c) or (b h w c), or a tensor (c h w) or (b c h w), to a tensor b c h w."""
    if image.ndim not in (3, 4) or 0 in image.shape:
        raise invalid(InputError, "image", "3 axes for one image or 4 for a batch, none empty", describe(image))
    if isinstance(image, Tensor):
        check_has_data("image", image)
    elif image.dtype.kind not in "fiu":
        raise invalid(InputTypeError, "image", "floats in [0, 1]", f"values of {image.dtype}")
    image = image[None] if image.ndim == 3 else image
    return VaeImageProcessor.numpy_to_pt(image) if isinstance(image, np.ndarray) else image
