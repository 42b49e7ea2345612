"""The denoiser: a UNet prepared for the steps of one call, as a function of the latents and the index of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..checks import takes_argument
from ..errors import InputError, describe, invalid
from ..models import UNet2DConditionModel
from ..models.conditioning import repeat_to_batch
from ..models.ops import PackedWeights
from ..models.regions import RegionLayout
from ..models.validation import RESIDUALS
from .deepcache import DeepCacheUNet
from .guidance import NO_GUIDANCE, ClassifierFreeGuidance, Predict, scale_by_step
from .precompute import Fingerprint, PrecomputedUNet, Runner


class Denoiser:
    """Noise prediction for the latents of a call: `eps = denoiser(x, step)`.

    Guidance, precomputation, DeepCache and packed weights are set up for all steps at once. After code that may have
    changed the UNet, such as a callback, call `refresh()`.
    """

    def __init__(
        self,
        unet: Callable[[], Any],
        predictor: Callable[..., Predict],
        timesteps: Any,
        context: Tensor,
        *,
        guidance_scale: float | Sequence[float] | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        cache_interval: int = 1,
        refreshable: bool = False,
        regions: RegionLayout | None = None,
    ):
        """Build the denoiser.

        Args:
            unet: returns the UNet in use now.
            predictor: builds a predictor from timesteps, a context and, by name, if it takes them,
                `cache_interval` and `packed`; by name also `regions`, which are passed only if there are any.
            timesteps: (n,), those of the steps.
            context: (b, m, c); under guidance (2 b, m, c), the unconditional one first.
            guidance_scale: for all steps, or one for each; None for no guidance.
            guidance_interval: first and last fraction of the steps with guidance.
            guidance_rescale: 0 to 1, as in `ClassifierFreeGuidance`.
            cache_interval: interval of DeepCache in steps; 1 disables it.
            refreshable: whether `refresh()` will be called. Comparing the UNet with its state at first takes time.
            regions: the layout of the context's m tokens over the latents; None for one token.
        """
        self.unet, self.predictor, self.timesteps, self.context = unet, predictor, timesteps, context
        self.guidance_scale, self.guidance_interval = guidance_scale, guidance_interval
        self.guidance_rescale = guidance_rescale
        self.cache_interval, self.refreshable, self.regions = cache_interval, refreshable, regions
        self.prepare()

    def __call__(self, x: Tensor, step: int, **more: Any) -> Tensor:
        """Predict the noise in scaled latents (b, c, h, w); `more` are further arguments of the UNet in this step."""
        return self.predict(x, step, **more)

    def refresh(self) -> bool:
        """Rebuild everything if the UNet's weights, dtype, layers, hooks or kernels changed, or if it is another one.

        Returns whether it did; the latents have to be cast to the dtype of `context` then.
        """
        unet = self.unet()
        if unet is self.built_from and not (self.fingerprint and self.fingerprint.differs_from(unet)):
            return False
        self.replace_context(self.context.to(dtype_of(unet, self.context.dtype)))
        return True

    def replace_context(self, context: Tensor) -> None:
        """Rebuild everything for another context of the same shape."""
        del self.predict  # frees what it holds of the weights before the same is computed again
        self.context = context
        self.prepare()

    def prepare(self) -> None:
        """Build the predictors from the UNet in use now."""
        steps = len(self.timesteps)
        packed = PackedWeights(steps)  # shared by both predictors of guidance
        options = {"cache_interval": self.cache_interval, "packed": packed}
        options = {name: value for name, value in options.items() if takes_argument(self.predictor, name)}
        if self.regions is not None:
            options["regions"] = self.regions
        make = partial(self.predictor, self.timesteps, **options)
        if self.guidance_scale is None:
            self.predict: Predict = make(self.context)
        else:
            scales = scale_by_step(self.guidance_scale, self.guidance_interval, steps)
            guided = make(self.context) if max(scales) > NO_GUIDANCE else None
            conditional = make(self.context.chunk(2)[1]) if min(scales) <= NO_GUIDANCE else None
            rows = len(self.context)
            self.predict = ClassifierFreeGuidance(guided, conditional, scales, rows, self.guidance_rescale)
        self.built_from = self.unet()
        can_change = self.refreshable and isinstance(self.built_from, nn.Module)
        self.fingerprint = Fingerprint(self.built_from) if can_change else None


def make_predictor(
    unet: Any,
    timesteps: Any,
    context: Tensor,
    cache_interval: int = 1,
    runner: Runner = partial,
    packed: PackedWeights | None = None,
    regions: RegionLayout | None = None,
) -> Predict:
    """Return the UNet as a function of latents and step, precomputed if it is imvar's own and unmodified.

    The function takes further arguments of the UNet by name, such as the residuals of a ControlNet. Raises `InputError`
    for regions with a UNet that cannot be precomputed.
    """
    if regions is not None:
        check_takes_regions(unet)
    if can_precompute(unet):
        if cache_interval > 1:
            return DeepCacheUNet(unet, timesteps, context, cache_interval, runner, packed, regions)
        return PrecomputedUNet(unet, timesteps, context, runner, packed, regions)

    def call_unet(x: Tensor, step: int, **more: Any) -> Tensor:
        def repeat(t: Tensor) -> Tensor:
            return repeat_to_batch(t, context) if len(t) == len(x) else t

        more |= {name: tree_map_only(Tensor, repeat, more[name]) for name in RESIDUALS if name in more}
        return unet(repeat(x), timesteps[step], encoder_hidden_states=context, **more).sample

    return call_unet


def can_precompute(unet: Any) -> bool:
    """Return whether a UNet is imvar's own, without custom layers, kernels or hooks."""
    return isinstance(unet, UNet2DConditionModel) and not unet.why_plain()


def check_takes_regions(unet: Any) -> None:
    """Check that a UNet can be precomputed, as regions have to be."""
    if not can_precompute(unet):
        reasons = unet.why_plain()[:3] if isinstance(unet, UNet2DConditionModel) else [describe(unet)]
        expected = "imvar's own UNet2DConditionModel without hooks, custom layers or kernels"
        raise invalid(InputError, "regions", expected, ", ".join(reasons))


def dtype_of(component: Any, default: torch.dtype) -> torch.dtype:
    """Return the dtype of a component's weights; `default` if it has none."""
    parameters = component.parameters() if isinstance(component, nn.Module) else ()
    return next((p.dtype for p in parameters if p.is_floating_point()), default)
