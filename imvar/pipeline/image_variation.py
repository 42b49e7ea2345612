"""The image variation pipeline: its call, and the stages of a call in their order."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Unpack, overload

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from ..checks import check_float, check_tensor, takes_argument
from ..embeddings import cast_embeds
from ..errors import ImvarError, InputError, InputTypeError, describe, invalid, warn_user
from ..image import CLIPImageProcessor, VaeImageProcessor, to_uint8
from ..image.pixel_values import PREPROCESS, pixel_format, to_pixel_values
from ..malloc import return_freed_memory
from ..models import (
    AutoencoderKL,
    CLIPVisionModelWithProjection,
    StableDiffusionSafetyChecker,
    UNet2DConditionModel,
)
from ..models.ops import PackedWeights
from ..models.regions import RegionLayout, check_scales
from ..models.stock import is_unmodified
from ..oom import explain_out_of_memory
from ..records.record import Record
from ..runtime.denoiser import Denoiser, can_precompute, check_takes_regions, dtype_of, make_predictor
from ..runtime.guidance import Predict
from ..weights.published_config import has_legacy_sample_size
from .arguments import (
    Call,
    check_images,
    check_latents,
    check_option,
    check_size_and_interval,
    rename_argument,
)
from .base import PipelineBase
from .call_options import AnyOptions, OutputOptions, TupleOptions
from .callbacks import TENSOR_INPUTS, changed_tensors, check_callback_effects, refuse_new_guidance_scale, step_tensor
from .components import (
    Component,
    FeatureExtractorLike,
    ImageEncoderLike,
    SafetyCheckerLike,
    SchedulerLike,
    UNetLike,
    VAELike,
    check_compatible,
    check_components,
    check_context,
    check_devices,
    check_feature_extractor,
    check_step,
    check_timesteps,
    device_of,
    require_tensor,
    required_components,
)
from .conditions import conditions_by_stage
from .inputs import note_photos
from .output import StableDiffusionPipelineOutput
from .preview import fit_to_random_latents, linear_decode, state_of_weights
from .records import call_records
from .regions import Region
from .safety_policy import judge
from .start_image import (
    KeptPixels,
    Start,
    check_start,
    draw_noise,
    encodes_start,
    kept_pixels,
    skip_steps,
    start_from,
    starts_from_noise,
)
from .steps import take_step

MIN_LATENTS_TO_TRIM = 2**10  # of an image, from which freed memory is returned to the system before it is decoded
MAX_DECODE_PIXELS = 2**18  # pixels that are decoded at a time: those of 512 x 512


class StableDiffusionImageVariationPipeline(PipelineBase):
    """Variations of images by Stable Diffusion with a CLIP image embedding in place of a text.

    Components: `vae`, `image_encoder`, `unet`, `scheduler`, `safety_checker` (None is allowed, with a warning) and
    `feature_extractor`, which preprocesses images for the encoder and the checker.
    """

    vae: Component[AutoencoderKL, VAELike]
    image_encoder: Component[CLIPVisionModelWithProjection, ImageEncoderLike]
    unet: Component[UNet2DConditionModel, UNetLike]
    safety_checker: Component[StableDiffusionSafetyChecker | None, SafetyCheckerLike | None]
    feature_extractor: Component[CLIPImageProcessor | None, FeatureExtractorLike | None]

    # As diffusers describes this pipeline to other code; imvar's reads none of these.
    _optional_components: ClassVar = ["safety_checker"]
    _exclude_from_cpu_offload: ClassVar = ["safety_checker"]
    model_cpu_offload_seq: ClassVar = "image_encoder->unet->vae"
    _callback_tensor_inputs: ClassVar = list(TENSOR_INPUTS)

    _linear_decoder: tuple[Any, Tensor] | None = None  # that of `preview`, and the state of the VAE's weights for it

    def __init__(
        self,
        vae: VAELike,
        image_encoder: ImageEncoderLike,
        unet: UNetLike,
        scheduler: SchedulerLike,
        safety_checker: SafetyCheckerLike | None,
        feature_extractor: FeatureExtractorLike | None,
        requires_safety_checker: bool = True,
    ):
        super().__init__()
        components: dict[str, Any] = {
            "vae": vae,
            "image_encoder": image_encoder,
            "unet": unet,
            "scheduler": scheduler,
            "safety_checker": safety_checker,
            "feature_extractor": feature_extractor,
        }
        check_components({name: c for name, c in components.items() if c is not None and name != "feature_extractor"})
        if safety_checker is None and requires_safety_checker:
            warn_user("safety_checker=None: images are returned unchecked; requires_safety_checker=False silences this")
        check_feature_extractor(safety_checker, feature_extractor)
        if unet is not None and has_legacy_sample_size(unet.config):
            components["unet"].register_to_config(sample_size=64)
        self.register_modules(**components)
        self.register_to_config(requires_safety_checker=requires_safety_checker)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    # The type of the result by `output_type` and `return_dict`. It is Any if these are variables, or if arguments after
    # `image` are positional.

    @overload
    def __call__(
        self, image: Any = ..., *, output_type: Literal["pil"] = ..., **options: Unpack[OutputOptions]
    ) -> StableDiffusionPipelineOutput[list[Image]]: ...
    @overload
    def __call__(
        self, image: Any = ..., *, output_type: Literal["np"], **options: Unpack[OutputOptions]
    ) -> StableDiffusionPipelineOutput[np.ndarray]: ...
    @overload
    def __call__(
        self, image: Any = ..., *, output_type: Literal["pt", "latent"], **options: Unpack[OutputOptions]
    ) -> StableDiffusionPipelineOutput[Tensor]: ...
    @overload
    def __call__(
        self, image: Any = ..., *, output_type: Literal["pil"] = ..., **options: Unpack[TupleOptions]
    ) -> tuple[list[Image], list[bool] | None]: ...
    @overload
    def __call__(
        self, image: Any = ..., *, output_type: Literal["np"], **options: Unpack[TupleOptions]
    ) -> tuple[np.ndarray, list[bool] | None]: ...
    @overload
    def __call__(
        self, image: Any = ..., *, output_type: Literal["pt", "latent"], **options: Unpack[TupleOptions]
    ) -> tuple[Tensor, list[bool] | None]: ...
    @overload
    def __call__(self, image: Any = ..., *positional: Any, **options: Unpack[AnyOptions]) -> Any: ...

    @torch.no_grad()
    def __call__(  # type: ignore[misc]  # which takes no more than 15 positional arguments
        self,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | Callable[[float], float] = 7.5,
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
        conditions: Mapping[str, Any] | None = None,
        image_embeds: Tensor | Region | Sequence[Region] | None = None,
        negative_image_embeds: Tensor | None = None,
        guidance_rescale: float = 0.0,
        init_image: Any = None,
        strength: float | None = None,
        mask_image: Any = None,
        paste: bool = False,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Tensor]], Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> StableDiffusionPipelineOutput[Any] | tuple[Any, list[bool] | None]:
        """Return variations of one image or of several.

        Args:
            image: a PIL image, a list of b of them, or a tensor (b, 3, h, w) or (3, h, w) of the encoder's size,
                normalized as by `feature_extractor`.
            height, width: in pixels, multiples of 8; by default the size that the UNet was trained at.
            num_inference_steps: number of denoising steps.
            guidance_scale: w of arXiv:2207.12598, equation 6 (as 1 + w); no guidance up to 1, which takes half the
                time. The published model's card suggests 3. A function f of the fraction of steps done is evaluated
                before the first one, as f(i / n) for call i of the n calls of the UNet, from 0.
            num_images_per_prompt: n variations of each image, in the order a a b b.
            eta: 0 to 1, the share of fresh noise in each step of DDIM (arXiv:2010.02502, equation 16); other
                schedulers ignore it.
            generator: one for all variations, or a list of one each. Noise is drawn on its device.
            seed: instead of a generator: s for s + k in variation k, or a list of one each, 0 to 2^63 - 1. A seed
                gives the same variation in any batch, up to rounding, from the same noise on any device.
            latents: (b n, 4, height / 8, width / 8) standard normal noise to start from.
            output_type: "pil"; "np", (b n, height, width, 3) in [0, 1]; "pt", (b n, 3, height, width) in [0, 1];
                "latent", undecoded and unchecked.
            return_dict: False for a tuple of images and flags.
            callback: called as callback(i, t, latents) after each step i divisible by `callback_steps`, under PNDM
                not after the warm-up steps.
            guidance_interval: guide only from this fraction of the steps to that (arXiv:2404.07724); a step without
                guidance takes half the time. Approximate.
            cache_interval: DeepCache (arXiv:2312.00858): run the full UNet every `cache_interval` steps, and only its
                last layer in between. Approximate; 1 disables it.
            on_flagged: policy for images that the safety checker flags: "black"; "blur", to the colours of 8 x 8
                cells; "keep"; or "raise" for a `FlaggedError`.
            conditions: further inputs by name, for a subclass whose `unet_input`, `unet_kwargs` or `_encode_image`
                has parameters of these names.
            image_embeds: embeddings (b, 1, c) or (b, c) in place of b images, such as those of `encode_image`; or a
                `Region` or a list of them, for embeddings that vary by region and by block of the UNet.
            negative_image_embeds: what guidance leads away from, in the place of zeros: embeddings (b, 1, c) or (b, c)
                of b images, or one for all.
            guidance_rescale: 0 to 1, how far to restore the contrast that a high `guidance_scale` raises
                (arXiv:2305.08891, equations 15 and 16; 0.7 there).
            init_image: image to start from, instead of noise: PIL images, arrays or tensors as `VaeImageProcessor`
                takes, resized to height x width, or latents (k, 4, height / 8, width / 8). One for all variations, one
                for each image, or one for each variation. Encoded to the mode of its latents, so a seed keeps its
                noise. `image` is still what the variations show.
            strength: 0 to 1, the share of the steps that are run, rounded down, from the init_image with the noise
                of the first of them (arXiv:2108.01073). By default 0.8, with a mask_image 1. Strength 1 starts from
                noise alone. `guidance_interval`, `cache_interval` and `callback` count the steps that are run.
            mask_image: PIL images, arrays or tensors in [0, 1], (h, w) or (k, 1, h, w), as many as of init_image. From
                0.5, white, is repainted; the latents of the rest are kept from the init_image (arXiv:2206.02779). It is
                resized to height x width, and to the latents by nearest neighbour; so there are no soft edges.
            paste: put the pixels that the mask_image keeps back exactly, as decoding changes them a little. "pt" is
                then float32.
            callback_on_step_end: called as callback_on_step_end(pipe, i, t, tensors) after each call i of the UNet.
                It returns a dictionary, and those of its tensors that are not the same continue the run: `latents`
                (b n, 4, height / 8, width / 8), `image_embeds` and, under guidance, `negative_image_embeds`, both
                (b n, m, c). `pipe._interrupt = True` in it ends the call with the x_0 predicted in this step.
            callback_on_step_end_tensor_inputs: names of the tensors that it receives: these, or
                `pred_original_sample`, the x_0 predicted in this step, which must not change.

        Returns:
            `images`, and `nsfw_content_detected`, a flag each, or None without a safety checker; by attribute alone
            `seeds`, `scores`, the measurements of the safety checker, and `records`, how each image was made, which
            `save(folder)` writes into files.

        Raises:
            InputError: an argument or component is not supported; raised before the first step.
            OutOfMemoryError: with the options that need less. ImvarError: a result is not finite, with a likely cause.
        """
        call = Call(**{name: value for name, value in locals().items() if name != "self"})
        with self.per_call_scheduler() as running, self._offload or contextlib.nullcontext(), explain_out_of_memory():
            scheduler, timesteps, step_options = self.plan_steps(call)
            recorded = call_records(self, call) if call.return_dict and call.output_type != "latent" else None

            own, context = call.conditions, self.prepare_context(call)
            start = self.prepare_start(call, scheduler, timesteps, context.dtype)
            x = start.latents

            order = getattr(scheduler, "order", 1)  # calls of the UNet for a step
            warmup_steps = len(timesteps) - call.steps * order
            denoiser = Denoiser(lambda: self.unet, self.predictor, timesteps, context, **call.denoising)
            with self.progress_bar(total=call.steps) as bar:
                for i, t in running.until_interrupted(timesteps):
                    scaled = scheduler.scale_model_input(x, t)
                    sample = self.unet_input(scaled, t, **own["unet_input"])
                    eps = denoiser(sample, i, **self.unet_kwargs(sample, t, denoiser.context, **own["unet_kwargs"]))
                    x, x0 = take_step(scheduler, eps, t, x, scaled, step_options)
                    x, x0 = start.replace_kept(scheduler, x, i), partial(start.replace_kept_in_x0, x0)
                    x = self.run_callback_on_step_end(call, denoiser, i, timesteps[i], x, x0)
                    if i == len(timesteps) - 1 or (i >= warmup_steps and (i + 1) % order == 0):
                        bar.update()
                        if call.callback is not None and i % call.callback_steps == 0:
                            x = self.run_callback(call, denoiser, i // order, timesteps[i], x)
            if running.ended_early:
                x = x0()  # type: ignore[possibly-undefined]
                if recorded is not None:
                    recorded.add_reason("the call was interrupted")
            dtype = denoiser.context.dtype
            del denoiser  # frees the packed weights before the autoencoder allocates
            if call.device.type == "cpu" and x[0, 0].numel() >= MIN_LATENTS_TO_TRIM:
                return_freed_memory()

            judging = call.output_type, call.device, dtype, call.on_flagged, call.seeds
            images, flags = self.decode_and_judge(x, *judging, **kept_pixels(call))
        if recorded is not None:
            recorded.add_flags(flags)
        result = StableDiffusionPipelineOutput(images, flags, call.seeds, getattr(flags, "scores", None), recorded)
        return result if call.return_dict else (images, flags)

    @torch.no_grad()
    def records(self, *args: Any, **arguments: Any) -> list[Record]:
        """Return the records of the images that a call with these arguments would make, without making them.

        They are those of the `records` of the call's output, except for `flagged`. Arguments are checked as in a call,
        and the same errors raised, but for those that only the image encoder would find.
        """
        make: Any = StableDiffusionImageVariationPipeline.__dict__["__call__"]
        bound = inspect.signature(make).bind(self, *args, **arguments)
        bound.apply_defaults()
        call = Call(**{name: value for name, value in bound.arguments.items() if name != "self"})
        with self.per_call_scheduler(), self._offload or contextlib.nullcontext():
            self.plan_steps(call)
            return call_records(self, call).finished()

    @torch.no_grad()
    def encode_image(self, image: Any, preprocess: Literal["clip", "card", "training"] = "clip") -> Tensor:
        """Return the embeddings (b, 1, c) of images, for `image_embeds` of a call: one token for each image.

        Args:
            image: as `image` of a call, PIL images if `preprocess` is not "clip".
            preprocess: "clip", by `feature_extractor`, as a call does: the result gives the same variations as `image`;
                "card" or "training", without antialiasing and cropping, as the published model's card or its training
                (`imvar.image.pixel_values`). The card calls the difference big.

        Returns:
            a tensor in the encoder's dtype, on its device.

        Raises:
            InputError: an argument or component is not supported.
        """
        encoder = {"image_encoder": self.components["image_encoder"]}
        check_components(encoder)
        check_option("preprocess", preprocess, PREPROCESS)
        image = image[None] if isinstance(image, Tensor) and image.ndim == 3 else image
        check_images(image)
        given = image
        if preprocess != "clip":
            with rename_argument("images", "image"):
                image = to_pixel_values(image, preprocess, *pixel_format(self.feature_extractor))
        device = self._execution_device if self._offload else device_of(encoder, self.device)
        with self._offload or contextlib.nullcontext(), explain_out_of_memory():
            embeds = self.encode_pixels(image, device)
        return note_photos(self, embeds, given, preprocess)

    @torch.no_grad()
    def preview(self, latents: Tensor) -> list[Image]:
        """Return approximate images of latents, at once: of one pixel for each latent, by a linear decoder.

        The first preview fits the decoder to `vae`, with about as much time as the VAE needs for a few small images; a
        VAE with other weights is fitted again. The safety checker does not see previews.

        Args:
            latents: (b, c, h, w) or (c, h, w), such as the `pred_original_sample` of a `callback_on_step_end`. Those
                that are still noisy show noise.

        Returns:
            b images of width w and height h.

        Raises:
            InputError: the latents or the VAE are not supported.
        """
        vae: Any = self.components["vae"]
        check_components({"vae": vae})
        latents = latents[None] if isinstance(latents, Tensor) and latents.ndim == 3 else latents
        check_tensor("latents", latents, "b", getattr(vae.config, "latent_channels", "c"), "h", "w")
        check_latents(latents, latents.shape)
        state = state_of_weights(vae)
        if self._linear_decoder is None or self._linear_decoder[0] != state:
            with self._offload or contextlib.nullcontext(), explain_out_of_memory():
                self._linear_decoder = state, fit_to_random_latents(self.decode_on_cpu, latents.shape[1])
        images = linear_decode(latents.to("cpu", torch.float32), self._linear_decoder[1])
        return self.image_processor.postprocess(images, "pil")

    # The stages of a call, in their order. Subclasses may override each.

    def plan_steps(self, call: Call) -> tuple[SchedulerLike, Any, dict[str, Any]]:
        """Check a call, and return its scheduler, the timesteps that are run and the options of each step."""
        self.check_call(call)
        scheduler, timesteps, step_options = self.prepare_scheduler(call)
        timesteps = skip_steps(call, scheduler, timesteps)
        call.plan_guidance(len(timesteps))
        return scheduler, timesteps, step_options

    def check_call(self, call: Call) -> None:
        """Check the components and arguments of a call, and convert the arguments in place."""
        components = self._used_components(call)
        check_components(components)
        if not self._offload:
            check_devices(components)
        if isinstance(call.image, Tensor) and call.image.ndim == 3 and not self._overrides("_encode_image"):
            call.image = call.image[None]
        call.height, call.width = self.default_size(call.height, call.width)
        if call.image_embeds is None:
            self.check_inputs(call.image, call.height, call.width, call.callback_steps)
        else:
            self.check_size(call.height, call.width, call.callback_steps)
        call.check_numbers()
        call.check_embeddings(own_encoding=self._overrides("_encode_image"))
        batch = call.images * call.num_images_per_prompt
        adds_channels = self._overrides("unet_input")
        channels = self.unet.config.out_channels if adds_channels else self.unet.config.in_channels
        call.shape = self.latents_shape(batch, channels, call.height, call.width)
        precomputable = can_precompute(self.unet)
        call.unmodified_unet = precomputable and not (adds_channels or self._overrides("predictor"))
        check_compatible(self.components, call.output_type, call.unmodified_unet)
        call.check_options(check_shape=not self._overrides("prepare_latents"))
        check_start(call, self.components["vae"], self.vae_scale_factor)
        if call.paste and not takes_argument(self.decode_and_judge, "kept"):
            raise invalid(InputError, "paste", "False", "True with a decode_and_judge that has no parameter `kept`")
        call.check_intervals(precomputable and takes_argument(self.predictor, "cache_interval"))
        if call.regions is not None:
            self.check_regions(call.regions)
        base, stages = StableDiffusionImageVariationPipeline, ("_encode_image", "unet_input", "unet_kwargs")
        methods = {stage: (getattr(type(self), stage), getattr(base, stage)) for stage in stages}
        call.conditions = conditions_by_stage(call.conditions, methods)
        on_execution_device = "vae" in components or self._offload
        call.device = self._execution_device if on_execution_device else device_of(components, self.device)

    def check_regions(self, regions: Sequence[Region]) -> None:
        """Check that regions reach the UNet, and that the blocks in their scales have attention."""
        unet = self.components["unet"]
        with rename_argument("regions", "image_embeds"):
            check_takes_regions(unet)
        if not takes_argument(self.predictor, "regions") or self._overrides("unet_kwargs"):
            expected = "a pipeline whose predictor takes `regions`, and without its own unet_kwargs"
            raise invalid(InputError, "image_embeds", expected, f"regions for {type(self).__name__}")
        check_scales([region.scale for region in regions], unet.attention_levels)

    def _overrides(self, method: str) -> bool:
        """Return whether a subclass or this instance overrides a method of this class."""
        own = getattr(getattr(self, method), "__func__", None)
        return own is not getattr(StableDiffusionImageVariationPipeline, method)

    def _used_components(self, call: Call) -> dict[str, Any]:
        """Return the components that a call checks; a subclass with its own `_encode_image` may need no encoder."""
        components = required_components(self.components, call.output_type)
        if encodes_start(call):
            components["vae"] = self.components["vae"]
        encodes = call.image_embeds is None and not self._overrides("_encode_image")
        return {name: c for name, c in components.items() if encodes or name != "image_encoder"}

    def default_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return height and width in pixels, by default those that the UNet was trained at."""
        sample_size = self.unet.config.sample_size
        if sample_size is not None:
            rows, columns = sample_size if isinstance(sample_size, Sequence) else (sample_size, sample_size)
            height = rows * self.vae_scale_factor if height is None else height
            width = columns * self.vae_scale_factor if width is None else width
        if height is None or width is None:
            hint = "this UNet's config has no sample_size to use by default"
            raise invalid(InputError, "height" if height is None else "width", "a number of pixels", "None", hint)
        return height, width

    def latents_shape(self, batch: int, channels: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the shape of the latents for images of this size in pixels."""
        return batch, channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    def check_inputs(self, image: Any, height: int, width: int, callback_steps: int) -> None:
        """Raise `InputError` for an image, a size or an interval that is not supported."""
        if not self._overrides("_encode_image"):
            check_images(image)
        self.check_size(height, width, callback_steps)

    def check_size(self, height: int, width: int, callback_steps: int) -> None:
        """Raise `InputError` for a size or an interval that is not supported."""
        check_size_and_interval(height, width, callback_steps, factor=max(8, self.vae_scale_factor))

    def prepare_scheduler(self, call: Call) -> tuple[SchedulerLike, Any, dict[str, Any]]:
        """Set the timesteps of this call, and return its scheduler, these, and the options of each step."""
        scheduler = self.scheduler
        scheduler.set_timesteps(call.num_inference_steps, device=call.device)
        check_timesteps(scheduler)
        step_options = self.prepare_extra_step_kwargs(call.generator, call.eta)
        check_step(scheduler, step_options)
        call.check_seeds_are_used(step_options)
        return scheduler, scheduler.timesteps, step_options

    def prepare_extra_step_kwargs(self, generator: Any, eta: float) -> dict[str, Any]:
        """Return those of `eta` and `generator` that the scheduler's step takes."""
        parameters = inspect.signature(self.scheduler.step).parameters
        if "eta" in parameters:
            check_float("eta", eta)
        return {name: value for name, value in (("eta", eta), ("generator", generator)) if name in parameters}

    def prepare_context(self, call: Call) -> Tensor:
        """Return the context of the UNet, (b n, m, c); under guidance (2 b n, m, c), the unconditional half first."""
        n, own = call.num_images_per_prompt, call.conditions["_encode_image"]
        if call.image_embeds is None:
            context = self._encode_image(call.image, call.device, n, call.is_guided, **own)
        else:
            dtype = dtype_of(self.unet, call.image_embeds.dtype)
            context = cast_embeds("image_embeds", call.image_embeds, call.device, dtype).repeat_interleave(n, dim=0)
            context = torch.cat([torch.zeros_like(context), context]) if call.is_guided else context
        name = "image_encoder" if call.image_embeds is None else "image_embeds"
        check_context(context, call.shape[0] * (1 + call.is_guided), self.unet if call.unmodified_unet else None, name)
        if call.negative_image_embeds is None:
            return context
        conditional = context.chunk(2)[1]
        to = conditional.device, conditional.dtype
        negative = cast_embeds("negative_image_embeds", call.negative_image_embeds, *to)
        negative = negative.expand(call.images, -1, -1).repeat_interleave(n, dim=0)
        if call.regions is not None and negative.shape[2] == conditional.shape[2]:
            conditional = torch.cat([conditional[:, :-1], negative], dim=1)
            negative = negative.expand_as(conditional)
        if negative.shape != conditional.shape:
            expected, got = f"embeddings of shape {tuple(conditional.shape)}", describe(negative)
            raise invalid(InputError, "negative_image_embeds", expected, got)
        return torch.cat([negative, conditional])

    def _encode_image(
        self, image: Any, device: torch.device, num_images_per_prompt: int, do_classifier_free_guidance: bool
    ) -> Tensor:
        """Return the context of the UNet, (b n, 1, c); under guidance (2 b n, 1, c), first zeros.

        A subclass that overrides this receives `image` unchecked, may do without `image_encoder`, and may return any
        number of tokens m: (b n, m, c) or (2 b n, m, c). b is the length of a list, tensor or array, 1 otherwise.
        """
        context = self.encode_pixels(image, device).repeat_interleave(num_images_per_prompt, dim=0)  # b 1 c -> bn 1 c
        context = context.to(dtype_of(self.unet, context.dtype))
        return torch.cat([torch.zeros_like(context), context]) if do_classifier_free_guidance else context

    def encode_pixels(self, image: Any, device: torch.device) -> Tensor:
        """Return the embeddings (b, 1, c) of images or of normalized pixels (b, 3, h, w)."""
        if not isinstance(image, Tensor):
            if self.feature_extractor is None:
                hint = "or pass a tensor of normalized pixels as `image`"
                raise invalid(InputError, "feature_extractor", "a CLIPImageProcessor for images", "None", hint)
            with rename_argument("images", "image"):
                features = self.feature_extractor(images=image, return_tensors="pt")
            image = require_tensor(self.feature_extractor, "feature_extractor", features, "pixel_values")
        dtype = dtype_of(self.image_encoder, torch.float32)
        with rename_argument("pixel_values", "image"):
            output = self.image_encoder(image.to(device=device, dtype=dtype))
        embeds = require_tensor(self.image_encoder, "image_encoder", output, "image_embeds")
        check_all_finite("image embeddings", embeds, self.image_encoder, "pixels too large")
        return embeds[:, None]

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
        """Return the first latents: noise (b, c, height / 8, width / 8), scaled as the scheduler needs it."""
        shape = self.latents_shape(batch_size, num_channels_latents, height, width)
        return draw_noise(shape, generator, latents, dtype, device) * self.scheduler.init_noise_sigma

    def prepare_start(self, call: Call, scheduler: SchedulerLike, timesteps: Any, dtype: torch.dtype) -> Start:
        """Return the first latents, and those that `mask_image` keeps."""
        size = *call.shape[:2], call.height, call.width
        prepare = partial(self.prepare_latents, *size, dtype, call.device, call.generator, call.latents)
        if starts_from_noise(call):
            return Start(prepare())
        if self._overrides("prepare_latents"):
            latents = prepare()
            noise = latents / scheduler.init_noise_sigma
        else:
            noise = draw_noise(call.shape, call.generator, call.latents, dtype, call.device)
            latents = noise * scheduler.init_noise_sigma
        x0 = call.init_image
        if encodes_start(call):
            x0 = self.encode(self.image_processor.normalize(x0).to(call.device))
        return start_from(call, scheduler, timesteps, x0, noise, latents)

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode images (b, 3, 8 h, 8 w) in [-1, 1] to the mode of their latents (b, 4, h, w), scaled as the UNet's."""
        vae: Any = self.vae
        output = vae.encode(pixels.to(dtype_of(vae, pixels.dtype)))
        is_posterior = hasattr(output, "latent_dist")
        latents = output.latent_dist.mode() if is_posterior else require_tensor(vae, "vae", output, "latents")
        check_all_finite("latents of the init_image", latents, vae)
        return latents * vae.config.scaling_factor

    def unet_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """Return what the UNet receives in place of the scaled latents (b n, 4, h, w): by default these.

        A subclass may add channels, for example; its further parameters are the names of `conditions` of a call. With
        2 b n rows, the first half is for the unconditional prediction of guidance.
        """
        return sample

    def unet_kwargs(self, sample: Tensor, timestep: Any, context: Tensor) -> dict[str, Any]:
        """Return further arguments of the UNet for a step, such as the residuals of a ControlNet: by default none.

        `sample`: the output of `unet_input`; `context`: (2 b n, 1, c) under guidance, the unconditional half first. A
        tensor of 2 b n rows, too, has one for each row of the context. Further parameters are names of `conditions`.
        """
        return {}

    def predictor(
        self,
        timesteps: Any,
        context: Tensor,
        cache_interval: int = 1,
        packed: PackedWeights | None = None,
        regions: RegionLayout | None = None,
    ) -> Predict:
        """Return the UNet as a function of scaled latents (b n, 4, h, w) and a step: a prediction for each context.

        The denoiser runs what this returns; a subclass may wrap it or return another function, and leave out the last
        three parameters. `regions` is passed only in calls that have any: how the tokens of the context share the
        latents.
        """
        return make_predictor(self.unet, timesteps, context, cache_interval, self.runner, packed, regions)

    def run_callback(self, call: Call, denoiser: Denoiser, step: int, timestep: Any, latents: Tensor) -> Tensor:
        """Run the `callback` of a call, and return the latents."""
        shape = latents.shape
        returned = call.callback(step, timestep, latents)  # type: ignore[misc]
        check_callback_effects("callback", returned, latents, shape)
        return self.after_callback(call, denoiser, latents)

    def run_callback_on_step_end(
        self, call: Call, denoiser: Denoiser, step: int, timestep: Any, latents: Tensor, x0: Callable[[], Tensor]
    ) -> Tensor:
        """Run the `callback_on_step_end` of a call, if it has one; apply what it changed, and return the latents."""
        if call.callback_on_step_end is None:
            return latents
        shape, embeds = latents.shape, ["negative_image_embeds"] * call.is_guided + ["image_embeds"]
        own = partial(step_tensor, latents=latents, x0=x0, context=denoiser.context, is_guided=call.is_guided)
        given = {name: own(name) for name in call.callback_on_step_end_tensor_inputs}
        given = {name: value if value is latents else value.clone() for name, value in given.items()}
        with refuse_new_guidance_scale(self):
            returned = call.callback_on_step_end(self, step, timestep, dict(given))
        check_callback_effects("callback_on_step_end", returned, latents, shape)
        changed = changed_tensors(returned, given, own)
        if changed.keys() & embeds:
            denoiser.replace_context(torch.cat([changed.get(name, own(name)) for name in embeds]))
        return self.after_callback(call, denoiser, changed.get("latents", latents))

    def after_callback(self, call: Call, denoiser: Denoiser, latents: Tensor) -> Tensor:
        """Rebuild the denoiser if a callback changed the UNet, and return the latents in its dtype."""
        if not self._offload:
            check_devices(self._used_components(call), may_differ=True)
        if not denoiser.refresh():
            return latents
        check_components(self._used_components(call))
        return latents.to(denoiser.context.dtype)

    def decode_and_judge(
        self,
        latents: Tensor,
        output_type: str,
        device: torch.device,
        dtype: torch.dtype,
        on_flagged: str = "black",
        seeds: list[int] | None = None,
        kept: KeptPixels | None = None,
    ) -> tuple[Any, list[bool] | None]:
        """Decode the last latents, paste `kept` pixels, check the images, and return them and their flags."""
        check_all_finite("latents after the last step", latents, self.unet, "guidance_scale or latents too large")
        if output_type == "latent":
            return latents, None
        pixels = self.decode_finite(latents)
        if kept is not None:
            pixels = kept.paste(pixels)
        checker_output = self.run_safety_checker(pixels.clone(), device, dtype)
        images, flags, is_centred = judge(pixels, checker_output, on_flagged, seeds)
        if kept is not None:
            in_range = self.image_processor.postprocess(images, "pt", do_denormalize=is_centred)
            images, is_centred = kept.paste_exactly(images, is_centred, in_range), [False] * len(images)
        return self.image_processor.postprocess(images, output_type, do_denormalize=is_centred), flags

    def decode_finite(self, latents: Tensor) -> Tensor:
        """Decode, and once more in float32 if float16 overflowed. Raises `ImvarError` if the result is not finite."""
        pixels = self.decode(latents)
        if not isinstance(pixels, Tensor):
            raise invalid(InputTypeError, "decode", "a tensor of images", describe(pixels))
        if latents.dtype == torch.float16 and not pixels.isfinite().all():
            warn_user(
                "vae: float16 overflowed, so these latents are decoded again in float32; a vae in float32 or bfloat16 "
                "avoids that"
            )
            wide = copy.copy(self)
            wide.vae, wide._compiler = copy.deepcopy(self.components["vae"]).float(), None
            pixels = wide.decode(latents.float()).to(latents.dtype)
        check_all_finite("decoded images", pixels, self.vae)
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (b, 4, h, w) to images (b, 3, 8 h, 8 w) around [-1, 1].

        Large images are decoded one at a time to limit peak memory; a VAE with hooks always gets the whole batch.
        """
        latents = (latents / self.vae.config.scaling_factor).to(dtype_of(self.vae, latents.dtype))
        height, width = (side * self.vae_scale_factor for side in latents.shape[2:])
        run = self.runner(decode_with, self.components["vae"])
        unmodified = is_unmodified(self.components["vae"])
        batch = max(MAX_DECODE_PIXELS // (height * width), 1) if unmodified else len(latents)
        batches = [run(part) for part in latents.split(batch)]
        images = batches[0] if len(batches) == 1 else torch.cat(batches)
        if images.shape[2:] != (height, width):
            hint = f"use one that decodes a latent to {self.vae_scale_factor} x {self.vae_scale_factor} pixels"
            error = invalid(InputError, "vae", f"images of {(height, width)}", f"{tuple(images.shape[2:])}", hint)
            if unmodified:
                raise error
            warn_user(str(error))  # as in diffusers, a custom one may have its own scale
        return images

    def decode_on_cpu(self, latents: Tensor) -> Tensor:
        """Decode latents without compiling, for tensors in float32 on the CPU."""
        vae: Any = self.components["vae"]
        device = self._execution_device if self._offload else device_of({"vae": vae}, self.device)
        latents = (latents / vae.config.scaling_factor).to(device, dtype_of(vae, latents.dtype))
        images = decode_with(vae, latents).to("cpu", torch.float32)
        check_all_finite("decoded images", images, vae)
        return images

    def run_safety_checker(self, image: Any, device: torch.device, dtype: torch.dtype) -> tuple[Any, list[bool] | None]:
        """Run the safety checker on images (b, 3, h, w) around [-1, 1], or an array (b, h, w, 3) in [0, 1].

        Returns the images, flagged ones zero, and the flags.
        """
        if self.safety_checker is None:
            return image, None
        extractor: Any = self.feature_extractor  # not None: checked with the components
        if isinstance(image, Tensor) and isinstance(extractor, CLIPImageProcessor):
            pixel_values = extractor.preprocess_uint8(to_uint8(self.image_processor.denormalize(image)))
        else:
            images = (
                self.numpy_to_pil(image) if isinstance(image, np.ndarray) else self.image_processor.postprocess(image)
            )
            features = extractor(images, return_tensors="pt")
            pixel_values = require_tensor(extractor, "feature_extractor", features, "pixel_values")
        clip_input = pixel_values.to(device=device, dtype=dtype_of(self.safety_checker, dtype))
        return self.safety_checker(images=image, clip_input=clip_input)

    def decode_latents(self, latents: Tensor) -> np.ndarray:
        """Decode latents to an array (b, h, w, 3) in [0, 1], as in older pipelines, for code that calls it."""
        return self.image_processor.postprocess(self.decode(latents), "np")


def decode_with(vae: Any, latents: Tensor) -> Tensor:
    """Decode latents; a function of the model, as a runner needs it."""
    return vae.decode(latents, return_dict=False)[0]


def check_all_finite(name: str, x: Tensor, model: Any, *causes: str) -> None:
    """Raise `ImvarError` for values that are not finite, with the likely cause."""
    if x.isfinite().all():
        return
    weights = model.state_dict() if isinstance(model, torch.nn.Module) else {}
    broken = next((key for key, weight in weights.items() if not weight.isfinite().all()), None)
    overflow = [] if x.dtype == torch.float32 else [f"{x.dtype} that overflowed"]
    hint = f"likely causes: {', '.join([*causes, *overflow])} or weights that are too large"
    hint += "; try torch.float32 and a guidance_scale near 3"
    if broken is not None:
        hint = f"{type(model).__name__} has some in {broken}: load its weights again"
    raise invalid(ImvarError, name, "finite values", "NaN or infinite values", hint)
