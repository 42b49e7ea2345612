"""Classifier-free guidance (arXiv:2207.12598)."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

Predict = Callable[..., Tensor]
"""Scaled latents (b, c, h, w) and the index of a step to a prediction for each context, (k b, c, h, w).

By name it takes further arguments of the UNet, if the pipeline has any.
"""


class ClassifierFreeGuidance:
    """Extrapolate from the unconditional to the conditional prediction (equation 6, `scale` is 1 + w there).

    `guided` predicts for the `rows` of both contexts, the unconditional half first, in `guided_steps`, an interval of
    the steps (arXiv:2404.07724); in the others `conditional` predicts for the image's context alone. Either is None
    where it has no steps.
    """

    def __init__(
        self,
        guided: Predict | None,
        conditional: Predict | None,
        scale: float,
        guided_steps: Container[int],
        rows: int,
    ):
        self.guided, self.conditional, self.scale, self.guided_steps = guided, conditional, scale, guided_steps
        self.rows = rows

    def __call__(self, x: Tensor, step: int, **more: Any) -> Tensor:
        if step not in self.guided_steps:
            x, more = tree_map_only(Tensor, self.conditional_half, (x, more))
            return self.conditional(x, step, **more)  # type: ignore[misc]
        uncond, cond = self.guided(x, step, **more).chunk(2)  # type: ignore[misc]
        return uncond + self.scale * (cond - uncond)

    def conditional_half(self, x: Tensor) -> Tensor:
        """Return the second half of a tensor with a row for each row of the contexts; any other tensor unchanged."""
        return x.chunk(2)[1] if x.ndim and len(x) == self.rows else x
