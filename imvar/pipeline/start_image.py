"""Where the denoising of a call starts, and what it keeps: image-to-image and inpainting.

`init_image` with `strength` is SDEdit (arXiv:2108.01073): the image is encoded, noised to the level of a later
timestep, and denoised from there. `mask_image` is Blended Latent Diffusion (arXiv:2206.02779): after each step the
latents outside the mask are replaced by those of the image, noised to the level of the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..checks import check_float, check_type
from ..errors import InputError, InputTypeError, describe, invalid, warn_user
from ..image import VaeImageProcessor
from ..image.mask import ACCEPTED_MASK, read_mask
from ..image.read import to_rgb, warn_about_orientation
from ..noise import randn
from .arguments import Call, check_latents, rename_argument
from .components import config_value

DEFAULT_STRENGTH, DEFAULT_INPAINTING_STRENGTH = 0.8, 1.0


def check_start(call: Call, vae: Any, vae_scale_factor: int) -> None:
    """Check the arguments of a call about its start, and convert them in place.

    `init_image` becomes pixels (k, 3, height, width) in [0, 1] or latents (k, 4, h, w), `mask_image` (k, 1, height,
    width) True where it is repainted, k being 1, b or b n; `strength` a float.
    """
    for name in ("strength", "mask_image"):
        if call.init_image is None and getattr(call, name) is not None:
            raise invalid(InputError, name, "an init_image with it", "none", "pass init_image, or leave it out")
    if check_type("paste", call.paste, bool) and call.mask_image is None:
        raise invalid(InputError, "paste", "False", "True without a mask_image", "pass the mask of what is repainted")
    if call.init_image is None:
        return

    default = DEFAULT_STRENGTH if call.mask_image is None else DEFAULT_INPAINTING_STRENGTH
    call.strength = check_float("strength", default if call.strength is None else call.strength)
    steps = int(call.num_inference_steps * call.strength)
    if not steps:
        expected = f"at least one of {call.num_inference_steps} steps"
        got = f"{call.strength:g}, which is {call.num_inference_steps * call.strength:g} steps"
        raise invalid(InputError, "strength", expected, got, "pass a larger one, or more num_inference_steps")
    call.skipped_steps = call.num_inference_steps - steps

    if encodes_start(call) and not hasattr(vae, "encode"):
        raise invalid(InputTypeError, "vae", "a component with encode, for init_image", describe(vae))
    if call.paste and (call.output_type == "latent" or not encodes_start(call)):
        got = "True with latents as " + ("output_type" if encodes_start(call) else "init_image")
        raise invalid(InputError, "paste", "False", got, "pixels are pasted into pixels")
    call.init_image = as_pixels_or_latents(call.init_image, call, config_value(vae, "in_channels", 3), vae_scale_factor)
    check_count("init_image", call.init_image, call)
    if call.mask_image is not None:
        call.mask_image = repaint_mask(call.mask_image, call.height, call.width)
        check_count("mask_image", call.mask_image, call)


def encodes_start(call: Call) -> bool:
    """Return whether a call starts from pixels, which the VAE encodes, and not from latents of 4 channels."""
    image = call.init_image
    first = image[0] if isinstance(image, (list, tuple)) and image else image
    is_latents = isinstance(first, Tensor) and first.ndim in (3, 4) and first.shape[-3] == 4
    return image is not None and not is_latents


def starts_from_noise(call: Call) -> bool:
    """Return whether the init_image has no effect: there is none, or strength is 1 without a mask."""
    return call.init_image is None or (not call.skipped_steps and call.mask_image is None)


def as_pixels_or_latents(image: Any, call: Call, channels: int, vae_scale_factor: int) -> Tensor:
    """Return an init_image as pixels (k, 3, height, width) in [0, 1], or latents (k, 4, h, w) unchanged."""
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    for i, element in enumerate(images):
        if isinstance(element, Image.Image):
            name = f"init_image[{i}]" if len(images) > 1 else "init_image"
            warn_about_orientation(name, element)
            images[i] = to_rgb(element, name)
    processor = VaeImageProcessor(vae_scale_factor=vae_scale_factor, do_normalize=False)
    with rename_argument("image", "init_image"):
        x = processor.preprocess(images, call.height, call.width)
    if not encodes_start(call):
        with rename_argument("latents", "init_image"):
            check_latents(x, (len(x), *call.shape[1:]))
        return x
    if x.shape[1] != channels:
        raise invalid(InputError, "init_image", f"{channels} channels, or a tensor of 4 as latents", describe(x))
    if x.min() < 0:  # as in diffusers
        if x.min() < -1:
            got = f"{float(x.min()):.4g} to {float(x.max()):.4g}"
            raise invalid(InputError, "init_image", "values in [0, 1]", got)
        warn_user("init_image: its values below 0 are taken as normalised to [-1, 1]; pass values in [0, 1]")
        x = VaeImageProcessor.denormalize(x)
    return x


def repaint_mask(mask: Any, height: int, width: int) -> Tensor:
    """Return a mask, or several, as (k, 1, height, width), True where a value is 0.5 or more."""
    masks = list(mask) if isinstance(mask, (list, tuple)) else [mask]
    if not masks:
        raise invalid(InputTypeError, "mask_image", f"{ACCEPTED_MASK}, or a list", f"an empty {type(mask).__name__}")
    names = [f"mask_image[{i}]" if len(masks) > 1 else "mask_image" for i in range(len(masks))]
    return torch.cat([masks_of_size(name, m, height, width) for name, m in zip(names, masks, strict=True)]) >= 0.5


def masks_of_size(name: str, mask: Any, height: int, width: int) -> Tensor:
    """Return one element of a list of masks as (k, 1, height, width) in [0, 1]."""
    return F.interpolate(read_mask(name, mask, (height, width)), (height, width)).cpu()


def check_count(name: str, x: Tensor, call: Call) -> None:
    """Check that there is one, or one for each image or each variation."""
    if len(x) not in (1, call.images, call.shape[0]):
        expected = f"one, or one for each of {call.images} images or of {call.shape[0]} variations"
        raise invalid(InputError, name, expected, describe(x))


def per_variation(x: Tensor, call: Call) -> Tensor:
    """Repeat (k, ...), one for all, for each image or for each variation, to (b n, ...)."""
    if len(x) == call.shape[0]:
        return x
    return x.expand(call.images, *x.shape[1:]).repeat_interleave(call.num_images_per_prompt, dim=0)


def draw_noise(
    shape: Sequence[int], generator: Any, latents: Tensor | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return standard normal noise, or `latents`, which have to be of this shape."""
    if latents is None:
        return randn(shape, generator, device=device, dtype=dtype)
    check_latents(latents, tuple(shape))
    latents = latents.to(device=device, dtype=dtype)
    check_latents(latents, tuple(shape))  # again, as they may overflow in this dtype
    return latents


