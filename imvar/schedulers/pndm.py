"""PNDM: pseudo numerical methods for diffusion models on manifolds, arXiv:2202.09778."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import as_device, validated
from ..config import one_of
from ..errors import InputError
from ..outputs import SchedulerOutput
from .common import SchedulerConfig, VariancePreserving, check_signal_range, check_step_inputs, to_eps
from .timesteps import integer_timesteps

RUNGE_KUTTA_WEIGHTS = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


def transfer(x: Tensor, eps: Tensor, alpha: Tensor, alpha_prev: Tensor) -> Tensor:
    """x_t -> x_(t-1) along the noise `eps`: equation 9. It equals DDIM's step at eta 0."""
    scale = alpha * (1 - alpha_prev) ** 0.5 + (alpha * (1 - alpha) * alpha_prev) ** 0.5
    return (alpha_prev / alpha) ** 0.5 * x - (alpha_prev - alpha) * eps / scale


def adams_bashforth(history: Sequence[Tensor]) -> Tensor:
    """The linear multistep blend of up to four predictions, the newest last: equation 12 with its shorter kin."""
    match history:
        case [e]:
            return e
        case [d, e]:
            return (3 * e - d) / 2
        case [c, d, e]:
            return (23 * e - 16 * d + 5 * c) / 12
        case [b, c, d, e]:
            return (1 / 24) * (55 * e - 59 * d + 37 * c - 9 * b)
    raise InputError(f"history: {len(history)} predictions came; 1 to 4 would do")


@dataclass(frozen=True, eq=False, repr=False)
class PNDMConfig(SchedulerConfig):
    """The settings of `PNDMScheduler`: fields, order and defaults of `scheduler_config.json`."""

    skip_prk_steps: bool = one_of(False, True)  # the Runge-Kutta opening
    set_alpha_to_one: bool = one_of(False, True)  # where the walk ends; else at timestep 0's alpha
    prediction_type: str = one_of("epsilon", "v_prediction")
    timestep_spacing: str = one_of("leading", "linspace", "trailing")
    steps_offset: int = 0  # added to the timesteps of leading spacing


class PNDMScheduler(VariancePreserving, part="scheduler"):
    """PNDM, arXiv:2202.09778: steps along a blend of the last four predictions.

    The history begins in one of two ways. The paper's takes three Runge-Kutta steps of four evaluations
    each, so n steps visit n + 9 timesteps. With `skip_prk_steps` the second timestep is visited twice, so
    n + 1: the second visit starts again from the first sample and averages both predictions.

    Takes the settings of `PNDMConfig`. Attributes: `counter`, the steps taken since `set_timesteps`; `ets`, the
    last predictions, at most four, kept as they were handed in.
    """

    config_class = PNDMConfig
    timesteps: Any = None
    prk_timesteps: Any = ()
    plms_timesteps: Any = ()
    counter = 0
    ets: Sequence[Tensor] = ()
    cur_sample: Tensor | None = None  # the sample that this step started from
    cur_model_output: Tensor | float = 0.0  # the Runge-Kutta sum so far

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the timesteps to visit and forget the history: int64 on `device`.

        `num_inference_steps`: 1 to `num_train_timesteps`, from 4 without `skip_prk_steps`. Raises
        `InputTypeError` or `InputError` for any other number.
        """
        t = integer_timesteps(self.config, num_inference_steps)
        if self.config.skip_prk_steps:
            self.prk_timesteps, self.plms_timesteps = t[:0], np.concatenate([t[:2], t[1:]])
        elif len(t) < 4:
            raise InputError(f"num_inference_steps={len(t)}: 4 or more would do, or skip_prk_steps=True")
        else:
            half = len(self) // len(t) // 2
            opening = [[start, end + half, end + half, end] for start, end in pairwise(t[:4])]
            self.prk_timesteps, self.plms_timesteps = np.concatenate(opening), t[3:]
        self.num_inference_steps = len(t)
        visited = torch.from_numpy(np.concatenate([self.prk_timesteps, self.plms_timesteps]))
        check_signal_range(self, self.alphas_cumprod[visited])
        self.timesteps = visited.to(as_device("device", device))
        self.counter, self.ets, self.cur_sample, self.cur_model_output = 0, [], None, 0.0

    @validated(check_step_inputs)
    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """From `sample` at `timestep` to the next entry of `timesteps`, both (b, c, h, w).

        Raises `InputError` before `set_timesteps` and for a timestep out of range.
        """
        if self.num_inference_steps is not None and self.counter >= len(self.timesteps):
            raise InputError(f"step: all {len(self.timesteps)} timesteps are done; set_timesteps begins another run")
        opening = self.counter < len(self.prk_timesteps)
        return (self.step_prk if opening else self.step_plms)(model_output, timestep, sample, return_dict)

    def step_prk(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """A quarter of a Runge-Kutta step, equation 13: each evaluation probes from the same start."""
        t, half = self.timestep_index(timestep), self.stride // 2
        quarter = self.counter % 4
        if self.counter >= len(self.prk_timesteps):
            raise InputError(f"step_prk: a run opens with {len(self.prk_timesteps)} of these here; step_plms would do")
        if quarter == 0:
            self.cur_sample, self.ets = sample, [*self.ets, model_output]
        self.cur_model_output = self.cur_model_output + RUNGE_KUTTA_WEIGHTS[quarter] * model_output
        if quarter == 3:
            model_output, self.cur_model_output = self.cur_model_output, 0.0
        start = sample if self.cur_sample is None else self.cur_sample
        base = int(self.prk_timesteps[self.counter - quarter])
        return self.advance(start, model_output, base, t if quarter % 2 else t - half, return_dict)

    def step_plms(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """A linear multistep step, equation 12, or one of the two that open a run without Runge-Kutta."""
        t, stride = self.timestep_index(timestep), self.stride
        if not self.config.skip_prk_steps and len(self.ets) < 3:
            raise InputError("step_plms: 12 calls of step_prk come first, or skip_prk_steps=True")
        if self.counter == 1:  # the second visit: from the first sample, along the mean of both predictions
            start = sample if self.cur_sample is None else self.cur_sample
            return self.advance(
                start, (model_output + self.ets[-1]) / 2, self.timestep_index(t + stride), t, return_dict
            )
        if self.counter == 0:
            self.cur_sample = sample
        self.ets = [*self.ets[-3:], model_output]
        return self.advance(sample, adams_bashforth(self.ets), t, t - stride, return_dict)

    def advance(
        self, start: Tensor, output: Tensor, t: int, t_prev: int, return_dict: bool
    ) -> SchedulerOutput | tuple[Tensor]:
        """Transfer `start` from t to t_prev along what the network said, and count the step."""
        alpha = self.alpha(t)
        eps = to_eps(self.config.prediction_type, output, start, alpha)
        prev = transfer(start, eps, alpha, self.alpha(t_prev))
        self.counter += 1
        return SchedulerOutput(prev) if return_dict else (prev,)
