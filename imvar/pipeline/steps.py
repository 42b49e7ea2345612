"""The steps of a call, in their order."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check_float
from ..errors import InputError, InputTypeError
from ..image import CLIPImageProcessor, VaeImageProcessor, to_uint8
from ..kernels.packed_weights import PackedWeights
from ..models.stock import is_unmodified
from ..noise import randn
from ..runtime.guidance import Predict, make_predictor
from .arguments import check_all_finite, check_inputs, check_latents, rename_argument
from .base import PipelineBase
from .components import require_tensor
from .safety_policy import apply_flag_policy, parse_checker_output

MAX_DECODE_PIXELS = 2**18  # pixels that are decoded at a time: those of 512 x 512


class Steps(PipelineBase):
    """What a call of the pipeline does one after another. Subclasses may override each."""

    image_encoder: Any
    safety_checker: Any
    feature_extractor: Any
    vae_scale_factor: int
    image_processor: VaeImageProcessor

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels, by default those that the UNet was trained at."""
        own = self.unet.config.sample_size
        if own is not None:
            rows, columns = own if isinstance(own, (list, tuple)) else (own, own)
            height = rows * self.vae_scale_factor if height is None else height
            width = columns * self.vae_scale_factor if width is None else width
        if height is None or width is None:
            raise InputError("height, width: this UNet's config has no sample_size to take them from; give both")
        return height, width

    def latents_shape(self, batch: int, channels: int, height: int, width: int) -> tuple[int, int, int, int]:
        return batch, channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    def check_inputs(self, image: Any, height: int, width: int, callback_steps: int) -> None:
        """Raise `InputError` for a picture, size or interval that cannot be used."""
        check_inputs(image, height, width, callback_steps, factor=max(8, self.vae_scale_factor))

    def _encode_image(
        self, image: Any, device: torch.device, num_images_per_prompt: int, do_classifier_free_guidance: bool
    ) -> Tensor:
        """The context that the UNet is told: (b n, 1, 768), under guidance (2 b n, 1, 768) with zeros first."""
        if not isinstance(image, Tensor):
            if self.feature_extractor is None:
                raise InputError(
                    "feature_extractor=None: pictures need one, a CLIPImageProcessor would do; or a "
                    "tensor of preprocessed pixels as `image`",
                    key="feature_extractor",
                )
            with rename_argument("images", "image"):  # as it is called here
                features = self.feature_extractor(images=image, return_tensors="pt")
            image = require_tensor(self.feature_extractor, "feature_extractor", features, "pixel_values")
        dtype = dtype_of(self.image_encoder, torch.float32)
        with rename_argument("pixel_values", "image"):
            output = self.image_encoder(image.to(device=device, dtype=dtype))
        embeds = require_tensor(self.image_encoder, "image_encoder", output, "image_embeds")
        check_all_finite("the image embeddings", embeds, self.image_encoder, "pixels too large")
        context = embeds[:, None].repeat_interleave(num_images_per_prompt, dim=0)  # b c -> bn 1 c
        context = context.to(dtype_of(self.unet, dtype))
        return torch.cat([torch.zeros_like(context), context]) if do_classifier_free_guidance else context

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: Any,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Noise to start from, (b, c, height / 8, width / 8), scaled as the scheduler wants it."""
        shape = self.latents_shape(batch_size, num_channels_latents, height, width)
        if latents is None:
            latents = randn(shape, generator, device=device, dtype=dtype)
        else:
            check_latents(latents, shape)
            latents = latents.to(device=device, dtype=dtype)
            check_latents(latents, shape)  # which may be too large for this dtype
        return latents * self.scheduler.init_noise_sigma

    def predictor(
        self, timesteps: Any, context: Tensor, cache_interval: int = 1, kept: PackedWeights | None = None
    ) -> Predict:
        """The UNet as a function of scaled latents (b n, 4, h, w) and a step's number: a prediction per context."""
        return make_predictor(self.unet, timesteps, context, cache_interval, self.runner, kept)

    def prepare_extra_step_kwargs(self, generator: Any, eta: float) -> dict[str, Any]:
        """Which of `eta` and `generator` this scheduler's step takes."""
        takes = inspect.signature(self.scheduler.step).parameters
        if "eta" in takes:
            check_float("eta", eta)
        return {name: value for name, value in (("eta", eta), ("generator", generator)) if name in takes}

    def finish(
        self,
        latents: Tensor,
        output_type: str,
        device: torch.device,
        dtype: torch.dtype,
        on_flagged: str = "black",
        seeds: list[int] | None = None,
    ) -> tuple[Any, list[bool] | None]:
        """Decode, judge, hand over."""
        check_all_finite(
            "the latents after the last step", latents, self.unet, "a guidance_scale too large", "latents too large"
        )
        if output_type == "latent":
            return latents, None
        pixels = self.decode_finite(latents)
        checked, flags = parse_checker_output(self.run_safety_checker(pixels.clone(), device, dtype), pixels)
        pixels = apply_flag_policy(pixels, checked, flags or [], on_flagged, seeds)
        black = flags if flags and on_flagged == "black" else [False] * len(pixels)  # which 0 in [-1, 1] is not
        images = self.image_processor.postprocess(pixels, output_type, do_denormalize=[not flag for flag in black])
        return images, flags

    def decode_finite(self, latents: Tensor) -> Tensor:
        """`decode`, and once more in float32 where float16 overflowed. Raises `ImvarError` where that does not help."""
        pixels = self.decode(latents)
        if not isinstance(pixels, Tensor):
            raise InputTypeError(f"decode: it returned {type(pixels).__name__}; a tensor of pictures would do")
        if latents.dtype == torch.float16 and not pixels.isfinite().all():
            warnings.warn(
                "vae: float16 overflowed, so these latents are decoded again, in float32; a vae in float32 "
                "or bfloat16 would spare that",
                stacklevel=5,
            )
            wide = copy.copy(self)
            wide.vae, wide._compiler = copy.deepcopy(self.vae).float(), None
            pixels = wide.decode(latents.float()).to(latents.dtype)
        check_all_finite("the decoded pictures", pixels, self.vae)
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b, 4, h, w) to pictures (b, 3, 8h, 8w) around [-1, 1].

        Large ones one after another, lest it takes more memory than all before; who watches layers sees all at once.
        """
        latents = (latents / self.vae.config.scaling_factor).to(dtype_of(self.vae, latents.dtype))
        run = self.runner(decode, self.vae)
        pixels = latents.shape[2] * latents.shape[3] * self.vae_scale_factor**2
        plain = is_unmodified(self.vae)
        at_a_time = max(MAX_DECODE_PIXELS // pixels, 1) if plain else len(latents)
        made = [run(part) for part in latents.split(at_a_time)]
        pictures = made[0] if len(made) == 1 else torch.cat(made)
        due = tuple(side * self.vae_scale_factor for side in latents.shape[2:])
        if plain and pictures.shape[2:] != due:
            raise InputError(
                f"vae: it made pictures of {tuple(pictures.shape[2:])}, where {due} were due; one that "
                f"makes {self.vae_scale_factor} pixels of a latent would do",
                key="vae",
            )
        return pictures

    def run_safety_checker(
        self,
        image: Any,
        device: torch.device,
        dtype: torch.dtype,
    ) -> tuple[Any, list[bool] | None]:
        """Pictures (b, 3, h, w) around [-1, 1], or an array (b, h, w, 3) in [0, 1], flagged ones zero; and flags."""
        if self.safety_checker is None:
            return image, None
        if isinstance(image, Tensor) and isinstance(self.feature_extractor, CLIPImageProcessor):
            seen = self.feature_extractor.preprocess_uint8(to_uint8(self.image_processor.denormalize(image)))
        else:
            array = isinstance(image, np.ndarray)
            pictures = self.numpy_to_pil(image) if array else self.image_processor.postprocess(image)
            features = self.feature_extractor(pictures, return_tensors="pt")
            seen = require_tensor(self.feature_extractor, "feature_extractor", features, "pixel_values")
        seen = seen.to(device=device, dtype=dtype_of(self.safety_checker, dtype))
        return self.safety_checker(images=image, clip_input=seen)

    def decode_latents(self, latents: Tensor) -> np.ndarray:
        """Latents to an array (b, h, w, 3) in [0, 1]: a step of older pipelines, kept for code that calls it."""
        return self.image_processor.postprocess(self.decode(latents), "np")


def decode(vae: Any, latents: Tensor) -> Tensor:
    return vae.decode(latents, return_dict=False)[0]


def dtype_of(part: Any, default: torch.dtype) -> torch.dtype:
    """What the weights of a part are, so that parts of several dtypes go together; `default` where it has none."""
    parameters = part.parameters() if isinstance(part, torch.nn.Module) else ()
    return next((p.dtype for p in parameters if p.is_floating_point()), default)


def batch_size(image: Any) -> int:
    return len(image) if isinstance(image, (list, tuple, Tensor)) else 1
