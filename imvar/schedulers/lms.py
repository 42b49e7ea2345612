"""LMS: linear multistep method on dx/dsigma, from Katherine Crowson's k-diffusion, after arXiv:2206.00364."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check_int, validated
from ..config import one_of
from ..outputs import DenoisedOutput
from .common import SchedulerConfig, check_step_inputs
from .sigma_space import SigmaSpaceScheduler, check_spacing, to_denoised
from .timesteps import karras_sigmas

# 21-point Gauss-Kronrod quadrature on [-1, 1]: the nodes from 0 up, largest first, with their weights
KRONROD = np.array(
    [
        [0.995657163025808081, 0.011694638867371874],
        [0.973906528517171720, 0.032558162307964727],
        [0.930157491355708226, 0.054755896574351996],
        [0.865063366688984511, 0.075039674810919953],
        [0.780817726586416897, 0.093125454583697606],
        [0.679409568299024406, 0.109387158802297642],
        [0.562757134668604683, 0.123491976262065851],
        [0.433395394129247191, 0.134709217311473326],
        [0.294392862701460198, 0.142775938577060081],
        [0.148874338981631211, 0.147739104901338491],
        [0, 0.149445554002916906],
    ]
)


def lms_weights(past: np.ndarray, to: float) -> list[float]:
    """Return the coefficients, in a step from past[0] to `to`, of the slopes at the float32 noise levels `past`.

    The Lagrange polynomial through the slopes is integrated over the step. Two nodes would be exact, but where one step
    spans most of the noise, the rounding of the coefficients determines the digits that remain. So quadrature and
    precision are those of diffusers: 21 nodes, added up in the same order, polynomials in float32.
    """
    nodes, weights = KRONROD[[10, *range(1, 10, 2), *range(0, 10, 2)]].T  # the order in which QUADPACK adds them up
    middle, half = (past[0].item() + to) / 2, (to - past[0].item()) / 2
    left, right = ((middle + side * half * nodes).astype(np.float32) for side in (-1, 1))
    coefficients = []
    for j in range(len(past)):
        values = lagrange(left, past, j).astype(float) + lagrange(right, past, j)
        values[0] /= 2  # the middle, which is one node
        coefficients.append(half * float(np.cumsum(weights * values)[-1]))  # unlike sum and @, in order on any machine
    return coefficients


def lagrange(tau: np.ndarray, past: np.ndarray, j: int) -> np.ndarray:
    """Evaluate at each tau the Lagrange basis polynomial that is 1 at past[j] and 0 at the other levels."""
    others = np.delete(past, j)
    return np.prod((tau[:, None] - others) / (past[j] - others), axis=1)


@dataclass(frozen=True, eq=False, repr=False)
class LMSDiscreteConfig(SchedulerConfig):
    """Config of `LMSDiscreteScheduler`: fields, order and defaults of `scheduler_config.json`."""

    use_karras_sigmas: bool = one_of(False, True)
    use_exponential_sigmas: bool = one_of(False, True)
    use_beta_sigmas: bool = one_of(False, True)
    prediction_type: str = one_of("epsilon", "sample", "v_prediction")
    timestep_spacing: str = one_of("linspace", "leading", "trailing")
    steps_offset: int = 0  # added to the timesteps of leading spacing

    def check(self) -> None:
        super().check()
        check_spacing(self)


class LMSDiscreteScheduler(SigmaSpaceScheduler, part="scheduler"):
    """LMS: linear multistep method on the slopes dx/dsigma of x = x_0 + sigma noise, of order 4 by default.

    Takes the fields of `LMSDiscreteConfig`. Attributes: those of `SigmaSpaceScheduler`; `derivatives`, the last slopes.
    """

    config_class = LMSDiscreteConfig

    def make_tables(self) -> None:
        super().make_tables()
        self.set_timesteps(len(self))

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Set `timesteps` to 1 to `num_train_timesteps` sampling timesteps and `sigmas` to theirs, and reset the run.

        `timesteps`: (n,) float32 on `device`, fractional if the spacing is. Raises `InputTypeError` or `InputError` for
        any other number.
        """
        timesteps, sigmas = self.respace(*self.space_levels(num_inference_steps))
        self.start_run(timesteps.astype(np.float32), sigmas, device=device)
        self.derivatives: Sequence[Tensor] = []

    def sigma_range(self, spacing: Any, sigmas: np.ndarray) -> tuple[float, float]:
        # as in diffusers, `sigma_max` and `sigma_min` of an Euler scheduler's config are not those of Karras sigmas
        return (sigmas[0], sigmas[-1]) if spacing is karras_sigmas else super().sigma_range(spacing, sigmas)

    def slope_weights(self, index: int, order: int) -> list[float]:
        """Return the coefficients of the last `order` slopes in the step of this index, the newest first."""
        past = self.sigmas[index - order + 1 : index + 1].flip(0)
        return lms_weights(past.numpy(), float(self.sigmas[index + 1]))

    def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
        """Return the coefficient of the slope `current_order` steps back, of `order` slopes, in step `t`."""
        weights = self.slope_weights(t, check_int("order", order, high=t + 1))
        return weights[check_int("current_order", current_order, low=0, high=order - 1)]

    @validated(check_step_inputs)
    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, order: int = 4, return_dict: bool = True
    ) -> DenoisedOutput | tuple[Tensor, Tensor]:
        """Step from `sample` to the next noise level; return the sample and the predicted x_0, all (b, c, h, w).

        `order`: how many of the last slopes are used, 1 or more. Raises `InputError` for a timestep that is not in
        `timesteps`, or after the last. Warns if `scale_model_input` was never called.
        """
        self.check_input_was_scaled()
        order, i = check_int("order", order), self.find_step_index(timestep)
        sigma = self.sigmas[i]
        x0 = to_denoised(self.config.prediction_type, model_output, sample, sigma)
        self.derivatives = [*self.derivatives, (sample - x0) / sigma][-max(order, len(self.derivatives)) :]
        # a run that starts at a later index has fewer slopes than coefficients; diffusers drops the rest, too
        weighted = zip(self.slope_weights(i, min(i + 1, order)), reversed(self.derivatives), strict=False)
        prev = sample + sum(weight * slope for weight, slope in weighted)
        self.step_index = i + 1
        return DenoisedOutput(prev, x0) if return_dict else (prev, x0)
