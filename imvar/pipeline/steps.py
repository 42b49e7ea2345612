"""One step of any scheduler, and the x_0 that is predicted in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ..errors import InputError, invalid
from ..schedulers.common import to_x0
from .components import require_tensor


def take_step(
    scheduler: Any, output: Tensor, timestep: Any, x: Tensor, scaled: Tensor, options: Mapping[str, Any]
) -> tuple[Tensor, Callable[[], Tensor]]:
    """Return the latents after a step from x, and a function that returns the x_0 predicted in it, both (b, c, h, w).

    `output`: the UNet's for `scaled`, which the scheduler made of x. `options`: further arguments of its step.
    """
    result = scheduler.step(output, timestep, x, **options)
    latents = require_tensor(scheduler, "scheduler", result, "prev_sample").to(x.dtype)
    return latents, partial(x0_of_step, scheduler, result, output, timestep, scaled)


def x0_of_step(scheduler: Any, result: Any, output: Tensor, timestep: Any, scaled: Tensor) -> Tensor:
    """Return the x_0 predicted in the last step of a scheduler: from its result, or computed from the UNet's output.

    Raises `InputError` if the scheduler has neither it nor the noise level.
    """
    x0 = getattr(result, "pred_original_sample", None)
    if isinstance(x0, Tensor):
        return x0.to(scaled.dtype)
    kind = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    alpha = alpha_of_last_step(scheduler, timestep)
    if alpha is None or kind not in ("epsilon", "v_prediction", "sample") or output.shape != scaled.shape:
        expected = "a scheduler whose step returns it, or with alphas_cumprod and a prediction_type"
        raise invalid(InputError, "pred_original_sample", expected, type(scheduler).__name__)
    return to_x0(kind, output, scaled, alpha).to(scaled.dtype)


def alpha_of_last_step(scheduler: Any, timestep: Any) -> Tensor | None:
    """Return the share of signal variance in what the UNet received, 0-d; None if it cannot be known.

    Scaled latents are variance-preserving for every scheduler of the same training, which `alphas_cumprod` describes.
    """
    alphas, sigmas, next_index = (getattr(scheduler, n, None) for n in ("alphas_cumprod", "sigmas", "step_index"))
    if not isinstance(alphas, Tensor):
        return None
    if isinstance(sigmas, Tensor) and isinstance(next_index, int):
        return 1 / (sigmas[next_index - 1] ** 2 + 1)  # more exact than a timestep, which may be rounded
    return alphas[int(timestep)] if float(timestep).is_integer() else None
