"""Classifier-free guidance (arXiv:2207.12598)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

Predict = Callable[..., Tensor]
"""Scaled latents (b, c, h, w) and the index of a step to a prediction for each context, (k b, c, h, w).

By name it takes further arguments of the UNet, if the pipeline has any.
"""

NO_GUIDANCE = 1.0  # the highest scale of a step without guidance


def scale_by_step(scale: float | Sequence[float], interval: tuple[float, float], steps: int) -> list[float]:
    """Return the guidance scale of each step, `NO_GUIDANCE` outside an interval of the steps (arXiv:2404.07724).

    `scale`: one for all steps, or one for each; `interval`: first and last fraction of the steps with guidance.
    """
    scales = list(scale) if isinstance(scale, Sequence) else [scale] * steps
    guided = range(*(round(fraction * steps) for fraction in interval))
    return [scale if i in guided else NO_GUIDANCE for i, scale in enumerate(scales)]


class ClassifierFreeGuidance:
    """Extrapolate from the unconditional to the conditional prediction (equation 6, a scale is 1 + w there).

    `scales`: one for each step. `guided` predicts for the `rows` of both contexts, the unconditional half first, in
    steps with a scale above `NO_GUIDANCE`; in the others `conditional` predicts for the image's context alone. Either
    is None where it has no steps. `rescale`: 0 to 1, how far to restore the conditional prediction's contrast.
    """

    def __init__(
        self,
        guided: Predict | None,
        conditional: Predict | None,
        scales: Sequence[float],
        rows: int,
        rescale: float = 0.0,
    ):
        self.guided, self.conditional, self.scales, self.rows = guided, conditional, scales, rows
        self.rescale = rescale

    def __call__(self, x: Tensor, step: int, **more: Any) -> Tensor:
        if self.scales[step] <= NO_GUIDANCE:
            x, more = tree_map_only(Tensor, self.conditional_half, (x, more))
            return self.conditional(x, step, **more)  # type: ignore[misc]
        uncond, cond = self.guided(x, step, **more).chunk(2)  # type: ignore[misc]
        guided = uncond + self.scales[step] * (cond - uncond)
        return rescale_contrast(guided, cond, self.rescale) if self.rescale else guided

    def conditional_half(self, x: Tensor) -> Tensor:
        """Return the second half of a tensor with a row for each row of the contexts; any other tensor unchanged."""
        return x.chunk(2)[1] if x.ndim and len(x) == self.rows else x


def rescale_contrast(guided: Tensor, cond: Tensor, rescale: float) -> Tensor:
    """Give each guided prediction the standard deviation of the conditional one, and mix by `rescale`.

    Equations 15 and 16 of arXiv:2305.08891, against the saturation of high scales.
    """
    dims = tuple(range(1, guided.ndim))
    rescaled = guided * (cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
    return rescale * rescaled + (1 - rescale) * guided
