"""Euler's method on dx/dsigma: algorithm 2 of arXiv:2206.00364 without its correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..checks import check_finite, check_float, validated
from ..config import fixed, one_of
from ..noise import Generators, randn
from ..outputs import DenoisedOutput
from .common import SchedulerConfig, check_noise_inputs, check_step_inputs
from .sigma_space import MAX_SIGMA, SigmaSpaceScheduler, check_no_spacing, check_spacing, to_denoised
from .timesteps import check_one_schedule, descending, to_timesteps

MAX_CHURN = 2**0.5 - 1  # the largest share by which a step raises the noise level


def euler_step(x: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Return x at the noise level `sigma_next`, along the slope at x, whose level is `sigma`."""
    return x + (x - x0) / sigma * (sigma_next - sigma)


@dataclass(frozen=True, eq=False, repr=False)
class EulerDiscreteConfig(SchedulerConfig):
    """Config of `EulerDiscreteScheduler`: fields, order and defaults of `scheduler_config.json`."""

    prediction_type: str = one_of("epsilon", "sample", "v_prediction")
    interpolation_type: str = fixed("linear")
    use_karras_sigmas: bool | None = one_of(False, True, None)
    use_exponential_sigmas: bool | None = one_of(False, True, None)
    use_beta_sigmas: bool | None = one_of(False, True, None)
    sigma_min: float | None = None  # of the spacings of sigmas; by default the noise level of the last timestep
    sigma_max: float | None = None  # by default that of the first
    timestep_spacing: str = one_of("linspace", "leading", "trailing")
    timestep_type: str = fixed("discrete")
    steps_offset: int = 0  # added to the timesteps of leading spacing
    rescale_betas_zero_snr: bool = one_of(False, True)
    final_sigmas_type: str = one_of("zero", "sigma_min")  # after the last step: 0, or the lowest of training

    def check(self) -> None:
        super().check()
        check_spacing(self)


class EulerDiscreteScheduler(SigmaSpaceScheduler, part="scheduler"):
    """Euler's method on x = x_0 + sigma noise: one step along each slope; DDIM at eta 0, if neither clips.

    Takes the fields of `EulerDiscreteConfig`. Attributes: those of `SigmaSpaceScheduler`.
    """

    config_class = EulerDiscreteConfig

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Set `timesteps`, (n,) float32 on `device`, and `sigmas`, (n + 1,), and reset the run.

        One of: `num_inference_steps`, 1 to `num_train_timesteps`; `timesteps`, n descending numbers; `sigmas`, n + 1
        descending noise levels. Raises `InputTypeError` or `InputError` for anything else.
        """
        check_one_schedule(num_inference_steps=num_inference_steps, timesteps=timesteps, sigmas=sigmas)
        last = self.last_sigma
        if sigmas is not None:
            given = descending("sigmas", sigmas, MAX_SIGMA, least=2).astype(np.float32)
            levels, last = given[:-1], given[-1]
            times = to_timesteps(levels, self.train_sigmas)
        elif timesteps is not None:
            check_no_spacing(self.config, "timesteps")
            times = descending("timesteps", timesteps, len(self) - 1).astype(np.float32)
            levels = self.sigmas_at(times)
        else:
            times, levels = self.respace(*self.space_levels(num_inference_steps))
        self.start_run(times.astype(np.float32), levels, last, device)

    @validated(check_step_inputs)
    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> DenoisedOutput | tuple[Tensor, Tensor]:
        """Step from `sample` to the next noise level; return the sample and the predicted x_0, all (b, c, h, w).

        `s_churn`, `s_tmin`, `s_tmax`, `s_noise`: S of algorithm 2; above 0, `s_churn` first adds noise, drawn from
        `generator` in `model_output`'s dtype. The step is computed in float32. Raises `InputError` for a timestep that
        is not in `timesteps`, or after the last. Warns if `scale_model_input` was never called.
        """
        self.check_input_was_scaled()
        churn = check_float("s_churn", s_churn, high=math.inf) / (len(self.sigmas) - 1)
        low, high = (check_float(name, s, high=math.inf) for name, s in (("s_tmin", s_tmin), ("s_tmax", s_tmax)))
        s_noise = check_finite("s_noise", s_noise)
        i, kind = self.find_step_index(timestep), self.config.prediction_type
        sigma, x = self.sigmas[i], sample.float()
        gamma = min(churn, MAX_CHURN) if low <= sigma <= high else 0.0
        raised = sigma * (1 + gamma)
        if gamma > 0:
            noise = randn(model_output.shape, generator, dtype=model_output.dtype, device=model_output.device)
            x = x + noise * s_noise * (raised**2 - sigma**2) ** 0.5
        # as in diffusers, v is that of x at the level without the added noise
        x0 = to_denoised(kind, model_output, x, sigma if kind == "v_prediction" else raised)
        prev = euler_step(x, x0, raised, self.sigmas[i + 1]).to(model_output.dtype)
        self.step_index = i + 1
        return DenoisedOutput(prev, x0) if return_dict else (prev, x0)

    @validated(check_noise_inputs)
    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return v, the target of `v_prediction`, for x_0 and noise, both (b, ...), at `timesteps`, (b,) or ().

        diffusers reads the noise levels of this method in the opposite order.
        """
        sigma = self.noise_levels(sample, timesteps)
        return (noise - sigma * sample) / (sigma**2 + 1) ** 0.5
