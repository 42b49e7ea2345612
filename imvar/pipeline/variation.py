"""The job: a picture in, its variations out."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import count, real
from ..errors import InputError
from ..image import CLIPImageProcessor, VaeImageProcessor, to_levels
from ..memory import naming_what_needs_less
from ..models.kept import Kept
from ..models.prepared import Watch
from ..models.told import untouched
from ..noise import randn, seeded
from ..outputs import StableDiffusionPipelineOutput
from ..weights.published import taken_as_64
from .assembly import Assembly
from .checks import (
    check_approximate,
    check_call,
    check_devices,
    check_finite,
    check_inputs,
    check_latents,
    check_numbers,
    check_parts,
    check_seeds,
)
from .flagged import treated
from .guidance import Guided, Predict, predictor, preparable

AT_A_TIME = 2**18  # pixels that are decoded at a time: those of 512 x 512
MOST = 2**16  # variations of a picture in one call


class StableDiffusionImageVariationPipeline(Assembly):
    """Variations of a picture by Stable Diffusion that is told a CLIP image embedding instead of a text.

    `vae`, `image_encoder`, `unet`, `scheduler`, `safety_checker` (may be None, with a warning) and
    `feature_extractor`, which prepares pictures for the encoder and the checker.
    """

    image_encoder: Any
    safety_checker: Any
    feature_extractor: Any

    def __init__(self, vae: Any, image_encoder: Any, unet: Any, scheduler: Any, safety_checker: Any,
                 feature_extractor: Any, requires_safety_checker: bool = True):
        super().__init__()
        given = {"vae": vae, "image_encoder": image_encoder, "unet": unet, "scheduler": scheduler,
                 "safety_checker": safety_checker, "feature_extractor": feature_extractor}
        check_parts({name: part for name, part in given.items() if part is not None and name != "feature_extractor"})
        if safety_checker is None and requires_safety_checker:
            warnings.warn("safety_checker=None: nobody looks at the pictures before they are handed out; with "
                          "requires_safety_checker=False this warning is off", stacklevel=2)
        if safety_checker is not None and feature_extractor is None:
            raise InputError("feature_extractor=None: the safety checker needs one; pass it, or safety_checker=None",
                             key="feature_extractor")
        if unet is not None and taken_as_64(unet.config):
            unet.register_to_config(sample_size=64)
        self.register_modules(**given)
        self.register_to_config(requires_safety_checker=requires_safety_checker)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    def __call__(
        self, image: Any, height: int | None = None, width: int | None = None, num_inference_steps: int = 50,
        guidance_scale: float = 7.5, num_images_per_prompt: int | None = 1, eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None, latents: Tensor | None = None,
        output_type: str = "pil", return_dict: bool = True,
        callback: Callable[[int, Any, Tensor], Any] | None = None, callback_steps: int = 1,
        guidance_interval: tuple[float, float] = (0.0, 1.0), cache_interval: int = 1, *,
        seed: int | Sequence[int] | None = None, on_flagged: str = "black",
    ) -> StableDiffusionPipelineOutput | tuple[Any, list[bool] | None]:
        """Make variations of one picture or of several.

        Args:
            image: a PIL picture, a list of b of them, or a tensor (b, 3, h, w) or (3, h, w) that is already
                normalised and of the encoder's size, as `feature_extractor` makes it.
            height, width: of the variations in pixels, multiples of 8; by default the size the UNet was trained at.
            num_inference_steps: how many steps of denoising.
            guidance_scale: w of arXiv:2207.12598, equation 6 (as 1 + w); up to 1 there is no guidance. The
                published model's card suggests 3.
            num_images_per_prompt: n variations of each picture, in the order a a b b.
            eta: 0 to 1, the share of fresh noise in each step of DDIM (arXiv:2010.02502, equation 16); PNDM and LMS
                ignore it.
            generator: source of the noise; one for all, or a list of one per variation. Noise is drawn on its device.
            seed: in place of a generator: s for s + k in variation k, or a list of one each, 0 to 2^63 - 1. A seed's
                variation is the same whatever is made beside it, to rounding, and its noise the same on any device.
            latents: (b n, 4, height / 8, width / 8) standard normal noise to start from instead of a drawn one.
            output_type: "pil"; "np", (b n, height, width, 3) in [0, 1]; "pt", (b n, 3, height, width) in [0, 1];
                "latent", undecoded and unchecked.
            return_dict: False for a tuple of pictures and flags.
            callback: called as callback(i, t, latents) after the steps i that `callback_steps` divides; under PNDM
                not after its opening ones.
            guidance_interval: approximate, for speed: guidance in the steps from this share of all of them, 0 to 1,
                up to that; a step without takes half the time (arXiv:2404.07724).
            cache_interval: approximate, for speed: the whole UNet in every so many-th step alone, and in the others
                its last layer (arXiv:2312.00858).
            on_flagged: what becomes of a picture that the safety checker flags: "black"; "blur", the colours of 8 x 8
                cells; "keep"; or "raise" a `FlaggedError`.

        Returns:
            `images`, and `nsfw_content_detected`, a flag each, or None where no checker looked; by attribute alone
            `seeds`, and `scores`, what the checker measured.

        Raises:
            InputError: an argument that cannot do what was asked, by its name, before the first step.
            OutOfMemoryError: what would need less. ImvarError: a result that is not finite, and the likely cause.
        """
        with self.own_scheduler(), self._offload or contextlib.nullcontext(), naming_what_needs_less():
            check_parts(self.components)
            if not self._offload:
                check_devices(self.components)
            image = image[None] if isinstance(image, Tensor) and image.ndim == 3 else image
            height, width = self.size(height, width)
            self.check_inputs(image, height, width, callback_steps)
            height, width, callback_steps = int(height), int(width), int(callback_steps)
            steps, scale, eta = check_numbers(num_inference_steps, guidance_scale, eta)
            n = 1 if num_images_per_prompt is None else num_images_per_prompt
            each = count("num_images_per_prompt", n, high=MOST)
            shape = self.latents_shape(how_many(image) * each, self.unet.config.in_channels, height, width)
            seeds = check_call(generator, seed, latents, output_type, return_dict, callback, on_flagged, shape)
            interval, every = check_approximate(guidance_interval, cache_interval, preparable(self.unet))
            generator = seeded(seeds) if seeds else generator

            device, guided = self._execution_device, scale > 1
            scheduler, order = self.scheduler, getattr(self.scheduler, "order", 1)
            scheduler.set_timesteps(steps, device=device)
            options = self.prepare_extra_step_kwargs(generator, eta)
            check_seeds(seeds, latents, options)
            context = self._encode_image(image, device, each, guided)
            x = self.prepare_latents(*shape[:2], height, width, context.dtype, device, generator, latents)

            times = scheduler.timesteps  # of the walk; where they are numbers on the CPU no step waits for the device
            numbers = times.cpu() if isinstance(times, Tensor) else times

            def ready() -> Predict:
                make = partial(self.predictor, times, cache_interval=every, kept=Kept(len(times)))
                return Guided(make, context, scale, interval, len(times)) if guided else make(context)

            predict, watch = ready(), Watch(self.unet) if callback and isinstance(self.unet, torch.nn.Module) else None
            opening = len(times) - steps * order  # PNDM takes a few more
            with self.progress_bar(total=steps) as bar:
                for i, t in enumerate(numbers):
                    eps = predict(scheduler.scale_model_input(x, t), i)
                    x = scheduler.step(eps, t, x, **options).prev_sample
                    if i == len(times) - 1 or (i >= opening and (i + 1) % order == 0):
                        bar.update()
                        if callback is not None and i % callback_steps == 0:
                            callback(i // order, times[i], x)
                            if watch and watch.changed(self.unet):
                                predict, watch = ready(), Watch(self.unet)

            del predict  # and what is kept for the UNet, before the autoencoder wants memory
            images, flags = self.finish(x, output_type, device, context.dtype, on_flagged, seeds)
        made = StableDiffusionPipelineOutput(images, flags, seeds=seeds, scores=getattr(flags, "scores", None))
        return made if return_dict else (images, flags)

    # The steps of a call, in their order. Subclasses may override them.

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

    def _encode_image(self, image: Any, device: torch.device, num_images_per_prompt: int,
                      do_classifier_free_guidance: bool) -> Tensor:
        """The context that the UNet is told: (b n, 1, 768), under guidance (2 b n, 1, 768) with zeros first."""
        if not isinstance(image, Tensor):
            if self.feature_extractor is None:
                raise InputError("feature_extractor=None: pictures need one, a CLIPImageProcessor would do; or a "
                                 "tensor of preprocessed pixels as `image`", key="feature_extractor")
            image = self.feature_extractor(images=image, return_tensors="pt").pixel_values
        dtype = dtype_of(self.image_encoder, torch.float32)
        embeds = self.image_encoder(image.to(device=device, dtype=dtype)).image_embeds
        check_finite("the image embeddings", embeds, self.image_encoder, "pixels too large")
        context = embeds[:, None].repeat_interleave(num_images_per_prompt, dim=0)  # b c -> bn 1 c
        context = context.to(dtype_of(self.unet, dtype))
        return torch.cat([torch.zeros_like(context), context]) if do_classifier_free_guidance else context

    def prepare_latents(self, batch_size: int, num_channels_latents: int, height: int, width: int, dtype: torch.dtype,
                        device: torch.device, generator: Any, latents: Tensor | None = None) -> Tensor:
        """Noise to start from, (b, c, height / 8, width / 8), scaled as the scheduler wants it."""
        shape = self.latents_shape(batch_size, num_channels_latents, height, width)
        if latents is None:
            latents = randn(shape, generator, device=device, dtype=dtype)
        else:
            check_latents(latents, shape)
            latents = latents.to(device=device, dtype=dtype)
            check_latents(latents, shape)  # which may be too large for this dtype
        return latents * self.scheduler.init_noise_sigma

    def predictor(self, timesteps: Any, context: Tensor, cache_interval: int = 1, kept: Kept | None = None) -> Predict:
        """The UNet as a function of scaled latents (b n, 4, h, w) and a step's number: a prediction per context."""
        return predictor(self.unet, timesteps, context, cache_interval, self.runner, kept)

    def prepare_extra_step_kwargs(self, generator: Any, eta: float) -> dict[str, Any]:
        """Which of `eta` and `generator` this scheduler's step takes."""
        takes = inspect.signature(self.scheduler.step).parameters
        if "eta" in takes:
            real("eta", eta)
        return {name: value for name, value in (("eta", eta), ("generator", generator)) if name in takes}

    def finish(self, latents: Tensor, output_type: str, device: torch.device, dtype: torch.dtype,
               on_flagged: str = "black", seeds: list[int] | None = None) -> tuple[Any, list[bool] | None]:
        """Decode, judge, hand over."""
        check_finite("the latents after the last step", latents, self.unet, "a guidance_scale too large",
                     "latents too large")
        if output_type == "latent":
            return latents, None
        pixels = self.decode_finite(latents)
        checked, flags = self.run_safety_checker(pixels if on_flagged == "black" else pixels.clone(), device, dtype)
        pixels = treated(pixels, checked, flags or [], on_flagged, seeds)
        black = flags if flags and on_flagged == "black" else [False] * len(pixels)  # which 0 in [-1, 1] is not
        images = self.image_processor.postprocess(pixels, output_type, do_denormalize=[not flag for flag in black])
        return images, flags

    def decode_finite(self, latents: Tensor) -> Tensor:
        """`decode`, and once more in float32 where float16 overflowed. Raises `ImvarError` where that does not help."""
        pixels = self.decode(latents)
        if latents.dtype == torch.float16 and not pixels.isfinite().all():
            warnings.warn("vae: float16 overflowed, so these latents are decoded again, in float32; a vae in float32 "
                          "or bfloat16 would spare that", stacklevel=5)
            wide = copy.copy(self)
            wide.vae, wide._compiler = copy.deepcopy(self.vae).float(), None
            pixels = wide.decode(latents.float()).to(latents.dtype)
        check_finite("the decoded pictures", pixels, self.vae)
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b, 4, h, w) to pictures (b, 3, 8h, 8w) around [-1, 1].

        Large ones one after another, lest it takes more memory than all before; who watches layers sees all at once.
        """
        latents = (latents / self.vae.config.scaling_factor).to(dtype_of(self.vae, latents.dtype))
        run = self.runner(decode, self.vae)
        pixels = latents.shape[2] * latents.shape[3] * self.vae_scale_factor**2
        at_a_time = max(AT_A_TIME // pixels, 1) if untouched(self.vae) else len(latents)
        made = [run(part) for part in latents.split(at_a_time)]
        return made[0] if len(made) == 1 else torch.cat(made)

    def run_safety_checker(self, image: Any, device: torch.device, dtype: torch.dtype,
                           ) -> tuple[Any, list[bool] | None]:
        """Pictures (b, 3, h, w) around [-1, 1], or an array (b, h, w, 3) in [0, 1], flagged ones zero; and flags."""
        if self.safety_checker is None:
            return image, None
        if isinstance(image, Tensor) and isinstance(self.feature_extractor, CLIPImageProcessor):
            seen = self.feature_extractor.of_levels(to_levels(self.image_processor.denormalize(image)))
        else:
            array = isinstance(image, np.ndarray)
            pictures = self.numpy_to_pil(image) if array else self.image_processor.postprocess(image)
            seen = self.feature_extractor(pictures, return_tensors="pt").pixel_values
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


def how_many(image: Any) -> int:
    return len(image) if isinstance(image, (list, tuple, Tensor)) else 1
