"""The job: a picture in, its variations out."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checks import check_int
from ..errors import InputError
from ..image import VaeImageProcessor
from ..kernels.packed_weights import PackedWeights
from ..noise import seed_generators
from ..oom import explain_out_of_memory
from ..outputs import StableDiffusionPipelineOutput
from ..runtime.guidance import ClassifierFreeGuidance, Predict, can_precompute
from ..runtime.precompute import Fingerprint
from ..weights.published_config import has_legacy_sample_size
from .arguments import check_approximate, check_arguments, check_numbers, check_seeds
from .components import (
    check_compatible,
    check_components,
    check_context,
    check_devices,
    check_timesteps,
    device_of,
    require_tensor,
    required_components,
)
from .steps import Steps, batch_size, dtype_of

MAX_IMAGES_PER_PROMPT = 2**16  # variations of a picture in one call


class StableDiffusionImageVariationPipeline(Steps):
    """Variations of a picture by Stable Diffusion that is told a CLIP image embedding instead of a text.

    `vae`, `image_encoder`, `unet`, `scheduler`, `safety_checker` (may be None, with a warning) and
    `feature_extractor`, which prepares pictures for the encoder and the checker.
    """

    def __init__(
        self,
        vae: Any,
        image_encoder: Any,
        unet: Any,
        scheduler: Any,
        safety_checker: Any,
        feature_extractor: Any,
        requires_safety_checker: bool = True,
    ):
        super().__init__()
        given = {
            "vae": vae,
            "image_encoder": image_encoder,
            "unet": unet,
            "scheduler": scheduler,
            "safety_checker": safety_checker,
            "feature_extractor": feature_extractor,
        }
        check_components(
            {name: part for name, part in given.items() if part is not None and name != "feature_extractor"}
        )
        if safety_checker is None and requires_safety_checker:
            warnings.warn(
                "safety_checker=None: nobody looks at the pictures before they are handed out; with "
                "requires_safety_checker=False this warning is off",
                stacklevel=2,
            )
        if safety_checker is not None and feature_extractor is None:
            raise InputError(
                "feature_extractor=None: the safety checker needs one; pass it, or safety_checker=None",
                key="feature_extractor",
            )
        if unet is not None and has_legacy_sample_size(unet.config):
            unet.register_to_config(sample_size=64)
        self.register_modules(**given)
        self.register_to_config(requires_safety_checker=requires_safety_checker)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[[int, Any, Tensor], Any] | None = None,
        callback_steps: int = 1,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        cache_interval: int = 1,
        *,
        seed: int | Sequence[int] | None = None,
        on_flagged: str = "black",
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
        with self.own_scheduler(), self._offload or contextlib.nullcontext(), explain_out_of_memory():
            check_components(parts := required_components(self.components, output_type))
            if not self._offload:
                check_devices(parts)
            image = image[None] if isinstance(image, Tensor) and image.ndim == 3 else image
            height, width = self.size(height, width)
            self.check_inputs(image, height, width, callback_steps)
            height, width, callback_steps = int(height), int(width), int(callback_steps)
            steps, scale, eta = check_numbers(num_inference_steps, guidance_scale, eta)
            n = 1 if num_images_per_prompt is None else num_images_per_prompt
            each = check_int("num_images_per_prompt", n, high=MAX_IMAGES_PER_PROMPT)
            shape = self.latents_shape(batch_size(image) * each, self.unet.config.in_channels, height, width)
            plain = can_precompute(self.unet)
            whole = plain and type(self).predictor is Steps.predictor  # nobody stands between the UNet and its latents
            check_compatible(self.components, output_type, whole)
            noise = latents if type(self).prepare_latents is Steps.prepare_latents else None  # else it is theirs to say
            seeds = check_arguments(generator, seed, noise, output_type, return_dict, callback, on_flagged, shape)
            interval, every = check_approximate(guidance_interval, cache_interval, plain)
            generator = seed_generators(seeds) if seeds else generator

            device = self._execution_device if "vae" in parts or self._offload else device_of(parts, self.device)
            guided = scale > 1
            scheduler, order = self.scheduler, getattr(self.scheduler, "order", 1)
            scheduler.set_timesteps(steps, device=device)
            check_timesteps(scheduler)
            options = self.prepare_extra_step_kwargs(generator, eta)
            check_seeds(seeds, latents, options)
            context = self._encode_image(image, device, each, guided)
            check_context(context, shape[0] * (2 if guided else 1), self.unet if whole else None)
            x = self.prepare_latents(*shape[:2], height, width, context.dtype, device, generator, latents)

            times = scheduler.timesteps  # of the walk; where they are numbers on the CPU no step waits for the device
            numbers = times.cpu() if isinstance(times, Tensor) else times

            def ready() -> Predict:
                make = partial(self.predictor, times, cache_interval=every, kept=PackedWeights(len(times)))
                return ClassifierFreeGuidance(make, context, scale, interval, len(times)) if guided else make(context)

            predict, watch = (
                ready(),
                Fingerprint(self.unet) if callback and isinstance(self.unet, torch.nn.Module) else None,
            )
            opening = len(times) - steps * order  # PNDM takes a few more
            with self.progress_bar(total=steps) as bar:
                for i, t in enumerate(numbers):
                    eps = predict(scheduler.scale_model_input(x, t), i)
                    x = require_tensor(scheduler, "scheduler", scheduler.step(eps, t, x, **options), "prev_sample").to(
                        x.dtype
                    )
                    if i == len(times) - 1 or (i >= opening and (i + 1) % order == 0):
                        bar.update()
                        if callback is not None and i % callback_steps == 0:
                            callback(i // order, times[i], x)
                            if watch and watch.changed(self.unet):
                                check_components(required_components(self.components, output_type))
                                context, x = (told.to(dtype_of(self.unet, told.dtype)) for told in (context, x))
                                predict, watch = ready(), Fingerprint(self.unet)

            del predict  # and what is kept for the UNet, before the autoencoder wants memory
            images, flags = self.finish(x, output_type, device, context.dtype, on_flagged, seeds)
        made = StableDiffusionPipelineOutput(images, flags, seeds=seeds, scores=getattr(flags, "scores", None))
        return made if return_dict else (images, flags)
