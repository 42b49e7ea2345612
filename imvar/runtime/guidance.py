"""Classifier-free guidance (arXiv:2207.12598)."""

from __future__ import annotations

from collections.abc import Callable, Container

from torch import Tensor

Predict = Callable[[Tensor, int], Tensor]
"""Scaled latents (b, c, h, w) and the index of a step to a prediction for each context, (k b, c, h, w)."""


class ClassifierFreeGuidance:
    """Extrapolate from the unconditional to the conditional prediction (equation 6, `scale` is 1 + w there).

    `guided` predicts for both contexts, the unconditional one first. With guidance in an interval of the steps
    (arXiv:2404.07724), `conditional` predicts for the image's context alone in all but `guided_steps`.
    """

    def __init__(self, guided: Predict, conditional: Predict | None, scale: float, guided_steps: Container[int]):
        self.guided, self.conditional, self.scale, self.guided_steps = guided, conditional, scale, guided_steps

    def __call__(self, x: Tensor, step: int) -> Tensor:
        if self.conditional is not None and step not in self.guided_steps:
            return self.conditional(x, step)
        uncond, cond = self.guided(x, step).chunk(2)
        return uncond + self.scale * (cond - uncond)