@dataclass(frozen=True, eq=False, repr=False)
class Start:
    """The first latents of a call, and with a mask_image those that are kept in all of its `timesteps`.

    Where `repaint` (b n, 1, h, w) is False, those of the image are kept: `x0`, noised by `noise`, both (b n, 4, h, w).
    """

    latents: Tensor
    timesteps: Any = ()
    x0: Any = None
    noise: Any = None
    repaint: Tensor | None = None

    def replace_kept(self, scheduler: Any, x: Tensor, step: int) -> Tensor:
        """Return the latents after a step, the kept ones replaced by those of the image at the next noise level."""
        if self.repaint is None:
            return x
        last = step + 1 == len(self.timesteps)
        known = self.x0 if last else noised(scheduler, self.x0, self.noise, self.timesteps[step + 1])
        return torch.where(self.repaint, x, known.to(x))

    def replace_kept_in_x0(self, predicted_x0: Callable[[], Tensor]) -> Tensor:
        """Return the x_0 predicted in a step, the kept latents replaced by those of the image."""
        x0 = predicted_x0()
        return x0 if self.repaint is None else torch.where(self.repaint, x0, self.x0.to(x0))


def skip_steps(call: Call, scheduler: Any, timesteps: Any) -> Any:
    """Return the timesteps that are run of those of the scheduler, and let it start at the first of them."""
    if starts_from_noise(call):
        return timesteps
    first = call.skipped_steps * getattr(scheduler, "order", 1)
    if not len(timesteps[first:]):
        got = f"{call.strength:g} with the {len(timesteps)} timesteps of {describe(scheduler)}"
        raise invalid(InputError, "strength", "at least one step", got, "pass a larger one")
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return timesteps[first:]


def start_from(call: Call, scheduler: Any, timesteps: Any, x0: Tensor, noise: Tensor, latents: Tensor) -> Start:
    """Return the start of a call from an image: x0 (k, 4, h, w), noise and its scaled `latents` (b n, 4, h, w)."""
    if not hasattr(scheduler, "add_noise"):
        raise invalid(InputTypeError, "scheduler", "one with add_noise, for init_image", describe(scheduler))
    x0 = per_variation(x0, call).to(noise)
    if x0.shape != noise.shape:
        raise invalid(InputError, "init_image", f"latents of shape {tuple(noise.shape)}", describe(x0))
    if call.skipped_steps:
        latents = noised(scheduler, x0, noise, timesteps[0])
    repaint = None
    if call.mask_image is not None:
        mask = F.interpolate(call.mask_image.float(), tuple(x0.shape[2:]))
        repaint = per_variation(mask, call).to(x0.device) > 0
    return Start(latents, timesteps, x0, noise, repaint)


def noised(scheduler: Any, x0: Tensor, noise: Tensor, timestep: Any) -> Tensor:
    """Return x0 with the noise of a timestep, in its dtype."""
    return scheduler.add_noise(x0, noise, torch.as_tensor(timestep, device=x0.device).reshape(1)).to(x0.dtype)


def kept_pixels(call: Call) -> dict[str, Any]:
    """Return the further argument of `decode_and_judge` in a call that pastes."""
    return {"kept": KeptPixels(call)} if call.paste else {}


class KeptPixels:
    """Pixels of the init_image that are put back after decoding: where `repaint` (b n, 1, height, width) is False.

    `pixels`: (b n, 3, height, width) in [0, 1].
    """

    def __init__(self, call: Call):
        self.pixels = per_variation(call.init_image, call).float().to(call.device)
        self.repaint = per_variation(call.mask_image, call).to(call.device)

    def centred(self, images: Tensor) -> Tensor:
        """Return the pixels as those of decoded images (b n, 3, height, width) around [-1, 1]."""
        if self.pixels.shape != images.shape:
            raise invalid(InputError, "paste", f"decoded images {tuple(self.pixels.shape)}", describe(images))
        return VaeImageProcessor.normalize(self.pixels).to(images)

    def paste(self, images: Tensor) -> Tensor:
        """Put them into decoded images, for the safety checker, up to the rounding of the images' dtype."""
        return torch.where(self.repaint, images, self.centred(images))

    def paste_exactly(self, judged: Tensor, is_centred: Sequence[bool], images: Tensor) -> Tensor:
        """Put them into `images`, the judged ones in [0, 1], where the safety checker left what `paste` put."""
        left = (judged == self.centred(judged)) & torch.tensor(is_centred, device=judged.device)[:, None, None, None]
        return torch.where(left & ~self.repaint, self.pixels, images.float())
