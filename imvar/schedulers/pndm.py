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
from ..errors import InputError, invalid
from ..outputs import SchedulerOutput
from .common import SchedulerConfig, StridedScheduler, check_step_inputs, to_eps
from .timesteps import integer_timesteps

RUNGE_KUTTA_WEIGHTS = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


def transfer(x: Tensor, eps: Tensor, alpha: Tensor, alpha_prev: Tensor) -> Tensor:
    """Return x_(t-1) from x_t along the noise `eps`, equation 9: equal to DDIM's step at eta 0."""
    scale = alpha * (1 - alpha_prev) ** 0.5 + (alpha * (1 - alpha) * alpha_prev) ** 0.5
    return (alpha_prev / alpha) ** 0.5 * x - (alpha_prev - alpha) * eps / scale


def adams_bashforth(history: Sequence[Tensor]) -> Tensor:
    """Combine 1 to 4 predictions, the newest last: equation 12, and Adams-Bashforth of lower order for fewer."""
    match history:
        case [e]:
            return e
        case [d, e]:
            return (3 * e - d) / 2
        case [c, d, e]:
            return (23 * e - 16 * d + 5 * c) / 12
        case [b, c, d, e]:
            return (1 / 24) * (55 * e - 59 * d + 37 * c - 9 * b)
    raise invalid(InputError, "history", "1 to 4 predictions", str(len(history)))


@dataclass(frozen=True, eq=False, repr=False)
class PNDMConfig(SchedulerConfig):
    """Config of `PNDMScheduler`: fields, order and defaults of `scheduler_config.json`."""

    skip_prk_steps: bool = one_of(False, True)  # start without Runge-Kutta steps
    set_alpha_to_one: bool = one_of(False, True)  # alpha after the last step is 1; else that of timestep 0
    prediction_type: str = one_of("epsilon", "v_prediction")
    timestep_spacing: str = one_of("leading", "linspace", "trailing")
    steps_offset: int = 0  # added to the timesteps of leading spacing


class PNDMScheduler(StridedScheduler, part="scheduler"):
    """PNDM, arXiv:2202.09778: pseudo linear multistep (PLMS) on the last four predictions.

    There are two ways to obtain the first four. The paper takes three pseudo Runge-Kutta steps (PRK) of four
    evaluations each, so that n steps evaluate the UNet n + 9 times. With `skip_prk_steps` it is n + 1 times, twice at
    the second timestep: the second of these starts again from the first sample, along the mean of both predictions.

    Takes the fields of `PNDMConfig`. Attributes: `counter`, the steps taken since `set_timesteps`; `ets`, the last
    predictions, at most four, uncopied.
    """

    config_class = PNDMConfig
    prk_timesteps: Any = ()
    plms_timesteps: Any = ()
    counter = 0
    ets: Sequence[Tensor] = ()
    cur_sample: Tensor | None = None  # where the current Runge-Kutta step started
    cur_model_output: Tensor | float = 0.0  # its weighted sum of predictions so far

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Set `timesteps`, int64 on `device`, and reset the run.

        `num_inference_steps`: 1 to `num_train_timesteps`, at least 4 without `skip_prk_steps`. Raises `InputTypeError`
        or `InputError` for any other number.
        """
        t = integer_timesteps(self.config, num_inference_steps)
        if self.config.skip_prk_steps:
            self.prk_timesteps, self.plms_timesteps = t[:0], np.concatenate([t[:2], t[1:]])
        elif len(t) < 4:
            raise invalid(InputError, "num_inference_steps", "4 or more", str(len(t)), "or pass skip_prk_steps=True")
        else:
            half = len(self) // len(t) // 2
            evaluations = [[start, end + half, end + half, end] for start, end in pairwise(t[:4])]
            self.prk_timesteps, self.plms_timesteps = np.concatenate(evaluations), t[3:]
        self.num_inference_steps = len(t)
        timesteps = torch.from_numpy(np.concatenate([self.prk_timesteps, self.plms_timesteps]))
        low, high = map(float, self.alphas_cumprod[timesteps].aminmax())
        got = f"a share of signal from {low:g} to {high:g}, where {type(self).__name__} divides by 0"
        self.check_betas(low > 0 and high < 1, "betas that leave both signal and noise at every sampled timestep", got)
        self.timesteps = timesteps.to(as_device("device", device))
        self.counter, self.ets, self.cur_sample, self.cur_model_output = 0, [], None, 0.0

    @validated(check_step_inputs)
    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """Step from `sample` at `timestep` to the next entry of `timesteps`, both (b, c, h, w).

        Raises `InputError` before `set_timesteps` and for a timestep out of range.
        """
        if self.num_inference_steps is not None:
            self.check_steps_left(self.counter)
        step = self.step_prk if self.counter < len(self.prk_timesteps) else self.step_plms
        return step(model_output, timestep, sample, return_dict)

    def step_prk(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """One of the four evaluations of a pseudo Runge-Kutta step, equation 13, all from the same start."""
        t, half = self.timestep_index(timestep), self.stride // 2
        quarter = self.counter % 4
        if self.counter >= len(self.prk_timesteps):
            calls = f"at most {len(self.prk_timesteps)} calls a run"
            raise invalid(InputError, "step_prk", calls, "one more", "call step_plms", key=None)
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
        """A pseudo linear multistep step, equation 12; without Runge-Kutta steps the first two build the history."""
        t, stride = self.timestep_index(timestep), self.stride
        if not self.config.skip_prk_steps and len(self.ets) < 3:
            hint = "or pass skip_prk_steps=True"
            raise invalid(InputError, "step_plms", "12 calls of step_prk first", str(self.counter), hint, key=None)
        if self.counter == 1:  # second evaluation: from the first sample, along the mean of both predictions
            start = sample if self.cur_sample is None else self.cur_sample
            mean = (model_output + self.ets[-1]) / 2
            return self.advance(start, mean, self.timestep_index(t + stride), t, return_dict)
        if self.counter == 0:
            self.cur_sample = sample
        self.ets = [*self.ets[-3:], model_output]
        return self.advance(sample, adams_bashforth(self.ets), t, t - stride, return_dict)

    def advance(
        self, sample: Tensor, model_output: Tensor, t: int, t_prev: int, return_dict: bool
    ) -> SchedulerOutput | tuple[Tensor]:
        """Transfer `sample` from t to t_prev along the predicted noise, and count the step."""
        alpha = self.alpha(t)
        eps = to_eps(self.config.prediction_type, model_output, sample, alpha)
        prev = transfer(sample, eps, alpha, self.alpha(t_prev))
        self.counter += 1
        return SchedulerOutput(prev) if return_dict else (prev,)
